"""Labels and values: losses, thresholds, standardisation, figures, and what is wrong with data and recipes."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import Tensor, nn

from handlerlib import tasks
from handlerlib.spec import Scaling
from training import data, losses, multilabel, pipeline, regression, sources, truth, validation
from training.config import Recipe, Train, load_recipe
from training.data import Dataset
from training.distributed import ALONE
from training.errors import DataError, RecipeError
from training.progress import silent
from training.sources import Split

LABELS = ("cat", "dog", "owl")


def measured(loss: losses.Loss, outputs: Tensor, targets: Tensor) -> float:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    value, logits = loss(Fixed(), outputs, targets)
    assert torch.equal(logits, outputs)
    return float(value)


# -------------------------------------------------------------------------------------------------------------- losses


def test_the_losses_are_their_formulas() -> None:
    z = torch.tensor([[2.0, -1.0, 0.5], [-30.0, 40.0, 0.0]])
    y = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    weights = torch.tensor([3.0, 1.0, 0.5])

    def term(k: int, logit: float, flag: float) -> float:
        p = 1 / (1 + math.exp(-logit))
        return -float(weights[k]) * math.log(p) if flag else -math.log(1 - p)

    rows = zip(z.tolist(), y.tolist(), strict=True)
    expected = [term(k, *pair) for row in rows for k, pair in enumerate(zip(*row, strict=True))]
    assert measured(losses.binary_cross_entropy(weights), z, y) == pytest.approx(sum(expected) / 6, rel=1e-5)
    assert measured(losses.squared_error(), z, y) == pytest.approx(float(((z - y) ** 2).mean()), rel=1e-6)
    assert measured(losses.absolute_error(), z, y) == pytest.approx(float((z - y).abs().mean()), rel=1e-6)


def test_balanced_weights_let_both_sides_of_a_label_count_alike() -> None:
    train = Train(class_weights="balanced")
    flags = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    rows: dict[Split, tuple[int, ...]] = {"train": (0, 1, 2, 3), "validation": (), "test": (4,)}
    dataset = Dataset((), LABELS, None, torch.empty(0), flags, rows)  # type: ignore[arg-type]
    weights = losses.positive_weights(train, dataset)
    assert weights is not None
    assert weights.tolist() == pytest.approx([3.0, 3.0, 1 / 3])
    with pytest.raises(RecipeError, match="class 'x'"):
        losses.positive_weights(train.model_copy(update={"class_weights": {"x": 2.0}}), dataset)


# ---------------------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_has_a_higher_f1(seed: int) -> None:
    draws = np.random.default_rng(seed)
    true = draws.random((60, 3)) < [0.1, 0.5, 0.9]
    p = np.round(np.clip(0.4 * true + 0.6 * draws.random((60, 3)), 0.001, 0.999), 2)  # rounded: many ties
    found = multilabel.thresholds(true, p)
    for k, threshold in enumerate(found):
        precision, recall, _ = sklearn_metrics.precision_recall_curve(true[:, k], p[:, k])
        best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))  # over all cuts there are
        assert sklearn_metrics.f1_score(true[:, k], p[:, k] >= threshold) == pytest.approx(best)
        assert 0 < threshold < 1


def test_thresholds_where_samples_say_nothing() -> None:
    p = np.array([[0.9, 0.2, 0.3], [0.8, 0.1, 0.3]])
    nobody, everybody = np.zeros((2, 3), dtype=bool), np.ones((2, 3), dtype=bool)
    assert multilabel.thresholds(nobody, p) == (0.5, 0.5, 0.5)
    found = multilabel.thresholds(everybody, p)
    assert multilabel.given(p, found).all()
    # Well apart: one half separates as well as any other cut, so it is taken.
    assert multilabel.thresholds(np.array([[True], [False]]), np.array([[0.9], [0.1]])) == (0.5,)
    assert multilabel.thresholds(np.array([[True]]), np.array([[0.0]])) == (0.5,)


# ------------------------------------------------------------------------------------------------------------- figures


def test_figures_of_labels_are_scikit_learns() -> None:
    draws = np.random.default_rng(3)
    true, p = draws.random((80, 3)) < 0.4, draws.random((80, 3))
    cuts = (0.3, 0.5, 0.7)
    found, rows = multilabel.measure(LABELS, cuts, true, p)
    given = p >= np.array(cuts)
    for average in ("macro", "micro"):
        scores = sklearn_metrics.precision_recall_fscore_support(true, given, average=average)
        assert [found[f"test_{average}_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(scores[:3])
    assert found["test_exact_match"] == sklearn_metrics.accuracy_score(true, given)
    assert found["test_average_precision"] == pytest.approx(sklearn_metrics.average_precision_score(true, p))
    assert found["test_loss"] == pytest.approx(
        np.mean([sklearn_metrics.log_loss(true[:, k], p[:, k]) for k in range(3)])
    )
    assert [row.images for row in rows] == true.sum(axis=0).tolist()


def test_a_label_that_nobody_has_or_gets() -> None:
    true, p = np.array([[True, False], [False, False]]), np.array([[0.9, 0.1], [0.2, 0.3]])
    found, rows = multilabel.measure(LABELS[:2], (0.5, 0.5), true, p)
    assert (rows[1].f1, rows[1].roc_auc, rows[1].average_precision) == (0.0, None, None)
    assert (found["test_exact_match"], found["test_macro_f1"], found["test_micro_f1"]) == (1.0, 1.0, 1.0)
    nobody, _ = multilabel.measure(LABELS[:2], (0.5, 0.5), true[1:], p[1:])
    assert (nobody["test_macro_precision"], nobody["test_macro_f1"]) == (0.0, 0.0)
    judged = validation.figures("multi-label", Train(), 2)
    judged.add(torch.tensor(p - 0.5), torch.tensor(true, dtype=torch.float64))
    assert judged.record(ALONE)["validation_macro_f1"] == 1.0


def test_figures_of_values_are_scikit_learns() -> None:
    draws = np.random.default_rng(4)
    true = draws.normal(size=(50, 2)) * [1, 100] + [0, 1000]
    got = true + draws.normal(size=(50, 2)) * [0.3, 40]
    scaling = (Scaling(mean=0, scale=1), Scaling(mean=1000, scale=100))
    found, rows = regression.measure(("a", "b"), scaling, true, got)
    assert [row.mae for row in rows] == pytest.approx(
        sklearn_metrics.mean_absolute_error(true, got, multioutput="raw_values")
    )
    assert [row.r2 for row in rows] == pytest.approx(sklearn_metrics.r2_score(true, got, multioutput="raw_values"))
    assert found["test_r2"] == pytest.approx(sklearn_metrics.r2_score(true, got))
    assert [row.rmse for row in rows] == pytest.approx(
        np.sqrt(sklearn_metrics.mean_squared_error(true, got, multioutput="raw_values"))
    )
    assert found["test_mae/b"] == rows[1].mae
    constant, same = regression.measure(("a",), scaling[:1], np.ones((3, 1)), np.ones((3, 1)))
    assert same[0].r2 is None and "test_r2" not in constant and constant["test_mae"] == 0


@pytest.mark.parametrize("parts", [1, 3])
def test_an_epoch_is_judged_as_a_whole_in_whatever_batches_it_comes(parts: int) -> None:
    torch.manual_seed(0)
    logits, flags = torch.randn(31, 3), (torch.rand(31, 3) < 0.4).float()
    labels = validation.figures("multi-label", Train(), 3)
    values = validation.figures("regression", Train(loss="mean_absolute_error"), 3)
    for part in torch.arange(31).chunk(parts):
        labels.add(logits[part], flags[part])
        values.add(logits[part], flags[part])
    found = labels.record(ALONE)
    given = (logits > 0).numpy()
    assert found["validation_accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(flags, given))
    assert found["validation_macro_f1"] == pytest.approx(sklearn_metrics.f1_score(flags, given, average="macro"))
    assert found["validation_loss"] == pytest.approx(
        measured(losses.binary_cross_entropy(None), logits, flags), rel=1e-5
    )
    found = values.record(ALONE)
    assert found["validation_loss"] == pytest.approx(float((logits - flags).abs().mean()), rel=1e-5)
    assert found["validation_r2"] == pytest.approx(sklearn_metrics.r2_score(flags, logits))


# ------------------------------------------------------------------------------------------------------ standardisation


def test_values_are_standardised_on_the_training_rows_and_the_worker_undoes_it() -> None:
    values = [[1.0, 1e6], [3.0, 3e6], [1000.0, -1e9]]
    texts = [truth.of_values(row) for row in values]
    targets, scaling = truth.learned(texts, ("a", "b"), "regression", train=[0, 1])
    torch.testing.assert_close(targets[:2], torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    assert [(one.mean, one.scale) for one in scaling] == [(2.0, 1.0), (2e6, 1e6)]
    undone = tasks.of_task("regression", scaling)(targets)
    torch.testing.assert_close(undone.double(), torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_target_that_never_changes_is_refused() -> None:
    texts = [truth.of_values([0.1]), truth.of_values([0.1]), truth.of_values([5])]
    with pytest.raises(DataError, match=r"the target 'a' is 0\.1 in all training rows"):
        truth.learned(texts, ("a",), "regression", train=[0, 1])


def test_targets_of_any_unit_that_float32_holds() -> None:
    picofarads = [truth.of_values([value * 1e-12]) for value in (1.0, 3.0)]
    targets, _ = truth.learned(picofarads, ("a",), "regression", train=[0, 1])
    torch.testing.assert_close(targets, torch.tensor([[-1.0], [1.0]]))
    for unit in (1e-40, 1e200):
        texts = [truth.of_values([value * unit]) for value in (1.0, 3.0)]
        with pytest.raises(DataError, match="beyond what float32 holds"):
            truth.learned(texts, ("a",), "regression", train=[0, 1])


def test_figures_of_a_target_that_never_changes() -> None:
    """0.1 three times has a deviation of 1e-17: not nothing."""
    one = (Scaling(mean=0, scale=1),)
    metrics, rows = regression.measure(("a",), one, np.full((3, 1), 0.1), np.full((3, 1), 0.2))
    assert rows[0].r2 is None and "test_r2" not in metrics


def test_the_shown_pairs_hold_no_digit_of_another_split() -> None:
    labelled = sources.listing(load_recipe("digit_pairs").data, "multi-label")
    summed = sources.listing(load_recipe("digit_sums").data, "regression")
    digits: dict[Any, set[str]] = defaultdict(set)
    for one, other in zip(labelled.entries, summed.entries, strict=True):
        digits[one.given].update(one.name.split("-")[1:])
        total, difference = json.loads(other.label)
        pair = {str(round((total + difference) / 2)), str(round((total - difference) / 2))}
        assert (one.name, one.given) == (other.name, other.given)
        assert set(truth.parts(one.label)) == pair
    assert set(digits) == {"train", "validation", "test"}
    assert not digits["train"] & digits["test"]
    assert not digits["validation"] & (digits["train"] | digits["test"])


# ---------------------------------------------------------------------------------------------------------- wrong data


def table(folder: Path, images: list[bytes], header: str, *rows: str) -> Path:
    """`photos.csv` beside a folder of images; each row begins with the number of its image."""
    (folder / "images").mkdir(exist_ok=True)
    for number, image in enumerate(images):
        (folder / "images" / f"{number}.png").write_bytes(image)
    lines = [f"image,{header}", *(f"images/{row.partition(',')[0]}.png,{row.partition(',')[2]}" for row in rows)]
    (folder / "photos.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "photos.csv"


def recipe_of(path: Path, task: str, *overrides: str) -> Recipe:
    toml = path.with_suffix(".toml")
    toml.write_text(
        f'name = "t"\ntask = "{task}"\n[data]\nsource = "image_csv"\nroot = "{path}"\n'
        '[model]\narchitecture = "tiny_cnn"\n[train]\nepochs = 1\nthreads = 1\ndevice = "cpu"\n'
    )
    return load_recipe(str(toml), overrides)


def survey(path: Path, task: str, *overrides: str) -> data.Survey:
    recipe = recipe_of(path, task, *overrides)
    surveyed = data.survey(recipe, threads=1, report=silent)
    data.prepare(surveyed, recipe, threads=1, report=silent)
    return surveyed


FLAGS = "data.label_columns=['a', 'b']"
JOINED = "data.label_separator=';'"
NUMBER = "data.target_columns=['y']"
GOOD = [f"{n},{n % 2},{n // 2 % 2}" for n in range(12)]


def test_the_same_labels_in_two_columns_and_in_one(tmp_path: Path, digit_images: dict[str, list[bytes]]) -> None:
    images = digit_images["3"]
    two = survey(table(tmp_path, images[:12], "a,b", *GOOD), "multi-label", FLAGS)
    names = {"00": "", "10": "a", "01": "b", "11": " b; a"}
    rows = [f"{row.partition(',')[0]},{names[row.partition(',')[2].replace(',', '')]}" for row in GOOD]
    one = survey(table(tmp_path, images[:12], "label", *rows), "multi-label", JOINED)
    assert one.classes == two.classes == ("a", "b")
    assert one.digest == two.digest


def test_labels_with_numbers_in_them(tmp_path: Path, digit_images: dict[str, list[bytes]]) -> None:
    """In one order everywhere, also where one label is the beginning of another."""
    rows = [f"{n},{'tag10; tag2' if n % 2 else 'tag'}" for n in range(12)]
    found = survey(table(tmp_path, digit_images["5"][:12], "label", *rows), "multi-label", JOINED)
    assert found.classes == ("tag", "tag2", "tag10")
    texts = {one.entry.label for one in found.found}
    assert texts == {truth.of_labels(labels, found.classes) for labels in (["tag"], ["tag10", "tag2"])}


@pytest.mark.parametrize(
    ("task", "override", "header", "rows", "message"),
    [
        ("multi-label", FLAGS, "a,c", GOOD, r"photos.csv has no column 'b': its first row names image, a, c"),
        ("multi-label", FLAGS, "a,b", [*GOOD[:3], "3,1,yes"], r"line 5: the label 'b' is 'yes', neither 0 nor 1"),
        ("multi-label", FLAGS, "a,b", [f"{n},{n % 2},0" for n in range(12)], r"no image .* has the label 'b'"),
        ("multi-label", FLAGS, "a,b", [f"{n},{n % 2},1" for n in range(12)], r"every image .* has the label 'b'"),
        ("multi-label", FLAGS, "a,b", [*GOOD, "0,1,1"], r"line 14: the image 'images/0.png' has a row already"),
        ("multi-label", FLAGS, "a,b", [*GOOD, "99,1,1"], r"line 14: there is no image 'images/99.png'"),
        ("multi-label", JOINED, "label", [f"{n}," for n in range(12)], r"no row has a label"),
        ("multi-label", JOINED, "label", ["0,a;;b"], r"line 2: an empty label in 'a;;b'"),
        ("multi-label", JOINED, "label", ["0,a;a"], r"line 2: a label twice in 'a;a'"),
        ("multi-label", FLAGS, "a,b", GOOD[1:3], r"has 2 readable images, three are the least"),
        ("regression", NUMBER, "y", ["0,1", "1,2", "2,much"], r"line 4: the target 'y' is 'much', not a finite number"),
        ("regression", NUMBER, "y", ["0,1", "1,nan"], r"line 3: the target 'y' is 'nan', not a finite number"),
        ("regression", NUMBER, "y", ["0,1", "1,1_000"], r"line 3: the target 'y' is '1_000', not a finite number"),
        ("regression", NUMBER, "y", ["0,1", f"{'x' * 300},1"], r"line 3: there is no image 'images/x+"),
        ("regression", NUMBER, "y", ["0,1", "1,inf"], r"line 3: the target 'y' is 'inf', not a finite number"),
        ("regression", NUMBER, "y", ["0,1", "1,"], r"line 3: the target 'y' is empty"),
        ("regression", NUMBER, "y", [f"{n},7" for n in range(12)], r"the target 'y' is 7 in all training rows"),
        ("regression", NUMBER, "x", ["0,1"], r"has no column 'y'"),
        ("multi-class", "seed=1", "label", ["0,", "1,b"], r"line 2: no class in the column 'label'"),
    ],
)
def test_wrong_tables(
    tmp_path: Path,
    digit_images: dict[str, list[bytes]],
    task: str,
    override: str,
    header: str,
    rows: list[str],
    message: str,
) -> None:
    path = table(tmp_path, digit_images["5"][:12], header, *rows)
    with pytest.raises(DataError, match=message) as found:
        survey(path, task, override)
    assert found.value.remedy


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither a \.csv file nor a folder"):
        survey(tmp_path / "none.csv", "regression", NUMBER)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=regression", "data.target_columns=['product']"], "digit_pairs have no 'product', they have sum"),
        (["task=multi-class"], "digit_pairs have no one class"),
        (["train.label_smoothing=0.1"], "train.label_smoothing is not for the task 'multi-label'"),
        (["train.loss=mean_absolute_error"], "train.loss is not for the task 'multi-label'"),
        (["train.monitor=r2"], "has no r2, take one of loss, accuracy, macro_f1"),
        (["data.source=digits"], "reads a table, csv"),
        (["data.source=image_csv"], "give the labels' columns, or label_separator"),
        (["data.source=image_csv", FLAGS, JOINED], "not both"),
        (["data.source=image_csv", "data.label_columns=['a', 'a']"], "data.label_columns: a column is named twice"),
        (["data.source=image_csv", "task=regression"], "name the columns with the numbers"),
        (["data.label_columns=['a']"], "data.label_columns is not for the source 'digit_pairs'"),
        (["task=regression", "train.class_weights=balanced"], "train.class_weights is not for the task 'regression'"),
        (["distil.teacher=x"], "distil is not for the task 'multi-label'"),
        (["task=multilabel"], "task: Input should be"),
    ],
)
def test_recipes_say_what_a_task_has_not(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("digit_pairs", overrides)


@pytest.mark.parametrize(
    "own", [["task=multi-label", "data.label_columns=['a', 'b']"], ["task=regression", "data.target_columns=['y']"]]
)
def test_the_recipe_for_texts_serves_other_tasks_once_naive_bayes_is_off(own: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"leave it out, or --set model\.naive_bayes=0\.0"):
        load_recipe("texts", own)
    assert load_recipe("texts", [*own, "model.naive_bayes=0"]).model.naive_bayes == 0


# -------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("loss", ["mean_squared_error", "mean_absolute_error"])
def test_a_regression_learns_with_either_loss(tmp_path: Path, digit_images: dict[str, list[bytes]], loss: str) -> None:
    images = [image for digit in "013" for image in digit_images[digit][:40]]
    path = table(tmp_path, images, "y", *(f"{n},{'013'[n // 40]}" for n in range(120)))
    own = [f"train.loss={loss}", "train.epochs=8", "train.batch_size=16", "model.architecture=mlp"]
    recipe = recipe_of(path, "regression", NUMBER, *own)
    trained = pipeline.train(recipe, runs=tmp_path / "runs", artifacts=tmp_path / "artifacts", report=silent)
    history = [json.loads(line) for line in (trained.run / "history.jsonl").read_text().splitlines()]
    assert min(line["validation_loss"] for line in history) < 0.7 * history[0]["train_loss"]
    assert trained.metrics["test_r2"] > 0.5
    assert "train_accuracy" not in history[0] and "validation_r2" in history[0]
    page = (trained.run / "report.html").read_text(encoding="utf-8")
    assert "residual" in page and "Worst mistakes" in page and "R² over the epochs" in page
    assert (trained.run / "values.png").exists()
    card = (trained.artifact / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Gives an image 1 value: y." in card
