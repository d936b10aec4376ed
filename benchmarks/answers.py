"""Whether two programs that are compared compute the same: every photo's answer, before any clock runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Answer = Mapping[str, float]
"""Label -> probability of the most probable labels; the whole list of labels need not be there."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One system's answers against the expected ones."""

    photos: int
    refused: int
    """Photos that got no answer; stock TorchServe refuses grey ones."""
    same_label: int
    """Photos whose first label is the expected one, or as probable as that within the tolerance."""
    worst: float
    """Largest difference of any probability."""
    tolerance: float
    allowed_refusals: int

    @property
    def equal(self) -> bool:
        """Written so that a NaN is no equality."""
        answered = self.photos - self.refused
        return (
            answered > 0
            and self.refused <= self.allowed_refusals
            and self.same_label == answered
            and self.worst <= self.tolerance
        )


def compare(
    expected: Sequence[Answer], got: Sequence[Answer | None], tolerance: float, allowed_refusals: int = 0
) -> Verdict:
    """`got` None is a photo without an answer. Labels that only one of the two lists count where the list is complete."""
    same, worst = 0, 0.0
    for wanted, found in zip(expected, got, strict=True):
        if found is None:
            continue
        if not found:
            worst = 1.0
            continue
        worst = max(worst, _difference(wanted, found))
        first, best = max(found, key=found.__getitem__), max(wanted, key=wanted.__getitem__)
        same += first == best or wanted.get(best, 0.0) - wanted.get(first, 0.0) <= 2 * tolerance
    refused = sum(found is None for found in got)
    return Verdict(len(expected), refused, same, worst, tolerance, allowed_refusals)


def _difference(wanted: Answer, found: Answer) -> float:
    """A label that is missing on one side is at most as probable there as that side's least probable one."""
    floor_wanted, floor_found = min(wanted.values()), min(found.values())
    worst = 0.0
    for label in {*wanted, *found}:
        if label in wanted and label in found:
            difference = abs(wanted[label] - found[label])
        elif label in wanted:
            difference = max(0.0, wanted[label] - floor_found)
        else:
            difference = max(0.0, found[label] - floor_wanted)
        # A NaN is as wrong as can be; max() would drop it.
        worst = max(worst, 1.0 if math.isnan(difference) else difference)
    return worst
