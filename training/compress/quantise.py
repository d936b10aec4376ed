"""Quantisation-aware training: a network learns while its weights and activations are rounded as int8 would round them.

After Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(2018): weights symmetric with one scale per output channel, activations with one range per tensor that follows a moving
average, rounding passed straight through by the gradient. Batch norms need no folding first: they scale whole output
channels, and so does the weights' own scale. What comes out are plain float weights that lie where int8 can hold
them; the int8 form is then built from them as from any others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_WEIGHT_LEVELS = 127
_ACTIVATION_LEVELS = 255
_MOMENTUM = 0.05
_RANGE = "activation_range"
_ORIGINAL = ".parametrizations.weight.original"


class WeightRounding(nn.Module):
    """Weights `[outputs, ...]` -> the nearest of 255 evenly spaced values around 0, per output."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().flatten(1).amax(1).clamp(min=1e-12) / _WEIGHT_LEVELS
        return _rounded(weight, scale.view(-1, *([1] * (weight.ndim - 1))), 0.0)


class ActivationRounding(nn.Module):
    """Activations -> the nearest of 256 values between a low and a high that follow what training sees."""

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("low", "high", "seen"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        if self.training:
            self._follow(values.detach())
        scale = ((self.high - self.low) / _ACTIVATION_LEVELS).clamp(min=1e-12)
        # Zero is one of the values, as padding needs it.
        low = (self.low / scale).round() * scale
        return _rounded(values.clamp(low, low + _ACTIVATION_LEVELS * scale), scale, low).to(x.dtype)

    def _follow(self, values: Tensor) -> None:
        low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
        weight = torch.where(self.seen > 0, _MOMENTUM, 1.0)
        self.low.lerp_(low, weight)
        self.high.lerp_(high, weight)
        self.seen.fill_(1)


def prepare(network: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy of the network that rounds the weights and inputs of every convolution and linear layer.

    `batches` are float inputs as the network takes them; they set the ranges to begin with.
    """
    prepared = copy.deepcopy(network)
    for layer in [layer for layer in prepared.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", WeightRounding())
        layer.add_module(_RANGE, ActivationRounding())
        layer.register_forward_pre_hook(_round_input)
    prepared.eval()
    ranges = [module for module in prepared.modules() if isinstance(module, ActivationRounding)]
    for module in ranges:
        module.train()
    with torch.no_grad():
        for x_BCHW in batches:
            prepared(x_BCHW)
    return prepared


def plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a prepared network as that of the network it was made of."""
    kept = {key: value for key, value in weights.items() if f"{_RANGE}." not in key}
    return {key.replace(_ORIGINAL, ".weight"): value for key, value in kept.items()}


def _round_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.get_submodule(_RANGE)(inputs[0]), *inputs[1:])


def _rounded(x: Tensor, scale: Tensor, low: Tensor | float) -> Tensor:
    """Round to `low + k * scale`; the gradient passes as if nothing had happened (straight-through estimator)."""
    return x + (((x - low) / scale).round() * scale + low - x).detach()
