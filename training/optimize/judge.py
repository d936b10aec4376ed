"""Are a rung's answers still the model's? Against golden samples, and against the plain weights on real test images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from handlerlib import imaging
from handlerlib.calibration import soften
from handlerlib.engine_spec import OWN_TOLERANCE, Accuracy, Precision
from handlerlib.engines import Engine
from handlerlib.spec import ModelSpec
from training import paired, pipeline
from training.data import Sample
from training.optimize.openvino_rungs import CALIBRATION_IMAGES
from training.progress import Report, Step, silent

CAPS: dict[Precision, float] = {"bf16": 0.05, "fp16": 0.02, "int8": 0.3}
"""The largest difference of a golden probability that a precision may have, whatever its accuracy; fp32 has the spec's
own tolerance. bf16 keeps 8 bits: a logit of 10 is off by up to 0.04. An int8 probability near one half moves further."""
SPARE = 1.5
"""The tolerance is the largest golden difference seen times this: another processor rounds other sums."""
_LEAST_TOLERANCE = 1e-3
_BATCH = 32


@dataclass(frozen=True, slots=True)
class Data:
    """Real images, decoded as the worker does it."""

    x_test_NCHW: Tensor
    """uint8."""
    targets_N: Tensor
    """int64 class numbers of the test images; of labels float32 `[N, labels]`, 1 for those that are there."""
    x_calibration_NCHW: Tensor
    """uint8, of the training split."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A rung and the plain weights on the same images. Accuracy is the share of right classes, of labels that of images
    all of whose labels are right (exact match)."""

    images: int
    reference_accuracy: float
    accuracy: float
    loss_points: float
    """Percentage points lost."""
    interval: tuple[float, float]
    """95 % confidence interval of `loss_points`."""

    def record(self, budget: float) -> Accuracy:
        """As `engine.json` keeps it."""
        return Accuracy(
            split="test",
            images=self.images,
            reference=round(self.reference_accuracy, 6),
            engine=round(self.accuracy, 6),
            loss_points=round(self.loss_points, 4),
            interval_points=tuple(round(value, 4) for value in self.interval),
            budget_points=budget,
        )


@dataclass(frozen=True, slots=True)
class Golden:
    """What an engine answers to the golden samples, at the spec's temperature."""

    difference: float
    """The largest one of any probability from the plain weights', of a value as part of its scale; NaN counts as 1."""
    spread: float
    """The largest one between a batch's answer and the engine's own to the same sample alone; NaN counts as 1."""
    answers: tuple[tuple[float, ...], ...]
    """Per sample, asked alone, as `EngineSpec.own_answers` keeps them."""


def data(artifact: Path, *, root: Path | None, limit: int, report: Report = silent) -> Data:
    """The artifact's test split (its first `limit` images; 0: all) and training images, as its provenance says.

    Images lie in order of their content's digest, so the first ones are a fair sample. Raises what reading data raises.
    """
    spec = ModelSpec.load(artifact)
    dataset = pipeline.splits(artifact, root=root, report=report)
    rows = dataset.rows["test"][: limit or None]
    test = list(itertools.islice(dataset.samples("test"), len(rows)))
    training = itertools.islice(dataset.samples("train"), CALIBRATION_IMAGES)
    return Data(
        x_test_NCHW=_decoded(test, spec, report),
        targets_N=dataset.targets_N[torch.tensor(rows)],
        x_calibration_NCHW=_decoded(list(training), spec, report),
    )


def answers(engine: Engine, x_NCHW: Tensor, threads: int, report: Report = silent) -> Tensor:
    """What an engine answers to all images, `[N, outputs]`, in batches."""
    rows = []
    for start in range(0, len(x_NCHW), _BATCH):
        rows.append(engine(x_NCHW[start : start + _BATCH], threads))
        report(Step("judge", min(start + _BATCH, len(x_NCHW)), len(x_NCHW), ""))
    return torch.cat(rows)


def golden(engine: Engine, spec: ModelSpec, folder: Path, threads: int) -> Golden:
    """Ask an engine the golden samples in `folder`.

    Each is asked alone, and all together, repeated to a batch of 32: what one size does says little about another.
    """
    samples = spec.golden.samples
    encoded = [(folder / sample.file).read_bytes() for sample in samples]
    x_NCHW = imaging.batch(encoded, spec.preprocess, spec.limits)
    expected_NK, units_K = torch.tensor([sample.outputs for sample in samples]), torch.tensor(spec.units)
    alone_NK = torch.cat([engine(x_NCHW[row : row + 1], threads) for row in range(len(samples))])
    alone_NK = soften(alone_NK, spec.temperature)
    rows = torch.arange(max(_BATCH, len(samples))) % len(samples)
    together_MK = soften(engine(x_NCHW[rows], threads), spec.temperature)
    return Golden(
        difference=max(
            _largest((alone_NK - expected_NK) / units_K), _largest((together_MK - expected_NK[rows]) / units_K)
        ),
        spread=_largest((together_MK - alone_NK[rows]) / units_K),
        answers=tuple(tuple(float(f"{value:.7g}") for value in row) for row in alone_NK.nan_to_num(nan=1.0).tolist()),
    )


def strays(spread: float) -> str:
    """Why an engine of this `Golden.spread` would not pass a worker's self-test; empty when it would."""
    if spread <= OWN_TOLERANCE:
        return ""
    return f"its answer to one image differs by {spread:.2g} between a batch and alone, {OWN_TOLERANCE:g} is allowed"


def tolerance(spec: ModelSpec, precision: Precision, difference: float) -> float | None:
    """With how much difference from the golden probabilities an engine may serve; None when its own is too much."""
    if precision == "fp32":
        return spec.golden.tolerance if difference <= spec.golden.tolerance else None
    if difference > CAPS[precision]:
        return None
    return min(round(max(SPARE * difference, _LEAST_TOLERANCE, spec.golden.tolerance), 6), CAPS[precision])


def right(answers_NK: Tensor, targets_N: Tensor, thresholds: Sequence[float] = ()) -> Tensor:
    """Per image, bool `[N]`: the first class is the true one; with thresholds, all labels are answered as they are."""
    if not thresholds:
        return answers_NK.argmax(dim=1) == targets_N
    return ((answers_NK >= torch.tensor(thresholds)) == targets_N.bool()).all(dim=1)


def compare(
    reference_NK: Tensor, candidate_NK: Tensor, targets_N: Tensor, thresholds: Sequence[float] = ()
) -> Comparison:
    """Accuracy of both on the same images, and what was lost."""
    before, after = (right(answers_NK, targets_N, thresholds) for answers_NK in (reference_NK, candidate_NK))
    difference = paired.lost(before, after)
    return Comparison(
        images=len(targets_N),
        reference_accuracy=float(before.double().mean()),
        accuracy=float(after.double().mean()),
        loss_points=difference.points,
        interval=(difference.low, difference.high),
    )


def _largest(differences: Tensor) -> float:
    return float(differences.abs().nan_to_num(nan=1.0).max())


def _decoded(samples: Sequence[Sample], spec: ModelSpec, report: Report) -> Tensor:
    shape = (spec.preprocess.channels, spec.preprocess.height, spec.preprocess.width)
    x_NCHW = torch.empty((len(samples), *shape), dtype=torch.uint8)

    def decode(sample: Sample) -> Tensor:
        return imaging.load(sample.data, spec.preprocess, spec.limits)

    with ThreadPoolExecutor() as pool:
        for row, x_CHW in enumerate(pool.map(decode, samples)):
            x_NCHW[row] = x_CHW
            report(Step("decode", row + 1, len(samples), ""))
    return x_NCHW
