"""The learning rate at every position of a training.

Each schedule is a function of the position and, for `plateau`, of the epochs judged so far, so there is nothing to save
and resuming gives the same rates. With rate r, position p in updates of n, and e epochs done (fractions count):

    constant      r
    linear        r * (1 - p / n)
    step          r * decay^floor(e / decay_epochs)
    inverse_time  r / (1 + decay * e)                                   Robbins & Monro, 1951
    exponential   r * decay^e
    cosine        r * (1 + cos(pi * p / n)) / 2                         Loshchilov & Hutter, 2017, without restarts
    one_cycle     r / 25 up to r over 30 % of the updates, then down to r / 250,000, both along a cosine
                                                                        Smith & Topin, 2018; fast.ai's form
    plateau       r * decay^k, k the number of times that `monitor` did not improve for more than decay_epochs epochs

A warm-up of w updates comes first: r(0) * (p + 1) / (w + 1), Goyal et al., 2017; the schedule then has the rest, p, n, e
and the epochs of `plateau` counted from the end of the warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from training.config import Schedule, Train

DECAY: dict[Schedule, tuple[float, int]] = {
    "step": (0.1, 10),
    "inverse_time": (1.0, 1),
    "exponential": (0.9, 1),
    "plateau": (0.1, 3),
}
"""`train.decay` and `train.decay_epochs` of the schedules that have them, when the recipe leaves them out."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a schedule stands. Updates of the optimiser count from 0 to `total` - 1."""

    update: int
    total: int
    epochs: float
    """Epochs done since the schedule began."""
    judged: Sequence[float] = ()
    """For `plateau`: what the epochs so far were worth on validation; more is better."""


def learning_rate(train: Train, position: Position, *, warmup: int = 0, schedule: Schedule | None = None) -> float:
    """The rate of one update. `warmup` are the updates of `train.warmup`, 0 where the schedule has none; `schedule` takes
    the place of the recipe's."""
    name = schedule or train.schedule
    if position.update < warmup:
        start = Position(0, max(1, position.total - warmup), 0.0)
        return _RATES[name](train, start) * (position.update + 1) / (warmup + 1)
    if not warmup:
        return _RATES[name](train, position)
    rest = Position(
        position.update - warmup,
        max(1, position.total - warmup),
        max(0.0, position.epochs - train.warmup),
        position.judged[math.floor(train.warmup) :],
    )
    return _RATES[name](train, rest)


def _constant(train: Train, position: Position) -> float:
    return train.learning_rate


def _linear(train: Train, position: Position) -> float:
    return train.learning_rate * (1 - position.update / position.total)


def _step(train: Train, position: Position) -> float:
    decay, epochs = _decay(train, "step")
    # Fractions of epochs are sums of steps: a hair below the whole number is the whole number.
    return float(train.learning_rate * decay ** math.floor(position.epochs / epochs + 1e-9))


def _inverse_time(train: Train, position: Position) -> float:
    return train.learning_rate / (1 + _decay(train, "inverse_time")[0] * position.epochs)


def _exponential(train: Train, position: Position) -> float:
    return float(train.learning_rate * _decay(train, "exponential")[0] ** position.epochs)


def _cosine(train: Train, position: Position) -> float:
    return train.learning_rate * _half_cosine(position.update / position.total)


def _one_cycle(train: Train, position: Position) -> float:
    peak, start = train.learning_rate, train.learning_rate / 25
    rise = 0.3 * position.total
    if position.update < rise:
        return peak + (start - peak) * _half_cosine(position.update / rise)
    end = start / 10_000
    return end + (peak - end) * _half_cosine((position.update - rise) / max(position.total - 1 - rise, 1))


def _plateau(train: Train, position: Position) -> float:
    decay, patience = _decay(train, "plateau")
    best, waited, reductions = -math.inf, 0, 0
    for value in position.judged:
        waited = 0 if value > best else waited + 1
        best = max(best, value)
        if waited > patience:
            reductions, waited = reductions + 1, 0
    return float(train.learning_rate * decay**reductions)


def _decay(train: Train, schedule: Schedule) -> tuple[float, int]:
    decay, epochs = DECAY[schedule]
    return train.decay or decay, train.decay_epochs or epochs


def _half_cosine(position: float) -> float:
    """1 at 0, falling to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * min(position, 1.0)))


_RATES = {
    "constant": _constant,
    "linear": _linear,
    "step": _step,
    "inverse_time": _inverse_time,
    "exponential": _exponential,
    "cosine": _cosine,
    "one_cycle": _one_cycle,
    "plateau": _plateau,
}
if set(_RATES) != set(get_args(Schedule)):
    raise AssertionError("every schedule of a recipe has its rate here")
