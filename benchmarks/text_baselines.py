"""What simple text classifiers of scikit-learn reach on the rows of a recipe, to hold a trained artifact against.

    python -m benchmarks.text_baselines agnews --set data.root=PATH/test.csv [--artifact artifacts/agnews/1.0]

Each is fitted on the training rows as they are and judged on the test rows; the artifact is judged on the same rows by its
own worker's steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from handlerlib import inputs, loading
from training.config import load_recipe
from training.sources import Entry, listing

_BATCH = 256


@dataclass(frozen=True, slots=True)
class Score:
    """One classifier on the test rows."""

    name: str
    accuracy: float
    seconds: float
    """Of fitting and answering; of answering alone for an artifact."""


def baselines() -> dict[str, Any]:
    """Name -> unfitted classifier of texts."""
    return {
        "linear SVM, tf-idf of words and pairs": make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LinearSVC()),
        "multinomial naive Bayes 0.1, sublinear tf-idf of words and pairs without stop words": make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), stop_words="english", sublinear_tf=True), MultinomialNB(alpha=0.1)
        ),
    }


def compare(recipe: str, overrides: Sequence[str], artifact: Path | None = None) -> list[Score]:
    """Every baseline, then the artifact. The recipe must divide its rows itself. Raises DataError."""
    entries = listing(load_recipe(recipe, overrides).data).entries
    train, test = ([entry for entry in entries if entry.given == side] for side in ("train", "test"))
    scores = []
    for name, classifier in baselines().items():
        started = time.perf_counter()
        classifier.fit([entry.read().decode() for entry in train], [entry.label for entry in train])
        right = classifier.predict([entry.read().decode() for entry in test]) == [entry.label for entry in test]
        scores.append(Score(name, float(np.mean(right)), time.perf_counter() - started))
    return scores if artifact is None else [*scores, _judge(artifact, test)]


def _judge(artifact: Path, test: Sequence[Entry]) -> Score:
    model = loading.load(artifact, torch.device("cpu"))
    reading = inputs.of(model.spec)
    started = time.perf_counter()
    right = 0
    for start in range(0, len(test), _BATCH):
        part = test[start : start + _BATCH]
        rows = model.probabilities(reading.stack([reading.load(entry.read()) for entry in part]))
        guessed = [model.spec.labels[index] for index in rows.argmax(dim=1).tolist()]
        right += sum(label == entry.label for label, entry in zip(guessed, part, strict=True))
    name = f"{model.spec.name} {model.spec.version}, {model.spec.architecture.name}"
    return Score(name, right / len(test), time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one JSON object per classifier."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text_baselines", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--artifact", type=Path)
    given = parser.parse_args(arguments)
    for score in compare(given.recipe, given.overrides, given.artifact):
        sys.stdout.write(json.dumps(asdict(score)) + "\n")


if __name__ == "__main__":
    main()
