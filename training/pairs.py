"""Pairs of digits: pictures that have two labels, or a number, to be learned.

Two of the 1,797 real handwritten digits that come with scikit-learn (E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI, 1998) side by side. The pixels are real; that they stand side by side, and so labels and sums,
is made here. Digits are divided into splits before they are paired: no digit of a test pair was seen in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from handlerlib.spec import Task
from training import truth
from training.config import PAIR_TARGETS, Data
from training.sources import Listing, Split, array_entry

LABELS = tuple("0123456789")
_PARTS: tuple[tuple[Split, float], ...] = (("train", 0.7), ("validation", 0.1), ("test", 0.2))
_PARTNERS = 3
"""Pairs that begin with each digit."""
_VALUES: dict[str, Callable[[int, int], int]] = {
    "sum": lambda left, right: left + right,
    "difference": lambda left, right: left - right,
}


def listing(data: Data, task: Task) -> Listing:
    """Some 5,400 pairs, 8 pixels high and 16 wide, with their labels or values."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The originals count 17 grey levels, 0 to 16.
    images_NHW = np.round(digits.images * (255 / 16)).astype(np.uint8)
    targets = data.target_columns or PAIR_TARGETS
    entries = []
    for split, left, right in _pairs(images_NHW):
        pair = int(digits.target[left]), int(digits.target[right])
        if task == "regression":
            known = truth.of_values([_VALUES[name](*pair) for name in targets])
        else:
            known = truth.of_labels({str(digit) for digit in pair}, LABELS)
        name = f"pair-{left:04d}-{right:04d}"
        entries.append(array_entry(name, known, split, np.hstack((images_NHW[left], images_NHW[right]))))
    return Listing(tuple(entries), targets if task == "regression" else LABELS)


def _pairs(images_NHW: NDArray[np.uint8]) -> Iterator[tuple[Split, int, int]]:
    """Split, left and right digit of each pair, the same whatever numpy draws: by the digests of the pixels."""
    drawn = sorted(range(len(images_NHW)), key=lambda row: hashlib.sha256(images_NHW[row].tobytes()).digest())
    start = 0
    for split, share in _PARTS:
        mine = drawn[start : start + round(share * len(drawn))]
        start += len(mine)
        for turn in range(1, _PARTNERS + 1):
            # Steps that grow with the turn give a digit another partner each time.
            step = turn * turn + turn
            yield from ((split, left, mine[(place + step) % len(mine)]) for place, left in enumerate(mine))
