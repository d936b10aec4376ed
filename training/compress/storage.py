"""Weights in fewer bits on disk: what `handlerlib.stored` reads.

A smaller file that any machine can serve; speed and memory stay what they are, because a worker computes with float32.
Integers are symmetric around 0 with one scale per row (the input weights of one output, the numbers of one term), as in
Guan et al., "Post-Training 4-bit Quantization on Embedding Tables", 2019; where rows are shorter than 32 numbers, with
one per column, because a scale for each row would take the space that was won.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from handlerlib.stored import SCALE, SHAPE

Bits = Literal[16, 8, 4]

_LEAST_SCALED_ROW = 32
_LEAST_VECTOR = 1024
"""Shorter vectors (biases, statistics of norms) stay float32: they weigh nothing, and the answers hang on them."""
_LEAST_BITS = 4


def narrow(weights: Mapping[str, Tensor], bits: Bits) -> dict[str, Tensor]:
    """A float state dict -> the tensors of its file. With 8 or 4 bits, long vectors become float16."""
    narrowed: dict[str, Tensor] = {}
    for name, value in weights.items():
        kept = value.detach().cpu()
        if not kept.is_floating_point() or (kept.ndim < 2 and kept.numel() < _LEAST_VECTOR):
            narrowed[name] = kept.float() if kept.is_floating_point() else kept
        elif bits == 16 or kept.ndim < 2:
            # What numbers far below the largest one lose is small beside what that one is rounded by.
            narrowed[name] = _half(kept, kept.abs().max()[None] if kept.any() else kept[:0])
        else:
            narrowed |= _integers(name, kept.float(), bits)
    return {name: value.contiguous().clone() for name, value in narrowed.items()}


def dump(weights: Mapping[str, Tensor], bits: Bits) -> bytes:
    """The content of `weights.safetensors`."""
    return safetensors.torch.save(narrow(weights, bits))


def _half(value: Tensor, decisive: Tensor) -> Tensor:
    """float16 where the numbers that its precision hangs on are in the range of that, float32 elsewhere."""
    held = torch.finfo(torch.float16)
    fits = decisive.numel() == 0 or (float(decisive.min()) >= held.tiny and float(decisive.max()) <= held.max)
    return value.half() if fits else value.float()


def _integers(name: str, value: Tensor, bits: Literal[8, 4]) -> dict[str, Tensor]:
    most = 2 ** (bits - 1) - 1
    rows = value.flatten(1)
    per_row = rows.shape[1] >= _LEAST_SCALED_ROW
    scale = rows.abs().amax(1 if per_row else 0) / most
    scale = torch.where(scale > 0, scale, 1.0)
    # Rounded to the scale as it is kept.
    scale = _half(scale, scale) if per_row else scale
    shape = (len(value), *[1] * (value.ndim - 1)) if per_row else (1, *value.shape[1:])
    scale = scale.view(shape)
    integers = (value / scale.float()).round().clamp(-most, most).to(torch.int8)
    if bits == _LEAST_BITS:
        return {name: _pairs(integers), name + SCALE: scale, name + SHAPE: torch.tensor(value.shape)}
    return {name: integers, name + SCALE: scale}


def _pairs(integers: Tensor) -> Tensor:
    """4-bit integers, two per byte."""
    offset = (integers.flatten() + 8).to(torch.uint8)
    if len(offset) % 2:
        offset = torch.cat([offset, offset.new_full((1,), 8)])
    return offset[0::2] | (offset[1::2] << 4)
