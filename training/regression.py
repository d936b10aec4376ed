"""How good answers with values are. With y the true values, f the answers and m the mean of the true ones:

MAE  = mean |y - f|, in the target's unit
RMSE = (mean (y - f)^2)^(1/2), in the same unit; large errors count more
R^2  = 1 - sum (y - f)^2 / sum (y - m)^2, the coefficient of determination: 1 is right throughout, 0 no better than
       always answering the mean (N. Draper and H. Smith, "Applied Regression Analysis", 3rd ed. 1998, 1.3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from handlerlib.spec import Scaling

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TargetMetrics:
    """One row of the per-target table."""

    label: str
    """The target's name."""
    mae: float
    rmse: float
    r2: float | None
    """None when the true value is the same in all samples."""
    images: int


def measure(
    targets: Sequence[str], scaling: Sequence[Scaling], true_NK: Numbers, values_NK: Numbers
) -> tuple[dict[str, float], tuple[TargetMetrics, ...]]:
    """All figures of N answers: flat and named as a run's metrics, and per target.

    test_mae and test_rmse are means over targets, in their own units; test_loss is the mean squared error of
    standardised values, in which all targets count alike. Of several targets, `test_mae/NAME` is that of one.
    """
    error_NK = values_NK - true_NK
    rows = tuple(
        TargetMetrics(
            name,
            float(np.abs(error_NK[:, k]).mean()),
            float(np.sqrt(np.square(error_NK[:, k]).mean())),
            _r2(true_NK[:, k], error_NK[:, k]),
            len(true_NK),
        )
        for k, name in enumerate(targets)
    )
    known = [row.r2 for row in rows if row.r2 is not None]
    metrics = {
        "test_mae": float(np.mean([row.mae for row in rows])),
        "test_rmse": float(np.mean([row.rmse for row in rows])),
        **({"test_r2": float(np.mean(known))} if known else {}),
        "test_loss": float(np.square(error_NK / np.array([one.scale for one in scaling])).mean()),
        "test_images": float(len(true_NK)),
    }
    if len(rows) > 1:
        metrics |= {f"test_mae/{row.label}": row.mae for row in rows}
    return metrics, rows


def _r2(true_N: Numbers, error_N: Numbers) -> float | None:
    if true_N.min() == true_N.max():  # rounding would leave a little of a spread
        return None
    spread = float(np.square(true_N - true_N.mean()).sum())
    return 1 - float(np.square(error_N).sum()) / spread
