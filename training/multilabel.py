"""Several labels at once: from which probability on each is answered, and how good the answers are.

With TP, FP and FN the samples that have a label and are given it, are given it wrongly, and lack it wrongly:

precision = TP / (TP + FP)   recall = TP / (TP + FN)   F1 = 2 TP / (2 TP + FP + FN), the harmonic mean of the two
macro: the mean over labels that occur or are given   micro: the figure of all labels' TP, FP and FN added up
exact match: the share of samples all of whose labels are right
average precision = sum over cuts n of (R_n - R_n-1) P_n, which asks for no threshold

(van Rijsbergen, "Information Retrieval", 2nd ed. 1979, ch. 7; M. Zhang and Z. Zhou, "A Review on Multi-Label Learning
Algorithms", IEEE TKDE 26 (8), 2014, section 2.3.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]

DEFAULT_THRESHOLD = 0.5
"""Of a label that the validation split cannot tell anything about."""
_LEAST = 5e-9
"""Probabilities are kept so far from 0 and 1 where their logarithm is taken: answers hold eight decimals."""


@dataclass(frozen=True, slots=True)
class LabelMetrics:
    """One row of the per-label table."""

    label: str
    threshold: float
    precision: float
    recall: float
    f1: float
    images: int
    """Samples that have the label."""
    roc_auc: float | None = None
    """Area under the curve of true over false positive rate; None when all samples or none have the label."""
    average_precision: float | None = None
    """None as above."""


def thresholds(true_NK: Flags, p_NK: Numbers) -> tuple[float, ...]:
    """Per label the threshold with the highest F1 on these samples, which must not be of the test split.

    Of all cuts between two probabilities that occur, the one nearest to one half where several are equally good: Y. Yang,
    "A Study of Thresholding Strategies for Text Categorization", SIGIR 2001 (SCut). Of well-calibrated probabilities the
    best cut is half of the F1 that it reaches (Z. Lipton, C. Elkan and B. Naryanaswamy, "Optimal Thresholding of
    Classifiers to Maximize F1 Measure", ECML 2014), so that rare labels get low ones. One half for a label that none of
    the samples has.
    """
    return tuple(_threshold(true_NK[:, k], p_NK[:, k]) for k in range(p_NK.shape[1]))


def _threshold(true_N: Flags, p_N: Numbers) -> float:
    if not true_N.any():
        return DEFAULT_THRESHOLD
    order = np.argsort(-p_N, kind="stable")
    values = p_N[order]
    # After n samples from the top: so many are given the label, `hits` of them rightly.
    hits, given = np.cumsum(true_N[order]), np.arange(1, len(p_N) + 1)
    f1 = 2 * hits / (given + true_N.sum())
    # A cut lies between two different values, or below the last.
    lower = np.append(values[1:], 0.0)
    cuts = (values + lower) / 2
    possible = (lower < values) & (cuts > 0) & (cuts < 1)
    best = possible & (f1 >= f1[possible].max(initial=0.0) - 1e-12)
    if not best.any():
        return DEFAULT_THRESHOLD
    # Anywhere between the two values is the same cut, so that one half itself is taken where it lies there.
    nearest = [_between(float(low), float(high)) for low, high in zip(lower[best], values[best], strict=True)]
    return min(nearest, key=lambda cut: abs(cut - DEFAULT_THRESHOLD))


def _between(low: float, high: float) -> float:
    """One half when it is well within, otherwise the middle: the next samples will not fall on the very edge."""
    margin = 0.25 * (high - low)
    return DEFAULT_THRESHOLD if low + margin <= DEFAULT_THRESHOLD <= high - margin else (low + high) / 2


def given(p_NK: Numbers, cuts: Sequence[float]) -> Flags:
    """Which labels are answered: those whose probability reaches the threshold."""
    flags: Flags = p_NK >= np.asarray(cuts, dtype=np.float64)
    return flags


def measure(
    labels: Sequence[str], cuts: Sequence[float], true_NK: Flags, p_NK: Numbers
) -> tuple[dict[str, float], tuple[LabelMetrics, ...]]:
    """All figures of N answers: flat and named as a run's metrics, and per label."""
    given_NK = given(p_NK, cuts)
    hits_K = (given_NK & true_NK).sum(axis=0)
    rows = tuple(
        LabelMetrics(
            label, float(cuts[k]), *_scores(int(hits_K[k]), int(given_NK[:, k].sum()), int(true_NK[:, k].sum())),
            int(true_NK[:, k].sum()), *areas(true_NK[:, k], p_NK[:, k]),
        )
        for k, label in enumerate(labels)
    )  # fmt: skip
    there = [row for k, row in enumerate(rows) if given_NK[:, k].any() or true_NK[:, k].any()]
    precision, recall, f1 = _scores(int(hits_K.sum()), int(given_NK.sum()), int(true_NK.sum()))
    metrics = {
        "test_exact_match": float((given_NK == true_NK).all(axis=1).mean()),
        "test_loss": _loss(true_NK, p_NK),
        "test_macro_precision": float(np.mean([row.precision for row in there] or [0.0])),
        "test_macro_recall": float(np.mean([row.recall for row in there] or [0.0])),
        "test_macro_f1": float(np.mean([row.f1 for row in there] or [0.0])),
        "test_micro_precision": precision,
        "test_micro_recall": recall,
        "test_micro_f1": f1,
        "test_images": float(len(true_NK)),
        **mean("test_roc_auc", [row.roc_auc for row in rows]),
        **mean("test_average_precision", [row.average_precision for row in rows]),
    }
    return metrics, rows


def _scores(hits: int, given: int, there: int) -> tuple[float, float, float]:
    """Precision, recall and F1; 0 where there is nothing to divide by."""
    return hits / max(given, 1), hits / max(there, 1), 2 * hits / max(given + there, 1)


def _loss(true_NK: Flags, p_NK: Numbers) -> float:
    """Binary cross entropy in nats, the mean over labels and samples."""
    right_NK = np.where(true_NK, p_NK, 1 - p_NK)
    return float(-np.log(np.maximum(right_NK, _LEAST)).mean())


def areas(positive_N: Flags, score_N: NDArray[np.floating]) -> tuple[float | None, float | None]:
    """Under the ROC curve and, as average precision, under that of precision over recall."""
    if positive_N.all() or not positive_N.any():
        return None, None
    return float(roc_auc_score(positive_N, score_N)), float(average_precision_score(positive_N, score_N))


def mean(name: str, figures: Sequence[float | None]) -> dict[str, float]:
    """The mean of those that are known, under that name; nothing when none is."""
    known = [figure for figure in figures if figure is not None]
    return {name: float(np.mean(known))} if known else {}
