"""What a network gives -> the part of it that is answered -> the JSON that a client reads.

multi-class   the `top_k` most probable classes
multi-label   every label whose probability reaches its threshold, the most probable first, which may be none; with a
              `top_k` of the client's own, so many of the most probable ones, each beside its threshold
regression    the value of every target

Ranking is done once for a whole batch, and every label's part of the JSON is rendered once at start: what is left per
answer is to join a few strings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from handlerlib import drift
from handlerlib.spec import ModelSpec, Scaling

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

    def __init__(self, name: str, version: str, labels: Sequence[str], task: str = "") -> None:
        """`task` is told to clients where it is given."""
        told = f'"task":{_text(task)},' if task else ""
        self._start = f'{{"model":{_text(name)},"version":{_text(version)},{told}"predictions":['
        self._labels = [
            f'{{"label":{_text(label)},"index":{index},"probability":' for index, label in enumerate(labels)
        ]

    def rank(self, rows_BK: Tensor, count: int) -> list[Ranked]:
        """What `document` needs of each row when at most `count` labels are asked for; rows are finite."""
        return rank(rows_BK, count)

    def wanted(self, top_k: int, given: bool) -> int:
        """How many labels `document` is to write, of a request's `top_k` and whether the client said so itself."""
        return top_k

    def first(self, ranked: Ranked) -> tuple[int, float]:
        """Index and probability that stand for this answer where answers are counted (`handlerlib.drift`)."""
        return ranked[0][0], ranked[1][0]

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


class ThresholdRenderer(Renderer):
    """The same of a multi-label model, with `"task"` beside the version and `"threshold"` beside each probability."""

    def __init__(self, name: str, version: str, labels: Sequence[str], thresholds: Sequence[float]) -> None:
        super().__init__(name, version, labels, "multi-label")
        self._thresholds = tuple(thresholds)
        self._ends = [f',"threshold":{threshold!r}}}' for threshold in thresholds]

    def rank(self, rows_BK: Tensor, count: int) -> list[Ranked]:
        """All labels: the least probable one may be above its threshold."""
        return rank(rows_BK, len(self._labels))

    def wanted(self, top_k: int, given: bool) -> int:
        """0: those above their thresholds."""
        return top_k if given else 0

    def _one(self, ranked: Ranked, top_k: int) -> str:
        pairs = list(zip(*ranked, strict=True))
        pairs = pairs[:top_k] if top_k else [(index, p) for index, p in pairs if p >= self._thresholds[index]]
        parts = [f"{self._labels[index]}{round(p, 8)!r}{self._ends[index]}" for index, p in pairs]
        return f"[{','.join(parts)}]"


class ValueRenderer(Renderer):
    """The same of a regression: `{"model", "version", "task", "predictions": [[{"target", "index", "value"}]]}`."""

    def __init__(self, name: str, version: str, targets: Sequence[str], scaling: Sequence[Scaling]) -> None:
        super().__init__(name, version, targets, "regression")
        self._first = scaling[0]
        self._labels = [f'{{"target":{_text(target)},"index":{index},"value":' for index, target in enumerate(targets)]

    def rank(self, rows_BK: Tensor, count: int) -> list[Ranked]:
        """All targets in their own order."""
        every = list(range(len(self._labels)))
        return [(every, row) for row in rows_BK.tolist()]

    def first(self, ranked: Ranked) -> tuple[int, float]:
        """The first target, at its place among the training split's values."""
        return 0, drift.position(ranked[1][0], self._first)

    def _one(self, ranked: Ranked, top_k: int) -> str:
        # Nine digits: what tells every float32 from the next.
        parts = [f"{self._labels[index]}{value:.9g}}}" for index, value in zip(*ranked, strict=True)]
        return f"[{','.join(parts)}]"


def renderer(spec: ModelSpec) -> Renderer:
    """The one for the spec's task."""
    if spec.task == "multi-label":
        return ThresholdRenderer(spec.name, spec.version, spec.labels, spec.thresholds)
    if spec.task == "regression":
        return ValueRenderer(spec.name, spec.version, spec.labels, spec.scaling)
    return Renderer(spec.name, spec.version, spec.labels)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def finite(rows_BK: Tensor) -> list[bool]:
    """Whether each row holds numbers only."""
    # A sum is finite only when all are: probabilities cannot overflow.
    if rows_BK.shape[1] <= _FEW_CLASSES:
        return [math.isfinite(sum(row)) for row in rows_BK.tolist()]
    return [math.isfinite(total) for total in rows_BK.sum(dim=1).tolist()]
