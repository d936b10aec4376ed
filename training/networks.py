"""The network before its first step."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from handlerlib import architectures, imaging
from handlerlib.errors import SpecError
from handlerlib.spec import Architecture
from training import text_start
from training.config import Model, Recipe
from training.data import Dataset
from training.errors import RecipeError
from training.progress import Report, Step
from training.seeds import derive

_WHITENED = 2000
"""Images that whitening looks at."""
_WHITE_FLOOR = 5e-4
"""Added to each variance, so that directions without any are not blown up."""


def architecture(dataset: Dataset, recipe: Recipe) -> Architecture:
    """The recipe's network for this data's channels, size and classes, or for its terms."""
    if dataset.text is not None:
        return text_start.architecture(dataset, dataset.text, recipe.model)
    shape = dataset.preprocess
    return Architecture(
        name=recipe.model.architecture,
        channels=shape.channels,
        height=shape.height,
        width=shape.width,
        classes=len(dataset.classes),
        dropout=recipe.model.dropout,
        views=recipe.model.views,
    )


def start_network(shape: Architecture, model: Model, seed: int, *, report: Report) -> nn.Module:
    """A network with seeded random weights, or torchvision's where wanted. Raises RecipeError when it cannot be had."""
    torch.manual_seed(derive(seed, "weights"))
    try:
        network = architectures.build(shape)
    except SpecError as error:
        raise RecipeError(str(error), remedy="change model.architecture, data.image_size or model.dropout") from error
    if model.pretrained:
        taken, total = _take_pretrained(network, shape.name)
        report(Step("train", 0, 0, f"{taken} of {total} tensors start from torchvision's pretrained {shape.name}"))
    return network


def start(dataset: Dataset, recipe: Recipe, *, report: Report) -> nn.Module:
    """The recipe's network before its first step. Raises RecipeError when it cannot be had."""
    network = start_network(architecture(dataset, recipe), recipe.model, recipe.seed, report=report)
    if recipe.model.whiten:
        whiten(network, dataset)
    if dataset.text is not None:
        text_start.prepare(network, dataset, recipe.model)
    return network


@torch.no_grad()
def whiten(network: nn.Module, dataset: Dataset) -> None:
    """Make the first convolution's outputs uncorrelated and of deviation 1 over the training images' patches.

    Its weights become the eigenvectors of the patches' covariance, each divided by the root of its eigenvalue, and
    their negatives (K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, section 3.2). Raises
    RecipeError when the convolution does not have twice as many channels as a patch has values.
    """
    name, layer = next((pair for pair in network.named_modules() if isinstance(pair[1], nn.Conv2d)), ("", None))
    values = layer.in_channels * math.prod(layer.kernel_size) if layer is not None else 0
    if layer is None or layer.groups > 1 or layer.out_channels != 2 * values:
        shape = f"'{name}' has {layer.out_channels}, not {2 * values}" if layer is not None else "there is none"
        raise RecipeError(
            f"model.whiten wants a first convolution with two channels for each value of a patch, {shape}",
            remedy="--set model.architecture=airbench or --set model.whiten=false",
        )
    rows = torch.tensor(dataset.rows["train"][:_WHITENED])
    x_BCHW = imaging.normalise(dataset.pixels(rows), dataset.preprocess).double()
    patches_PV = F.unfold(x_BCHW, layer.kernel_size).transpose(1, 2).reshape(-1, values)
    patches_PV -= patches_PV.mean(dim=0)
    variances_V, directions_VV = torch.linalg.eigh(patches_PV.T @ patches_PV / len(patches_PV))
    scaled_VV = directions_VV.T / (variances_V + _WHITE_FLOOR).sqrt().unsqueeze(1)
    layer.weight.copy_(torch.cat([scaled_VV, -scaled_VV]).view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.zero_()


def _take_pretrained(network: nn.Module, name: str) -> tuple[int, int]:
    """Copy torchvision's DEFAULT weights where name and shape match; how many of how many tensors."""
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError) as error:
        raise RecipeError(
            f"there are no pretrained weights for '{name}'", remedy="--set model.pretrained=false"
        ) from error
    try:
        given = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise RecipeError(
            f"the pretrained weights of '{name}' cannot be fetched from {weights.url}: {error}",
            remedy="connect to the internet, or --set model.pretrained=false",
        ) from error
    own = network.state_dict()
    fitting = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
    network.load_state_dict(fitting, strict=False)
    return len(fitting), len(own)
