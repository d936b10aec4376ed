"""Both networks for texts learn from class folders, and what naive Bayes says of a term is where they start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support import texts
from training import data, networks, pipeline, text_start
from training.config import Recipe, load_recipe
from training.errors import RecipeError
from training.progress import silent
from training.train import fit, reproducible


def recipe(folder: Path, *overrides: str) -> Recipe:
    root = texts.write_folders(folder / "articles", texts.english() + texts.chinese())
    common = ("data.source=texts", f"data.root={root}", "text.word_ngrams=[]", "text.char_ngrams=[1,2]")
    return load_recipe("texts", [*common, "train.threads=1", "train.device=cpu", "train.batch_size=16", *overrides])


CNN = ("model.architecture=text_cnn", "model.width=16", "model.filters=32", "train.learning_rate=5e-3")


@pytest.mark.parametrize(
    "overrides",
    [(), ("model.width=8", "model.naive_bayes=0", "train.learning_rate=0.1"), CNN, (*CNN, "model.naive_bayes=0")],
    ids=["naive Bayes", "embedding_bag", "text_cnn from naive Bayes", "text_cnn"],
)
def test_every_network_learns_from_class_folders(overrides: tuple[str, ...], tmp_path: Path) -> None:
    asked = recipe(tmp_path, "train.epochs=8", "data.validation=0.3", *overrides)
    dataset = data.prepare(data.survey(asked, threads=1, report=silent), asked, threads=1, report=silent)
    with reproducible(1):
        history = fit(dataset, asked, tmp_path, report=silent).history
    assert history[-1]["train_loss"] < min(0.5, history[0]["train_loss"])  # ln 2 = 0.69 is what knowing nothing costs
    assert max(line["validation_accuracy"] for line in history) > 0.75


def test_rows_of_a_text_cnn_begin_with_each_classs_log_ratio(tmp_path: Path) -> None:
    asked = recipe(tmp_path, *CNN, "model.naive_bayes=0.5")
    dataset = data.prepare(data.survey(asked, threads=1, report=silent), asked, threads=1, report=silent)
    table = networks.start(dataset, asked, report=silent).get_parameter("table.weight")
    assert dataset.text is not None
    counts = torch.zeros(2, dataset.text.rows, dtype=torch.float64)
    for row in dataset.rows["train"]:
        counts[int(dataset.targets_N[row]), torch.unique(dataset.terms[row]).long()] += 1
    # By hand for one term: its share of all terms of a class, and how far its logarithm is from the classes' mean.
    term = int(counts.sum(dim=0).argmax())
    shares = [float((counts[k, term] + 0.5) / (counts[k] + 0.5)[1:].sum()) for k in range(2)]
    logs = torch.tensor(shares).log()
    torch.testing.assert_close(table[term, :2], logs - logs.mean(), rtol=1e-4, atol=1e-5)
    assert not bool(table[0].any())
    assert bool(table[term, 2:].any())


def test_terms_of_no_training_text_say_nothing() -> None:
    ratios = text_start.log_ratios(torch.tensor([[0.0, 3.0, 0.0], [0.0, 1.0, 2.0]], dtype=torch.float64), 1.0)
    assert ratios[:, 0].tolist() == [0.0, 0.0]
    assert ratios[0, 1] > 0 > ratios[0, 2]
    torch.testing.assert_close(ratios.sum(dim=0), torch.zeros(3, dtype=torch.float64))


def test_rows_too_short_for_the_classes_are_refused(tmp_path: Path) -> None:
    asked = recipe(tmp_path, *CNN, "model.width=1")
    with pytest.raises(RecipeError, match=r"a number per class, 2, and model\.width is 1") as caught:
        pipeline.train(asked, runs=tmp_path / "runs", artifacts=tmp_path / "artifacts", report=silent)
    assert "model.width=64" in caught.value.remedy
