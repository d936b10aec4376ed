"""Two models judged on the same images: what the second loses, with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

_Z_95 = 1.959964


@dataclass(frozen=True, slots=True)
class Lost:
    """Accuracy lost, in percentage points; negative when the second model is better."""

    points: float
    low: float
    """Lower end of the 95 % interval."""
    high: float


def lost(before_N: Tensor, after_N: Tensor) -> Lost:
    """From whether each model is right, bool `[N]` of the same images in the same order.

    The interval is that of a paired difference with half a count added to each of the four cells (Agresti and Min,
    "Simple improved confidence intervals for comparing matched proportions", Statistics in Medicine 24, 2005), so that it
    is not empty when the two never differ.
    """
    images = len(before_N)
    lost, won = int((before_N & ~after_N).sum()), int((after_N & ~before_N).sum())
    n, b, c = images + 2.0, lost + 0.5, won + 0.5
    middle, error = (b - c) / n, math.sqrt((b + c) - (b - c) ** 2 / n) / n
    return Lost(
        points=100 * (lost - won) / images,
        low=100 * max(middle - _Z_95 * error, -1.0),
        high=100 * min(middle + _Z_95 * error, 1.0),
    )
