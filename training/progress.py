"""How long work tells its caller where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Step:
    """One report of progress."""

    phase: str
    """`read`, `decode`, `train`, `evaluate` or `export`; `note` for a message alone."""
    done: int
    total: int
    """0 when there is nothing to count."""
    note: str
    """For people; may be empty."""


Report: TypeAlias = Callable[[Step], None]


def silent(step: Step) -> None:
    """A report that nobody reads."""
