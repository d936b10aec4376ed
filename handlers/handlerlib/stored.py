"""Weights that take fewer bits in their file than in memory, where they are float32 on every machine.

What is read is what an engine-less worker, evaluation and export all compute with, so their answers are the same bits.
`weights.safetensors` holds, per tensor NAME:

    float16, bfloat16         widened
    int8 and `NAME:scale`     multiplied by the scale
    uint8 and `NAME:shape`    two 4-bit integers per byte, offset by 8, the first in the lower half; and `NAME:scale`

A scale is float, with as many axes as the tensor and length 1 along those over which it is the same. Everything else is
taken as it is. `training.compress.storage` writes these files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from handlerlib.errors import SpecError

SCALE = ":scale"
SHAPE = ":shape"
_HALF = (torch.float16, torch.bfloat16)
_OFFSET = 8
_MOST_AXES = 8
_AGAIN = "export and pack the model again"


def widen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file holds -> a state dict. Raises SpecError for a scale or shape that does not belong to its tensor."""
    for name in tensors:
        whole = name.removesuffix(SCALE).removesuffix(SHAPE)
        if whole not in tensors:
            raise SpecError(f"the weights hold '{name}' but no '{whole}'", remedy=_AGAIN)
    names = [name for name in tensors if not name.endswith((SCALE, SHAPE))]
    return {name: _widened(name, tensors) for name in names}


def _widened(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    value, scale, shape = tensors[name], tensors.get(name + SCALE), tensors.get(name + SHAPE)
    if scale is None and shape is None:
        return value.float() if value.dtype in _HALF else value
    if shape is not None:
        value = _unpacked(name, value, shape)
    elif value.dtype != torch.int8:
        raise SpecError(f"the weights '{name}' have a scale and are {value.dtype}, not int8", remedy=_AGAIN)
    fits = scale is not None and scale.is_floating_point() and scale.ndim == value.ndim
    if scale is None or not fits or any(a not in (1, b) for a, b in zip(scale.shape, value.shape, strict=True)):
        found = "none" if scale is None else f"{scale.dtype} {tuple(scale.shape)}"
        raise SpecError(
            f"the scale of the weights '{name}' {tuple(value.shape)} does not fit: {found}",
            remedy=_AGAIN,
        )
    return value.float() * scale.float()


def _unpacked(name: str, value: Tensor, shape: Tensor) -> Tensor:
    fits = shape.dtype == torch.int64 and shape.ndim == 1 and 1 <= shape.numel() <= _MOST_AXES
    sizes = [int(one) for one in shape.tolist()] if fits else []
    if not fits or value.dtype != torch.uint8 or min(sizes) < 1 or value.numel() != -(-math.prod(sizes) // 2):
        raise SpecError(
            f"the weights '{name}' do not hold the 4-bit integers of a tensor {tuple(sizes)}",
            remedy=_AGAIN,
        )
    pairs = torch.stack((value.flatten() & 15, value.flatten() >> 4), dim=1)
    return (pairs.flatten()[: math.prod(sizes)].to(torch.int8) - _OFFSET).view(sizes)
