"""Magnitude pruning: single weights become zero and stay zero while the others are trained on.

The network keeps its shape, so dense kernels do the same work as before: what it saves is the size of the compressed
file, and time only on hardware that skips zeros (2:4 on GPUs with sparse tensor cores). `marina compress` measures it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

Masks = Mapping[str, Tensor]
"""Per parameter name, bool of its shape: true where the weight stays."""


def global_masks(network: nn.Module, share: float) -> dict[str, Tensor]:
    """Drop the `share` of all weights that is smallest in magnitude, over all layers at once.

    After Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015. Biases and norms
    are left alone.
    """
    weights = _weights(network)
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights.values()])
    drop = int(share * len(magnitudes))
    if drop == 0:
        return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    threshold = magnitudes.kthvalue(drop).values
    return {name: weight.abs() > threshold for name, weight in weights.items()}


def two_of_four_masks(network: nn.Module) -> dict[str, Tensor]:
    """Of every four neighbouring inputs of a weight row the two largest stay: the 2:4 pattern of sparse tensor cores.

    After Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021. Layers whose inputs are no multiple of four
    stay dense.
    """
    return {name: _two_of_four(weight) for name, weight in _weights(network).items() if weight.shape[1] % 4 == 0}


@contextlib.contextmanager
def held(network: nn.Module, masks: Masks) -> Iterator[None]:
    """Zero the masked weights now and after every step of whatever optimiser trains this network meanwhile."""
    parameters = dict(network.named_parameters())

    @torch.no_grad()
    def zero(*_: Any) -> None:
        for name, mask in masks.items():
            parameters[name].mul_(mask.to(parameters[name].device))

    def after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        zero()

    zero()
    handle = register_optimizer_step_post_hook(after_step)
    try:
        yield
    finally:
        handle.remove()


def _weights(network: nn.Module) -> dict[str, Tensor]:
    layers = {path: layer for path, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    return {f"{path}.weight": layer.weight.detach() for path, layer in layers.items()}


def _two_of_four(weight: Tensor) -> Tensor:
    # Inputs last: a GPU multiplies along them, whatever place the kernel's own axes have.
    rows = weight.movedim(1, -1)
    fours = rows.reshape(-1, 4).abs()
    chosen = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.topk(2, dim=1).indices, True)
    return chosen.view(rows.shape).movedim(-1, 1)
