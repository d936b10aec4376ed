"""How good a network is, judged the way it is served: encoded bytes through `handlerlib.inputs`, network, argmax.

`figures` makes every number of a report out of log-probabilities, wherever they come from: a network in this process
(`evaluate`) or an endpoint that was asked over HTTP.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)
from torch import Tensor, nn

from handlerlib import inputs
from handlerlib.inputs import Inputs
from handlerlib.spec import ModelSpec
from training.calibrate import Bin, at_temperature, expected_error, fit_temperature, reliability
from training.data import Sample
from training.progress import Report, Step

CALIBRATION_SAMPLES = 5000
"""Validation samples that the temperature is fitted on, at most: it is one number."""
_T = TypeVar("_T")


def _no_answers() -> NDArray[np.float32]:
    return np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The network's answer for one test image."""

    name: str
    label: str
    """The true label."""
    predicted: str
    probability: float
    """Softmax of the predicted label."""


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """One row of the per-class table."""

    label: str
    precision: float
    recall: float
    f1: float
    images: int
    roc_auc: float | None = None
    """Area under the curve of true over false positive rate, this class against the rest; None when one side is empty."""
    average_precision: float | None = None
    """Area under the curve of precision over recall as sum (R_n - R_n-1) P_n; None as above."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All figures of one test split."""

    metrics: dict[str, float]
    """Flat: test_accuracy, test_loss (nats), test_macro_precision, test_macro_recall, test_macro_f1, test_images,
    test_ece, where there is more than one class test_roc_auc and test_average_precision (means over classes), and with
    a temperature other than 1 also test_loss_uncalibrated and test_ece_uncalibrated."""
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Row: true label; column: predicted label; both in the order of `labels`."""
    per_class: tuple[ClassMetrics, ...]
    predictions: tuple[Prediction, ...]
    log_NK: NDArray[np.float32] = field(default_factory=_no_answers, compare=False, repr=False)
    """Log-probabilities, a row per prediction."""
    bins: tuple[Bin, ...] = ()
    """The reliability diagram."""
    uncalibrated: tuple[Bin, ...] = ()
    """The same at temperature 1, where the model has another one."""


@dataclass(frozen=True, slots=True)
class ConfusedPair:
    """One kind of mistake."""

    label: str
    """The true label."""
    predicted: str
    count: int
    worst: tuple[Prediction, ...]
    """The surest of these mistakes first."""


def evaluate(
    network: nn.Module, spec: ModelSpec, samples: Iterable[Sample], *, total: int, threads: int, report: Report
) -> Evaluation:
    """Run every sample through the network, on the device where it lies. Raises RequestError for a damaged image."""
    names, true, log_NK = _collect(network, spec, samples, total=total, threads=threads, report=report)
    judged = figures(spec.labels, names, true, at_temperature(log_NK, spec.temperature))
    if spec.temperature == 1.0:
        return judged
    true_N = _numbers(spec.labels, true)
    before = _bins(true_N, log_NK)
    kept = {"test_loss_uncalibrated": _loss(true_N, log_NK), "test_ece_uncalibrated": expected_error(before)}
    return replace(judged, metrics=judged.metrics | kept, uncalibrated=before)


def calibrated(
    network: nn.Module, spec: ModelSpec, samples: Iterable[Sample], *, total: int, threads: int, report: Report
) -> ModelSpec:
    """The spec with the temperature that fits these samples, which must not be of the test split; 1 when they are too
    few (see `fit_temperature`). Raises RequestError for a damaged image."""
    some, total = itertools.islice(samples, CALIBRATION_SAMPLES), min(total, CALIBRATION_SAMPLES)
    _, true, log_NK = _collect(network, spec, some, total=total, threads=threads, report=report)
    found = fit_temperature(log_NK, [spec.labels.index(label) for label in true]) if true else None
    return replace(spec, temperature=1.0 if found is None else found)


def _collect(
    network: nn.Module, spec: ModelSpec, samples: Iterable[Sample], *, total: int, threads: int, report: Report
) -> tuple[list[str], list[str], NDArray[np.float32]]:
    """Names, true labels and log-probabilities at temperature 1, in the samples' order."""
    device = next(network.parameters()).device
    names: list[str] = []
    true: list[str] = []
    rows: list[NDArray[np.float32]] = []
    network.eval()
    reading = inputs.of(spec)
    with ThreadPoolExecutor(threads) as pool:
        for block, batch in _decoded(samples, spec, reading, pool):
            rows.append(_log_probabilities(network, reading.network(batch, device)))
            names += [sample.name for sample in block]
            true += [sample.label for sample in block]
            report(Step("evaluate", len(names), total, ""))
    return names, true, np.concatenate(rows) if rows else _no_answers()


def _decoded(
    samples: Iterable[Sample], spec: ModelSpec, reading: Inputs, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[Sample], Tensor]]:
    """Blocks of samples and their batches, the next one decoded while the caller works on this one."""

    def load(sample: Sample) -> Tensor:
        return reading.load(sample.data)

    ahead: tuple[list[Sample], Iterator[Tensor]] | None = None
    for block in _blocks(samples, batch_size(spec.architecture.height, spec.architecture.width)):
        started = block, pool.map(load, block)
        if ahead is not None:
            yield ahead[0], reading.stack(list(ahead[1]))
        ahead = started
    if ahead is not None:
        yield ahead[0], reading.stack(list(ahead[1]))


def batch_size(height: int, width: int) -> int:
    """Images that are judged at once: few enough that the activations of large ones do not fill the memory."""
    return max(8, min(256, 256 * 64 * 64 // (height * width)))


@torch.no_grad()
def _log_probabilities(network: nn.Module, x_BCHW: Tensor) -> NDArray[np.float32]:
    logits_BK: Tensor = network(x_BCHW)
    # Logarithms keep apart in float32 what probabilities near 1 would not.
    log_BK: NDArray[np.float32] = logits_BK.double().log_softmax(dim=1).float().cpu().numpy()
    return log_BK


def figures(
    labels: Sequence[str], names: Sequence[str], true: Sequence[str], log_NK: NDArray[np.float32]
) -> Evaluation:
    """All figures of N answers: the samples' names and true labels, and log-probabilities in the order of `labels`."""
    true_N, guessed_N = _numbers(labels, true), log_NK.argmax(axis=1)
    every = list(range(len(labels)))
    precision, recall, f1, images = precision_recall_fscore_support(true_N, guessed_N, labels=every, zero_division=0)
    areas = [_areas(true_N == k, log_NK[:, k]) for k in every]
    per_class = tuple(
        ClassMetrics(label, float(precision[k]), float(recall[k]), float(f1[k]), int(images[k]), *areas[k])
        for k, label in enumerate(labels)
    )
    bins = _bins(true_N, log_NK)
    metrics = {
        "test_accuracy": float(np.mean(true_N == guessed_N)),
        "test_loss": _loss(true_N, log_NK),
        "test_macro_precision": float(np.mean(precision)),
        "test_macro_recall": float(np.mean(recall)),
        "test_macro_f1": float(np.mean(f1)),
        "test_images": float(len(true_N)),
        "test_ece": expected_error(bins),
        **_mean("test_roc_auc", [row.roc_auc for row in per_class]),
        **_mean("test_average_precision", [row.average_precision for row in per_class]),
    }
    confusion = confusion_matrix(true_N, guessed_N, labels=every)
    answers = zip(names, true, guessed_N.tolist(), _sure(log_NK).tolist(), strict=True)
    return Evaluation(
        metrics=metrics,
        labels=tuple(labels),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        per_class=per_class,
        predictions=tuple(Prediction(name, label, labels[best], sure) for name, label, best, sure in answers),
        log_NK=log_NK,
        bins=bins,
    )


def confused(evaluation: Evaluation, *, pairs: int, examples: int) -> tuple[ConfusedPair, ...]:
    """The most frequent pairs of true and predicted label, each with its surest mistakes; ties in the labels' order."""
    found: dict[tuple[str, str], list[Prediction]] = {}
    for one in evaluation.predictions:
        if one.label != one.predicted:
            found.setdefault((one.label, one.predicted), []).append(one)
    number = {label: index for index, label in enumerate(evaluation.labels)}
    order = sorted(found, key=lambda pair: (-len(found[pair]), number[pair[0]], number[pair[1]]))
    return tuple(
        ConfusedPair(
            label,
            predicted,
            len(found[label, predicted]),
            tuple(sorted(found[label, predicted], key=lambda one: (-one.probability, one.name))[:examples]),
        )
        for label, predicted in order[:pairs]
    )


def _numbers(labels: Sequence[str], true: Sequence[str]) -> NDArray[np.int64]:
    numbers = {label: number for number, label in enumerate(labels)}
    return np.array([numbers[label] for label in true], dtype=np.int64)


def _loss(true_N: NDArray[np.int64], log_NK: NDArray[np.float32]) -> float:
    """Mean negative log-likelihood of the true labels, in nats."""
    return float(-np.mean(log_NK[np.arange(len(true_N)), true_N], dtype=np.float64))


def _sure(log_NK: NDArray[np.float32]) -> NDArray[np.float64]:
    """The first label's probability."""
    sure_N: NDArray[np.float64] = np.exp(log_NK.max(axis=1).astype(np.float64))
    return sure_N


def _bins(true_N: NDArray[np.int64], log_NK: NDArray[np.float32]) -> tuple[Bin, ...]:
    return reliability(_sure(log_NK).tolist(), (log_NK.argmax(axis=1) == true_N).tolist())


def _areas(positive_N: NDArray[np.bool_], score_N: NDArray[np.float32]) -> tuple[float | None, float | None]:
    """Under the ROC curve and, as average precision, under that of precision over recall."""
    if positive_N.all() or not positive_N.any():
        return None, None
    return float(roc_auc_score(positive_N, score_N)), float(average_precision_score(positive_N, score_N))


def _mean(name: str, areas: Sequence[float | None]) -> dict[str, float]:
    known = [area for area in areas if area is not None]
    return {name: float(np.mean(known))} if known else {}


def _blocks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block
