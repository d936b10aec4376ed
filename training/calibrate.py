"""How sure answers are against how often they are right, and the temperature that brings the two together.

C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural Networks", ICML 2017; the targets of the
fit are smoothed as in J. Platt, "Probabilistic Outputs for Support Vector Machines", 1999.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handlerlib.spec import TEMPERATURES

BINS = 15
"""Guo et al.'s number of bins."""
LEAST_SAMPLES = 100
"""With fewer, the temperature says more about which samples they are than about the network."""
_DECIMALS = 4
_HALVINGS = 40


@dataclass(frozen=True, slots=True)
class Bin:
    """The answers whose first label has a probability in (low, high]."""

    low: float
    high: float
    count: int
    confidence: float
    """Their mean probability; 0 when there are none."""
    accuracy: float
    """The share of them that is right; 0 when there are none."""


def reliability(confidence_N: Sequence[float], right_N: Sequence[bool], bins: int = BINS) -> tuple[Bin, ...]:
    """Bins of equal width over (0, 1]: the reliability diagram."""
    confidence, right = np.asarray(confidence_N, dtype=np.float64), np.asarray(right_N, dtype=np.float64)
    numbers = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(numbers, minlength=bins)
    sure = np.bincount(numbers, weights=confidence, minlength=bins) / np.maximum(counts, 1)
    true = np.bincount(numbers, weights=right, minlength=bins) / np.maximum(counts, 1)
    return tuple(
        Bin(number / bins, (number + 1) / bins, int(counts[number]), float(sure[number]), float(true[number]))
        for number in range(bins)
    )


def expected_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error, sum over bins of |accuracy - confidence| * count / N; 0 without answers."""
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / max(total, 1)


def at_temperature(log_NK: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Log-probabilities at temperature 1 -> the same network's at another: log softmax(z / T)."""
    if temperature == 1.0:
        return log_NK
    softened: NDArray[np.float32] = (torch.from_numpy(log_NK) / temperature).log_softmax(dim=1).numpy()
    return softened


def fit_temperature(log_NK: NDArray[np.float32], targets_N: Sequence[int]) -> float | None:
    """The temperature with the least mean negative log-likelihood of the targets, within what a spec may hold.

    `log_NK`: logits or log-probabilities. None for fewer than 100 samples. Of N samples a target counts as
    (N + 1) / (N + 2), the rest goes to the other classes: where every answer is right, the likelihood would otherwise
    only rise as the temperature falls.
    """
    z_NK, y_N = torch.from_numpy(log_NK).double(), torch.as_tensor(targets_N)
    if len(y_N) < LEAST_SAMPLES or z_NK.shape[1] < 2:
        return None
    # Convex in 1/T: its slope has one sign on each side of the minimum.
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(z_NK, y_N, middle) < 0 else (low, middle)
    return round(2 / (low + high), _DECIMALS)


def _slope(z_NK: Tensor, y_N: Tensor, inverse: float) -> float:
    """d/da of the mean negative log-likelihood of softmax(a z): mean(sum_k (p_k - t_k) z_k), t the smoothed targets."""
    count, classes = z_NK.shape
    doubt = 1 / (count + 2)
    said_N = ((inverse * z_NK).softmax(dim=1) * z_NK).sum(dim=1)
    right_N = z_NK.gather(1, y_N[:, None])[:, 0]
    others_N = (z_NK.sum(dim=1) - right_N) / (classes - 1)
    return float((said_N - (1 - doubt) * right_N - doubt * others_N).mean())
