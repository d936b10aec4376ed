"""Export measures the baseline on what the test split was answered."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from handlerlib import loading
from handlerlib.spec import ModelSpec
from support import images
from support.artifacts import write_artifact
from training import export
from training.data import Sample
from training.evaluate import Evaluation, Prediction


def test_export_counts_the_answers_for_the_test_split(tmp_path: Path) -> None:
    model = loading.load(write_artifact(tmp_path), torch.device("cpu"))
    assert isinstance(model.engine, loading.PlainEngine)
    samples = [Sample(f"{index}.png", label, images.photo(index)) for index, label in enumerate(images.LABELS)]
    answers = [("blue", 0.995), ("red", 0.95), ("red", 0.3)]
    predictions = tuple(
        Prediction(sample.name, sample.label, label, probability)
        for sample, (label, probability) in zip(samples, answers, strict=True)
    )
    judged = Evaluation(metrics={}, labels=images.LABELS, confusion=(), per_class=(), predictions=predictions)
    run = tmp_path / "run"
    run.mkdir()
    export.freeze(run, model.engine.network, model.spec, samples, judged)
    baseline = ModelSpec.load(run).baseline
    assert baseline is not None
    assert baseline.classes == (1, 0, 2)  # labels are blue, green, red
    assert baseline.confidence == (0, 1, 0, 0, 0, 0, 0, 0, 1, 1)
    before = (run / "model_spec.json").read_bytes()
    export.freeze(run, model.engine.network, dataclasses.replace(model.spec), samples, judged)
    assert (run / "model_spec.json").read_bytes() == before
