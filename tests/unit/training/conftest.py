"""Small real data sets: the handwritten digits of scikit-learn, written out as class folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from training.config import Recipe, load_recipe
from training.sources import png

WriteTree = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def digit_images() -> dict[str, list[bytes]]:
    """PNG files of real digits by label, about 180 of each."""
    digits = load_digits()
    images: dict[str, list[bytes]] = {str(label): [] for label in range(10)}
    for pixels, label in zip(digits.images, digits.target, strict=True):
        images[str(label)].append(png(np.round(pixels * 255 / 16).astype(np.uint8)))
    return images


@pytest.fixture
def tree(tmp_path: Path, digit_images: dict[str, list[bytes]]) -> WriteTree:
    """`tree("photos", zero=10, one=12)` writes that many images of 0, 1, ... into class folders of these names."""

    def write(folder: str = "photos", skip: int = 0, **classes: int) -> Path:
        for digit, (label, count) in enumerate(classes.items()):
            (tmp_path / folder / label).mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(digit_images[str(digit)][skip : skip + count]):
                (tmp_path / folder / label / f"img{number + skip}.png").write_bytes(image)
        return tmp_path / folder

    return write


@pytest.fixture
def folder_recipe() -> MakeRecipe:
    """A recipe for class folders that trains in a second."""

    def make(root: Path, *overrides: str) -> Recipe:
        base = (
            "name=small",
            f"data.root={root}",
            "model.architecture=tiny_cnn",
            "train.epochs=2",
            "train.batch_size=16",
            "train.threads=1",
            "train.device=cpu",
            "augment.flip=false",
        )
        return load_recipe("folder", [*base, *overrides])

    return make
