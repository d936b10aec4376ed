"""Labelled samples that a model is asked, and what a served model's answers are worth beside its artifact's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from handlerlib.engine_spec import EngineSpec
from handlerlib.spec import ModelSpec, Task
from training import paired
from training.config import Data
from training.data import Sample
from training.errors import DataError
from training.evaluate import Evaluation
from training.sources import Entry, listing

_LEAST = 5e-9
"""Answers hold eight decimals: a probability that they show as 0 counts as half of the last one."""
_ROUNDING = 1e-8


@dataclass(frozen=True, slots=True)
class Questions:
    """Samples whose labels are known."""

    what: str
    """`test split`, or the folder they come from."""
    total: int
    read: Callable[[], Iterator[Sample]]
    """All of them, in the same order each time."""
    labels: tuple[str, ...]
    """Those that occur."""
    leave_out: bool = False
    """Whether samples that cannot be read are passed over by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A served model's answers beside those of its artifact's plain weights, to the same samples."""

    samples: int
    changed: int
    """Samples with another first label, or other labels; with a value that differs by more than is allowed."""
    largest: float
    """The largest difference of a probability; of a value, in units of its target's scale."""
    lost_points: float
    """Accuracy that the endpoint loses, in percentage points; negative when it gains. Of labels it is the share of exact
    matches, of values hundredths of R²."""
    lost_interval: tuple[float, float] | None
    """Its 95 % interval (paired proportions); None of values."""
    allowed: str
    """What may differ, as a sentence's part."""
    differs: bool
    """More than that."""
    task: Task = "multi-class"

    @property
    def said(self) -> str:
        """All of it as a sentence's part."""
        what, of, lost = _SAID[self.task]
        return (
            f"{self.changed} of {self.samples} {what} differ, the largest difference of a {of} is"
            f" {self.largest:.2g}, {self.lost_points:+.3f} {lost} are lost"
        )


_SAID: dict[Task, tuple[str, str, str]] = {
    "multi-class": ("first labels", "probability", "points of accuracy"),
    "multi-label": ("sets of labels", "probability", "points of exact matches"),
    "regression": ("answers", "value (in the target's deviations)", "hundredths of R²"),
}


def labelled_folder(folder: Path) -> Questions:
    """`folder/<class>/**`, or the same below `folder/test/`. Raises DataError when there is nothing of the kind."""
    entries = listing(Data(source="folder", root=str(folder))).entries
    if any(entry.given is not None for entry in entries):
        entries = tuple(entry for entry in entries if entry.given == "test")
    if not entries:
        raise DataError(
            f"{folder} holds no labelled files", remedy="put the files of each class into a folder of its name"
        )

    return of_entries(str(folder), entries, {entry.label for entry in entries})


def of_entries(what: str, entries: Sequence[Entry], labels: Iterable[str]) -> Questions:
    """Files or rows that a person put together: one that is no sample of the model's kind is left out."""

    def read() -> Iterator[Sample]:
        for entry in entries:
            try:
                data = entry.read()
            except OSError as error:
                raise DataError(
                    f"{entry.name} cannot be read: {error.strerror or error}", remedy="check the file"
                ) from error
            yield Sample(entry.name, entry.label, data)

    return Questions(what, len(entries), read, tuple(sorted(labels)), leave_out=True)


def check_labels(questions: Questions, labels: Sequence[str], model: str) -> None:
    """Raises DataError when a class of the questions is none of the model's."""
    unknown = sorted(set(questions.labels) - set(labels))
    if unknown:
        known = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
        raise DataError(
            f"{questions.what} holds the class '{unknown[0]}', which {model} does not know",
            remedy=f"name the class folders as the model's labels: {known}",
        )


def log_rows(answers: Sequence[Mapping[int, float]], classes: int) -> tuple[NDArray[np.float32], bool]:
    """Probabilities by class number, as answers hold them -> log-probabilities `[N, classes]`, and whether all were there.

    Classes that an answer does not name share what is left of it.
    """
    p_NK = np.zeros((len(answers), classes), dtype=np.float64)
    complete = True
    for row, answer in enumerate(answers):
        absent = classes - len(answer)
        if absent > 0:
            complete = False
            p_NK[row] = max(0.0, 1.0 - sum(answer.values())) / absent
        p_NK[row, list(answer)] = list(answer.values())
    log_NK: NDArray[np.float32] = np.log(np.maximum(p_NK, _LEAST)).astype(np.float32)
    return log_NK, complete


def output_rows(answers: Sequence[Mapping[int, float]], outputs: int) -> tuple[NDArray[np.float64], bool]:
    """Probabilities of labels, or values, by their number -> `[N, outputs]`, and whether all were there; 0 for those that
    an answer does not name."""
    rows_NK = np.zeros((len(answers), outputs))
    for row, answer in enumerate(answers):
        rows_NK[row, list(answer)] = list(answer.values())
    return rows_NK, all(len(answer) == outputs for answer in answers)


def compare(
    reference: Evaluation, served: Evaluation, spec: ModelSpec, engine: EngineSpec | None, *, complete: bool = True
) -> Comparison:
    """Both hold the same samples in the same order.

    Where the artifact brings an engine of lower precision, accuracy decides: more is lost than the engine was allowed,
    with 95 % certainty. Otherwise every probability does, with the tolerance of the golden samples; where the answers
    are not complete, those of the first labels.
    """
    names, theirs = [one.name for one in reference.predictions], [one.name for one in served.predictions]
    assert names == theirs, "compare() needs the same samples in the same order"
    pairs = list(zip(reference.predictions, served.predictions, strict=True))
    if spec.task != "multi-class":
        return _compare_outputs(reference, served, spec, engine, complete=complete)
    if complete:
        largest = float(np.abs(np.exp(reference.log_NK) - np.exp(served.log_NK)).max(initial=0.0))
    else:
        largest = max((abs(one.probability - other.probability) for one, other in pairs), default=0.0)
    right = [torch.tensor([one.predicted == one.label for one in side.predictions]) for side in (reference, served)]
    lost = paired.lost(*right)
    tolerance = _tolerance(spec, engine)
    # Written so that a NaN differs too.
    differs, allowed = not largest <= tolerance + _ROUNDING, f"{tolerance:g} in any probability"
    if engine is not None and _is_lossy(engine):
        differs, allowed = _beyond_budget(lost, engine, "accuracy")
    return Comparison(
        samples=len(pairs),
        changed=sum(one.predicted != other.predicted for one, other in pairs),
        largest=largest,
        lost_points=lost.points,
        lost_interval=(lost.low, lost.high),
        allowed=allowed,
        differs=differs,
    )


def _tolerance(spec: ModelSpec, engine: EngineSpec | None) -> float:
    return max(spec.golden.tolerance, engine.tolerance if engine else 0.0)


def _is_lossy(engine: EngineSpec) -> bool:
    return engine.precision != "fp32" and engine.accuracy is not None


def _beyond_budget(lost: paired.Lost, engine: EngineSpec, of: str) -> tuple[bool, str]:
    assert engine.accuracy is not None
    budget = engine.accuracy.budget_points
    return lost.low > budget, f"{budget:g} points of {of}, for the engine {engine.rung}"


def _compare_outputs(
    reference: Evaluation, served: Evaluation, spec: ModelSpec, engine: EngineSpec | None, *, complete: bool
) -> Comparison:
    """The same of labels, whose accuracy is the share of exact matches, and of values; where the answers are not
    complete, those that were named decide."""
    off_NK = np.abs(reference.outputs_NK - served.outputs_NK) / np.asarray(spec.units)
    if not complete:
        off_NK = np.where(served.outputs_NK != 0, off_NK, 0.0)
    largest = float(off_NK.max(initial=0.0))
    tolerance = _tolerance(spec, engine)
    # Written so that a NaN differs too.
    differs = not largest <= tolerance + _ROUNDING
    interval: tuple[float, float] | None = None
    if spec.task == "regression":
        changed = int((off_NK > tolerance + _ROUNDING).any(axis=1).sum())
        points = 100 * (reference.metrics.get("test_r2", 0.0) - served.metrics.get("test_r2", 0.0))
        allowed = f"{tolerance:g} of a target's deviation in any value"
    else:
        pairs = zip(reference.predictions, served.predictions, strict=True)
        changed = sum(one.predicted != other.predicted for one, other in pairs)
        lost = paired.lost(
            *(torch.tensor([one.predicted == one.label for one in side.predictions]) for side in (reference, served))
        )
        points, interval = lost.points, (lost.low, lost.high)
        allowed = f"{tolerance:g} in any probability"
        if engine is not None and _is_lossy(engine):
            differs, allowed = _beyond_budget(lost, engine, "exact matches")
    return Comparison(
        samples=len(reference.predictions),
        changed=changed,
        largest=largest,
        lost_points=points,
        lost_interval=interval,
        allowed=allowed,
        differs=differs,
        task=spec.task,
    )
