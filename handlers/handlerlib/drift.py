"""What a model answers, counted in few bins: once over the test split as the baseline, then over live requests.

Two distributions are kept: the probability of each answer's first label (`confidence`) and that label itself (`class`).
Of a multi-label model the first label is the most probable one, above its threshold or not; of a regression it is the
first target, with `position` in the place of the probability.
Monitoring compares live with baseline by the population stability index; where they part, the requests have changed or
the model no longer fits them.
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from handlerlib.spec import Baseline, Scaling

Distribution = Literal["confidence", "class"]

# Finer towards 1, where a trained model's answers are: with equal bins nearly all of them would share the last one.
CONFIDENCE_EDGES = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
MOST_BINS = 100
"""Of the distribution over classes; the rarest beyond it share the bin `other`."""
OTHER = "other"
# TorchServe's metrics line is split at `|`, `,` and `:`, and an empty value is dropped.
_SAFE_LABEL = re.compile(r"[A-Za-z0-9_ /+.-]+")


def measure(answers: Iterable[tuple[int, float]], classes: int) -> Baseline:
    """The baseline of a model with `classes` classes: (index, probability) of the first label of each test image."""
    confidence = [0] * (len(CONFIDENCE_EDGES) + 1)
    predicted = [0] * classes
    for index, probability in answers:
        confidence[bisect_right(CONFIDENCE_EDGES, probability)] += 1
        predicted[index] += 1
    return Baseline(confidence_edges=CONFIDENCE_EDGES, confidence=tuple(confidence), classes=tuple(predicted))


def position(value: float, scaling: Scaling) -> float:
    """Where a regression's value lies among those of training, in (0, 1): Phi((value - mean) / scale), the normal
    distribution function. It takes the place of the probability, so that values are counted in the same bins."""
    z = (value - scaling.mean) / scaling.scale
    return 0.5 * math.erfc(-z / math.sqrt(2))


@dataclass(frozen=True, slots=True)
class Bins:
    """The names of all bins of one model and which of them an answer falls into."""

    edges: tuple[float, ...]
    confidence: tuple[str, ...]
    """One name per bin, e.g. `0.9-0.95`."""
    classes: tuple[str, ...]
    """Per output index; classes that share a bin share its name."""

    @classmethod
    def of(cls, labels: Sequence[str], baseline: Baseline | None) -> Bins:
        """The baseline's own bins; the usual ones for a model that has none."""
        edges = baseline.confidence_edges if baseline is not None else CONFIDENCE_EDGES
        limits = ("0", *(f"{edge:g}" for edge in edges), "1")
        confidence = tuple(f"{low}-{high}" for low, high in itertools.pairwise(limits))
        counts = baseline.classes if baseline is not None else (0,) * len(labels)
        return cls(edges, confidence, _class_bins(labels, counts))

    def names(self) -> Mapping[Distribution, tuple[str, ...]]:
        """Each distribution with its distinct bins in order."""
        return {"confidence": self.confidence, "class": tuple(dict.fromkeys(self.classes))}

    def of_answer(self, index: int, probability: float) -> tuple[str, str]:
        """Index and probability of an answer's first label -> its bins of `confidence` and of `class`."""
        return self.confidence[bisect_right(self.edges, probability)], self.classes[index]

    def expected(self, baseline: Baseline) -> dict[tuple[Distribution, str], int]:
        """Test images per bin."""
        found: dict[tuple[Distribution, str], int] = {
            ("confidence", name): count for name, count in zip(self.confidence, baseline.confidence, strict=True)
        }
        for name, count in zip(self.classes, baseline.classes, strict=True):
            found["class", name] = found.get(("class", name), 0) + count
        return found


def _class_bins(labels: Sequence[str], counts: Sequence[int]) -> tuple[str, ...]:
    names = [label if _SAFE_LABEL.fullmatch(label) else f"#{index}" for index, label in enumerate(labels)]
    if len(labels) <= MOST_BINS:
        return tuple(names)
    frequent = set(sorted(range(len(labels)), key=lambda index: (-counts[index], index))[: MOST_BINS - 1])
    return tuple(name if index in frequent else OTHER for index, name in enumerate(names))
