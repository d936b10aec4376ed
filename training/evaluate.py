"""How good a network is, judged the way it is served: encoded bytes through `handlerlib.inputs`, network, argmax.

`figures` makes every number of a report out of log-probabilities, wherever they come from: a network in this process
(`evaluate`) or an endpoint that was asked over HTTP.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor, nn

from handlerlib import inputs
from handlerlib.errors import RequestError
from handlerlib.inputs import Inputs
from handlerlib.spec import ModelSpec, Task
from handlerlib.tasks import finish
from training import multilabel, regression, truth
from training.calibrate import Bin, at_temperature, expected_error, fit_temperature, reliability
from training.data import Sample
from training.errors import DataError
from training.multilabel import LabelMetrics, areas, mean
from training.progress import Report, Step
from training.regression import TargetMetrics
from training.sources import Skipped

CALIBRATION_SAMPLES = 5000
"""Validation samples that the temperature is fitted on, at most: it is one number."""
_REMEDY = "mend the sample or take it away; limits of size are the model's own, in [serve] of its recipe"
_T = TypeVar("_T")


def _no_answers() -> NDArray[np.float32]:
    return np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The network's answer for one test image."""

    name: str
    label: str
    """The true label; of labels and values, their text of `training.truth`."""
    predicted: str
    """The same of the answer."""
    probability: float
    """Softmax of the predicted label; of several labels, the highest of all. 0 of values."""


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
    a temperature other than 1 also test_loss_uncalibrated and test_ece_uncalibrated. Macro figures are means over classes
    that occur or are answered. Those of other tasks are given in
    `training.multilabel` and `training.regression`."""
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
    task: Task = "multi-class"
    per_label: tuple[LabelMetrics, ...] = ()
    """Of a multi-label model, in place of `confusion`, `per_class`, `log_NK` and bins."""
    per_target: tuple[TargetMetrics, ...] = ()
    """Of a regression, in place of the same."""
    outputs_NK: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)), compare=False, repr=False)
    """Of both: probabilities of all labels, or values, a row per prediction."""
    true_NK: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)), compare=False, repr=False)
    """Of both: 1 where a sample has a label, or the true values."""
    left_out: tuple[Skipped, ...] = ()
    """Samples that could not be read: no figure counts them."""

    @property
    def summary(self) -> str:
        """The one figure for a title."""
        if self.task == "regression":
            return f"R² {self.metrics.get('test_r2', 0.0):.4f}"
        if self.task == "multi-label":
            return f"macro F1 {self.metrics['test_macro_f1']:.4f}"
        return f"{self.metrics['test_accuracy']:.2%}"

    @property
    def rows(self) -> Sequence[ClassMetrics | LabelMetrics | TargetMetrics]:
        """The table of classes, labels or targets."""
        return self.per_label or self.per_target or self.per_class


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
    network: nn.Module,
    spec: ModelSpec,
    samples: Iterable[Sample],
    *,
    total: int,
    threads: int,
    report: Report,
    leave_out: bool = False,
) -> Evaluation:
    """Run every sample through the network, on the device where it lies.

    Raises DataError for a sample that cannot be read; with `leave_out`, when none of them can.
    """
    left_out: list[Skipped] | None = [] if leave_out else None
    judged = _judged(network, spec, samples, total=total, threads=threads, report=report, left_out=left_out)
    return replace(judged, left_out=tuple(left_out or ()))


def _judged(
    network: nn.Module,
    spec: ModelSpec,
    samples: Iterable[Sample],
    *,
    total: int,
    threads: int,
    report: Report,
    left_out: list[Skipped] | None,
) -> Evaluation:
    """As `evaluate`; what cannot be read ends up in `left_out`."""
    how = {"total": total, "threads": threads}
    if spec.task != "multi-class":
        return answers(spec, *_answered(network, spec, samples, **how, report=report, left_out=left_out))
    names, true, log_NK = _collect(network, spec, samples, **how, report=report, left_out=left_out)
    judged = figures(spec.labels, names, true, at_temperature(log_NK, spec.temperature))
    if spec.temperature == 1.0:
        return judged
    true_N = _numbers(spec.labels, true)
    before = _bins(true_N, log_NK)
    kept = {"test_loss_uncalibrated": _loss(true_N, log_NK), "test_ece_uncalibrated": expected_error(before)}
    return replace(judged, metrics=judged.metrics | kept, uncalibrated=before)


def answers(spec: ModelSpec, names: Sequence[str], true: Sequence[str], outputs_NK: NDArray[np.float64]) -> Evaluation:
    """All figures of N answers of a model for labels or values, as a worker gives them; `true` are texts of
    `training.truth`."""
    true_NK = truth.rows(true, spec.labels, spec.task).numpy()
    per_label: tuple[LabelMetrics, ...] = ()
    per_target: tuple[TargetMetrics, ...] = ()
    if spec.task == "regression":
        metrics, per_target = regression.measure(spec.labels, spec.scaling, true_NK, outputs_NK)
        said = [truth.of_values(row) for row in outputs_NK.tolist()]
        sure = [0.0] * len(names)
    else:
        metrics, per_label = multilabel.measure(spec.labels, spec.thresholds, true_NK > 0.5, outputs_NK)
        given = multilabel.given(outputs_NK, spec.thresholds)
        said = [truth.of_labels(set(np.array(spec.labels)[row].tolist()), spec.labels) for row in given]
        sure = outputs_NK.max(axis=1, initial=0.0).tolist()
    return Evaluation(
        metrics=metrics,
        labels=spec.labels,
        confusion=(),
        per_class=(),
        predictions=tuple(
            Prediction(name, label, predicted, probability)
            for name, label, predicted, probability in zip(names, true, said, sure, strict=True)
        ),
        task=spec.task,
        per_label=per_label,
        per_target=per_target,
        outputs_NK=outputs_NK,
        true_NK=true_NK,
    )


def with_thresholds(
    network: nn.Module, spec: ModelSpec, samples: Iterable[Sample], *, total: int, threads: int, report: Report
) -> ModelSpec:
    """The spec of a multi-label model with the thresholds that fit these samples, which must not be of the test split.
    Raises DataError for a damaged image."""
    _, true, p_NK = _answered(network, spec, samples, total=total, threads=threads, report=report)
    true_NK = truth.rows(true, spec.labels, spec.task).numpy()
    return replace(spec, thresholds=multilabel.thresholds(true_NK > 0.5, p_NK))


def calibrated(
    network: nn.Module, spec: ModelSpec, samples: Iterable[Sample], *, total: int, threads: int, report: Report
) -> ModelSpec:
    """The spec with the temperature that fits these samples, which must not be of the test split; 1 when they are too
    few (see `fit_temperature`). Raises DataError for a damaged image."""
    some, total = itertools.islice(samples, CALIBRATION_SAMPLES), min(total, CALIBRATION_SAMPLES)
    _, true, log_NK = _collect(network, spec, some, total=total, threads=threads, report=report)
    found = fit_temperature(log_NK, [spec.labels.index(label) for label in true]) if true else None
    return replace(spec, temperature=1.0 if found is None else found)


def _answered(
    network: nn.Module,
    spec: ModelSpec,
    samples: Iterable[Sample],
    *,
    total: int,
    threads: int,
    report: Report,
    left_out: list[Skipped] | None = None,
) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Names, true labels or values and what a worker would answer, in the samples' order."""
    last = finish(spec)

    @torch.no_grad()
    def run(x_BCHW: Tensor) -> NDArray[np.float32]:
        found: NDArray[np.float32] = last(network(x_BCHW).float()).cpu().numpy()
        return found

    names, true, rows_NK = _run(
        network, spec, samples, run, total=total, threads=threads, report=report, left_out=left_out
    )
    return names, true, rows_NK.astype(np.float64).reshape(len(names), len(spec.labels))


def _collect(
    network: nn.Module,
    spec: ModelSpec,
    samples: Iterable[Sample],
    *,
    total: int,
    threads: int,
    report: Report,
    left_out: list[Skipped] | None = None,
) -> tuple[list[str], list[str], NDArray[np.float32]]:
    """Names, true labels and log-probabilities at temperature 1, in the samples' order."""

    def run(x_BCHW: Tensor) -> NDArray[np.float32]:
        return _log_probabilities(network, x_BCHW)

    return _run(network, spec, samples, run, total=total, threads=threads, report=report, left_out=left_out)


def _run(
    network: nn.Module,
    spec: ModelSpec,
    samples: Iterable[Sample],
    run: Callable[[Tensor], NDArray[np.float32]],
    *,
    total: int,
    threads: int,
    report: Report,
    left_out: list[Skipped] | None,
) -> tuple[list[str], list[str], NDArray[np.float32]]:
    """Names, true labels, and what `run` gives for each batch as the network takes it.

    Samples that cannot be read are added to `left_out`; where that is None, they are a DataError.
    """
    device = next(network.parameters()).device
    names: list[str] = []
    true: list[str] = []
    rows: list[NDArray[np.float32]] = []
    network.eval()
    reading = inputs.of(spec)
    with ThreadPoolExecutor(threads) as pool:
        for block, batch in _decoded(samples, spec, reading, pool, left_out):
            rows.append(run(reading.network(batch, device)))
            names += [sample.name for sample in block]
            true += [sample.label for sample in block]
            report(Step("evaluate", len(names) + len(left_out or ()), total, ""))
    if left_out and not names:
        raise DataError(
            f"none of {len(left_out)} samples can be read; {left_out[0].name}: {left_out[0].reason}", remedy=_REMEDY
        )
    return names, true, np.concatenate(rows) if rows else _no_answers()


def _decoded(
    samples: Iterable[Sample],
    spec: ModelSpec,
    reading: Inputs,
    pool: ThreadPoolExecutor,
    left_out: list[Skipped] | None,
) -> Iterator[tuple[list[Sample], Tensor]]:
    """Blocks of samples and their batches, the next one decoded while the caller works on this one."""

    def load(sample: Sample) -> Tensor | Skipped:
        try:
            return reading.load(sample.data)
        except RequestError as error:
            return Skipped(sample.name, str(error))

    ahead: Iterator[tuple[Sample, Tensor | Skipped]] | None = None
    for block in itertools.chain(_blocks(samples, batch_size(spec.architecture.height, spec.architecture.width)), [[]]):
        started = zip(block, pool.map(load, block), strict=True)
        kept: list[Sample] = []
        items: list[Tensor] = []
        for sample, loaded in ahead or ():
            if not isinstance(loaded, Skipped):
                kept.append(sample)
                items.append(loaded)
            elif left_out is None:
                raise DataError(f"{loaded.name}: {loaded.reason}", remedy=_REMEDY)
            else:
                left_out.append(loaded)
        if kept:
            yield kept, reading.stack(items)
        ahead = started


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
    there = np.union1d(true_N, guessed_N)
    precision, recall, f1, images = precision_recall_fscore_support(true_N, guessed_N, labels=every, zero_division=0)
    under = [areas(true_N == k, log_NK[:, k]) for k in every]
    per_class = tuple(
        ClassMetrics(label, float(precision[k]), float(recall[k]), float(f1[k]), int(images[k]), *under[k])
        for k, label in enumerate(labels)
    )
    bins = _bins(true_N, log_NK)
    metrics = {
        "test_accuracy": float(np.mean(true_N == guessed_N)),
        "test_loss": _loss(true_N, log_NK),
        "test_macro_precision": float(np.mean(precision[there])),
        "test_macro_recall": float(np.mean(recall[there])),
        "test_macro_f1": float(np.mean(f1[there])),
        "test_images": float(len(true_N)),
        "test_ece": expected_error(bins),
        **mean("test_roc_auc", [row.roc_auc for row in per_class]),
        **mean("test_average_precision", [row.average_precision for row in per_class]),
    }
    confusion = confusion_matrix(true_N, guessed_N, labels=every)
    found = zip(names, true, guessed_N.tolist(), _sure(log_NK).tolist(), strict=True)
    return Evaluation(
        metrics=metrics,
        labels=tuple(labels),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        per_class=per_class,
        predictions=tuple(Prediction(name, label, labels[best], sure) for name, label, best, sure in found),
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


def _blocks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block
