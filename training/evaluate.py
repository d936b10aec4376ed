"""How good a network is, judged the way it is served: encoded bytes through `handlerlib.imaging`, network, argmax."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor, nn

from handlerlib import imaging
from handlerlib.spec import ModelSpec
from training.data import Sample
from training.progress import Report, Step

_T = TypeVar("_T")


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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All figures of one test split."""

    metrics: dict[str, float]
    """Flat: test_accuracy, test_loss (nats), test_macro_precision, test_macro_recall, test_macro_f1, test_images."""
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Row: true label; column: predicted label; both in the order of `labels`."""
    per_class: tuple[ClassMetrics, ...]
    predictions: tuple[Prediction, ...]


def evaluate(
    network: nn.Module, spec: ModelSpec, samples: Iterable[Sample], *, total: int, threads: int, report: Report
) -> Evaluation:
    """Run every sample through the network, on the device where it lies. Raises RequestError for a damaged image."""
    device = next(network.parameters()).device
    predictions: list[Prediction] = []
    losses: list[float] = []
    network.eval()
    with ThreadPoolExecutor(threads) as pool:
        for block, x_BCHW in _decoded(samples, spec, pool):
            log_BK = _log_probabilities(network, imaging.normalise(x_BCHW.to(device), spec.preprocess))
            for sample, log_K in zip(block, log_BK, strict=True):
                best = int(log_K.argmax())
                losses.append(-float(log_K[spec.labels.index(sample.label)]))
                predictions.append(Prediction(sample.name, sample.label, spec.labels[best], float(log_K[best].exp())))
            report(Step("evaluate", len(predictions), total, ""))
    return _figures(spec.labels, predictions, float(np.mean(losses)))


def _decoded(
    samples: Iterable[Sample], spec: ModelSpec, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[Sample], Tensor]]:
    """Blocks of samples and their pixels, the next one decoded while the caller works on this one."""

    def load(sample: Sample) -> Tensor:
        return imaging.load(sample.data, spec.preprocess, spec.limits)

    ahead: tuple[list[Sample], Iterator[Tensor]] | None = None
    for block in _blocks(samples, batch_size(spec.preprocess.height, spec.preprocess.width)):
        started = block, pool.map(load, block)
        if ahead is not None:
            yield ahead[0], imaging.stack(list(ahead[1]))
        ahead = started
    if ahead is not None:
        yield ahead[0], imaging.stack(list(ahead[1]))


def batch_size(height: int, width: int) -> int:
    """Images that are judged at once: few enough that the activations of large ones do not fill the memory."""
    return max(8, min(256, 256 * 64 * 64 // (height * width)))


@torch.no_grad()
def _log_probabilities(network: nn.Module, x_BCHW: Tensor) -> Tensor:
    logits_BK: Tensor = network(x_BCHW)
    return logits_BK.double().log_softmax(dim=1).cpu()


def _figures(labels: Sequence[str], predictions: Sequence[Prediction], loss: float) -> Evaluation:
    numbers = {label: number for number, label in enumerate(labels)}
    true = [numbers[one.label] for one in predictions]
    guessed = [numbers[one.predicted] for one in predictions]
    every = list(range(len(labels)))
    precision, recall, f1, images = precision_recall_fscore_support(true, guessed, labels=every, zero_division=0)
    metrics = {
        "test_accuracy": float(np.mean(np.equal(true, guessed))),
        "test_loss": loss,
        "test_macro_precision": float(np.mean(precision)),
        "test_macro_recall": float(np.mean(recall)),
        "test_macro_f1": float(np.mean(f1)),
        "test_images": float(len(predictions)),
    }
    per_class = (
        ClassMetrics(label, float(precision[k]), float(recall[k]), float(f1[k]), int(images[k]))
        for k, label in enumerate(labels)
    )
    confusion = confusion_matrix(true, guessed, labels=every)
    return Evaluation(
        metrics=metrics,
        labels=tuple(labels),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        per_class=tuple(per_class),
        predictions=tuple(predictions),
    )


def _blocks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block
