"""Probabilities -> the most probable labels -> the JSON that a client reads.

Ranking is done once for a whole batch, and every label's part of the JSON is rendered once at start: what is left per
answer is to join a few strings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

from torch import Tensor

_FEW_CLASSES = 128
"""Up to here Python sorts a row faster than torch starts its kernels: 0.03 against 0.2 ms for a lone answer of a worker that
was asleep."""
Ranked = tuple[list[int], list[float]]
"""Indices and probabilities of one input's most probable labels, the most probable first."""


def rank(rows_BK: Tensor, count: int) -> list[Ranked]:
    """float32 `[B, classes]`, finite -> the `count` (or all) most probable of each row, ties in index order."""
    classes = rows_BK.shape[1]
    count = min(count, classes)
    if classes <= _FEW_CLASSES:
        return [_ranked_row(row, count) for row in rows_BK.tolist()]
    # One more than asked for shows whether the last place is tied.
    found = rows_BK.topk(min(count + 1, classes), dim=1)
    tied = (found.values[:, 1:] == found.values[:, :-1]).any(dim=1).tolist()
    probabilities, indices = found.values.tolist(), found.indices.tolist()
    for row, is_tied in enumerate(tied):
        if is_tied:  # topk's order among equals is anything
            values, order = rows_BK[row].sort(descending=True, stable=True)
            probabilities[row], indices[row] = values[: count + 1].tolist(), order[: count + 1].tolist()
    return [(ours[:count], theirs[:count]) for ours, theirs in zip(indices, probabilities, strict=True)]


def _ranked_row(row: list[float], count: int) -> Ranked:
    # Sorting downwards keeps equal values in their order too.
    indices = sorted(range(len(row)), key=row.__getitem__, reverse=True)[:count]
    return indices, [row[index] for index in indices]


class Renderer:
    """Writes the answers of one model: `{"model", "version", "predictions": [[{"label", "index", "probability"}]]}`."""

    def __init__(self, name: str, version: str, labels: Sequence[str]) -> None:
        self._start = f'{{"model":{_text(name)},"version":{_text(version)},"predictions":['
        self._labels = [
            f'{{"label":{_text(label)},"index":{index},"probability":' for index, label in enumerate(labels)
        ]

    def document(self, predictions: Iterable[tuple[Ranked, int]]) -> bytes:
        """One request's answer: per input its ranked labels and how many of them are wanted."""
        return f"{self._start}{','.join(self._one(ranked, top_k) for ranked, top_k in predictions)}]}}".encode()

    def _one(self, ranked: Ranked, top_k: int) -> str:
        indices, probabilities = ranked
        labels = self._labels
        # Eight decimals: what float32 holds.
        parts = [
            f"{labels[index]}{round(probability, 8)!r}}}"
            for index, probability in zip(indices[:top_k], probabilities[:top_k], strict=True)
        ]
        return f"[{','.join(parts)}]"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def finite(rows_BK: Tensor) -> list[bool]:
    """Whether each row holds numbers only."""
    # A sum is finite only when all are: probabilities cannot overflow.
    if rows_BK.shape[1] <= _FEW_CLASSES:
        return [math.isfinite(sum(row)) for row in rows_BK.tolist()]
    return [math.isfinite(total) for total in rows_BK.sum(dim=1).tolist()]
