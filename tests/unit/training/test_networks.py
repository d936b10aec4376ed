"""The network before its first step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from handlerlib import imaging
from training import data, networks
from training.config import Recipe, changed, load_recipe
from training.data import Dataset
from training.errors import RecipeError
from training.progress import silent
from training.train import fit, reproducible


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Windows of a photograph that comes with scikit-learn, in two classes."""
    from sklearn.datasets import load_sample_image

    root = tmp_path_factory.mktemp("photos")
    photo = np.asarray(load_sample_image("china.jpg"))
    for number in range(60):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        top, left = 6 * number, 9 * number
        Image.fromarray(photo[top : top + 32, left : left + 32]).save(path)
    return load_recipe(
        "cifar10", [f"data.root={root}", "data.source=folder", "train.device=cpu", "data.validation=0.1"]
    )


@pytest.fixture(scope="module")
def dataset(recipe: Recipe) -> Dataset:
    return data.prepare(data.survey(recipe, threads=1, report=silent), recipe, threads=1, report=silent)


def test_whitened_patches_are_uncorrelated_and_of_one_deviation(dataset: Dataset, recipe: Recipe) -> None:
    network = networks.start(dataset, recipe, report=silent)
    layer = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    x_BCHW = imaging.normalise(dataset.pixels(torch.tensor(dataset.rows["train"])), dataset.preprocess)
    with torch.no_grad():
        out_VP = F.conv2d(x_BCHW, layer.weight).transpose(0, 1).flatten(1).double()
    half = len(out_VP) // 2
    torch.testing.assert_close(out_VP[:half], -out_VP[half:])
    covariance_VV = torch.cov(out_VP[:half], correction=0)
    # Directions with hardly any variance stay below one: their variance has the floor added to it.
    assert bool((covariance_VV.diagonal() < 1.001).all())
    assert int((covariance_VV.diagonal() > 0.9).sum()) >= 6
    assert float((covariance_VV - covariance_VV.diagonal().diag()).abs().max()) < 1e-3


def test_without_whitening_the_start_is_random(dataset: Dataset, recipe: Recipe) -> None:
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"whiten": False})})
    one, other = (networks.start(dataset, which, report=silent).state_dict() for which in (recipe, plain))
    assert not torch.equal(one["0.weight"], other["0.weight"])
    assert all(torch.equal(one[key], other[key]) for key in one if not key.startswith("0."))


@pytest.mark.parametrize(("name", "found"), [("resnet9", "has 64, not 54"), ("mlp", "there is none")])
def test_a_network_without_room_for_whitening(name: str, found: str, dataset: Dataset, recipe: Recipe) -> None:
    model = recipe.model.model_copy(update={"architecture": name, "views": 1})
    with pytest.raises(RecipeError, match=found) as caught:
        networks.start(dataset, recipe.model_copy(update={"model": model}), report=silent)
    assert "model.whiten=false" in caught.value.remedy


def test_the_recipe_moves_all_weights_but_the_whitening_and_the_scales_of_norms(
    dataset: Dataset, recipe: Recipe, tmp_path: Path
) -> None:
    short = changed(recipe, {"train.stages": [{"image_size": 24}, {}], "train.epochs": 2}, where="test")
    with reproducible(1):
        start = networks.start(dataset, short, report=silent).state_dict()
        fitted = fit(dataset, short, tmp_path, report=silent)
    same = {key for key, value in fitted.weights.items() if torch.equal(value, start[key])}
    scales = {f"{group}.{place}.weight" for group in (2, 3, 4) for place in (2, 5)}
    assert same == {"0.weight", "0.bias"} | scales
    assert all(np.isfinite(line["train_loss"]) for line in fitted.history)
