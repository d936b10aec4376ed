"""The pictures of a run for few and for many classes: large enough, drawn, not blank."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import plots
from training.evaluate import Evaluation


def evaluation(classes: int, label: str = "label {}") -> Evaluation:
    counts = np.full((classes, classes), 1) + 40 * np.eye(classes, dtype=int)
    confusion = tuple(tuple(int(count) for count in row) for row in counts)
    return Evaluation({}, tuple(label.format(number) for number in range(classes)), confusion, (), ())


def pixels(path: Path) -> np.ndarray:
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        return np.asarray(image.convert("L"))


@pytest.mark.parametrize("classes", [2, 10, 40, 300])
def test_confusion_matrix_of_any_number_of_classes(classes: int, tmp_path: Path) -> None:
    plots.confusion(evaluation(classes), tmp_path / "c.png", title="title")
    image = pixels(tmp_path / "c.png")
    assert 400 <= image.shape[0] <= 2400
    assert int(image.min()) < 100
    assert int(image.max()) == 255


def test_labels_of_any_script_and_length_are_drawn(tmp_path: Path) -> None:
    """`$...$` would be a formula, a broken one here, and warnings are errors."""
    plots.confusion(evaluation(3, "$\\bad{{ {} $ 猫" + "w" * 60), tmp_path / "c.png", title="a $\\b_{$")
    assert int(pixels(tmp_path / "c.png").min()) < 100


@pytest.mark.parametrize("epochs", [1, 25])
def test_curves_of_any_number_of_epochs(epochs: int, tmp_path: Path) -> None:
    line = {"train_loss": 1.0, "train_accuracy": 0.5, "validation_loss": 2.0, "validation_accuracy": 0.4}
    plots.curves([{"epoch": n + 1.0, **line} for n in range(epochs)], 1, tmp_path / "c.png", title="title")
    assert int(pixels(tmp_path / "c.png").min()) < 100


def test_the_same_picture_twice_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plots.confusion(evaluation(4), tmp_path / f"{name}.png", title="title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
