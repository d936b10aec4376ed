"""What a form of a model costs and what it answers: accuracy against another form, size, work, latency."""

from __future__ import annotations

import itertools
import statistics
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from handlerlib import inputs
from handlerlib.loading import Engine
from handlerlib.spec import Architecture, ModelSpec
from training import paired
from training.data import Dataset
from training.evaluate import batch_size
from training.progress import Report, Step
from training.sources import Split

_TEXTS = 512
"""Texts that are read and asked at once."""
_BLOCK_SECONDS = 0.25
"""One form's turn in a round of latency measurement; long enough to get over the change of forms."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Accuracy of two forms on the same images, in percent, and what the second loses, in percentage points."""

    before: float
    after: float
    loss: float
    """before - after; negative when the second form is better."""
    low: float
    """Lower end of the 95 % interval of `loss`."""
    high: float
    images: int


@dataclass(frozen=True, slots=True)
class Size:
    """What a form weighs."""

    weights_bytes: int
    """Of the files that the worker loads to run it."""
    compressed_bytes: int
    """The same files deflated (zlib, level 6): what a registry or a download pays."""
    parameters: int
    nonzero: int
    """Parameters that are not 0."""
    multiply_adds: int
    """Of convolutions, matrix products and attention for one image."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds per image, the median of rounds in which all forms took turns."""

    batch: int
    milliseconds: float
    low: float
    """First quartile of the rounds."""
    high: float
    """Third quartile of the rounds."""
    speed_up: float
    """Median over the rounds of the first form's time through this one's."""


@torch.inference_mode()
def correct(engine: Engine, dataset: Dataset, split: Split, *, threads: int, report: Report) -> Tensor:
    """Whether the first label is right, bool `[N]`, for each image of the split in its order."""
    rows = torch.tensor(dataset.rows[split])
    parts = torch.split(rows, batch_size(dataset.preprocess.height, dataset.preprocess.width))
    right: list[Tensor] = []
    for part in parts:
        right.append(engine(dataset.pixels(part), threads).argmax(dim=1) == dataset.targets_N[part])
        report(Step("evaluate", len(right), len(parts), split))
    return torch.cat(right)


@torch.inference_mode()
def correct_texts(
    engine: Engine, spec: ModelSpec, dataset: Dataset, split: Split, *, threads: int, report: Report
) -> Tensor:
    """The same for texts, read from their bytes as a worker reads them: forms differ in the terms that they know."""
    reading = inputs.of(spec)
    total, right = len(dataset.rows[split]), []
    samples = iter(dataset.samples(split))
    while block := list(itertools.islice(samples, _TEXTS)):
        x_BL = reading.stack([reading.load(sample.data) for sample in block])
        targets = torch.tensor([spec.labels.index(sample.label) for sample in block])
        right.append(engine(x_BL, threads).argmax(dim=1) == targets)
        report(Step("evaluate", min(len(right) * _TEXTS, total), total, split))
    return torch.cat(right)


def compare(before: Tensor, after: Tensor) -> Comparison:
    """Two results of `correct` on the same images."""
    difference = paired.lost(before, after)
    return Comparison(
        before=100 * float(before.double().mean()),
        after=100 * float(after.double().mean()),
        loss=difference.points,
        low=difference.low,
        high=difference.high,
        images=len(before),
    )


def size(network: nn.Module, shape: Architecture, files: Sequence[Path]) -> Size:
    """Weigh a network and the files that hold it."""
    contents = [path.read_bytes() for path in files]
    return Size(
        weights_bytes=sum(map(len, contents)),
        compressed_bytes=sum(len(zlib.compress(content, 6)) for content in contents),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        nonzero=sum(int(parameter.count_nonzero()) for parameter in network.parameters()),
        multiply_adds=multiply_adds(network, shape),
    )


def multiply_adds(network: nn.Module, shape: Architecture) -> int:
    """Multiplications with addition for one image, counted by torch while an empty one runs through."""
    device = next(network.parameters()).device
    counter: Any = FlopCounterMode(display=False)
    was_training = network.training
    with torch.no_grad(), counter:
        network.eval()(torch.zeros(1, shape.channels, shape.height, shape.width, device=device))
    network.train(was_training)
    return int(counter.get_total_flops()) // 2


def latency(
    engines: Mapping[str, Engine], batches: Mapping[str, Tensor], *, batch: int, threads: int, rounds: int = 7
) -> dict[str, Latency]:
    """Time all forms in turns, so that what disturbs the machine disturbs all of them; the first is the reference.

    `batches` holds for each form a batch of `batch` inputs, as its engine takes them.
    """
    for name, engine in engines.items():
        for _ in range(3):
            engine(batches[name], threads)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            times[name].append(1000 * _turn(engine, batches[name], threads) / batch)
    reference = next(iter(times.values()))
    return {name: _summary(batch, reference, values) for name, values in times.items()}


def _turn(engine: Engine, x_BCHW: Tensor, threads: int) -> float:
    """Median seconds of a call within one form's turn."""
    seconds: list[float] = []
    end = time.perf_counter() + _BLOCK_SECONDS
    while time.perf_counter() < end or len(seconds) < 5:
        began = time.perf_counter()
        engine(x_BCHW, threads)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _summary(batch: int, reference: Sequence[float], values: Sequence[float]) -> Latency:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    ratio = statistics.median(one / other for one, other in zip(reference, values, strict=True))
    return Latency(batch, middle, low, high, ratio)
