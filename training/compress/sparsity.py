"""Magnitude pruning: single weights become zero and stay zero while the others are trained on.

The network keeps its shape and every engine here multiplies with the zeros too: what it saves is the size of the
compressed file. The 2:4 pattern of sparse tensor cores is not made, because no engine here computes with them: what torch
has for it are linear layers, not convolutions.
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
