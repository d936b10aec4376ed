"""How an epoch is judged on the validation split, by task: the figures from which the best epoch is chosen.

Every process of a group judges its part of the split; the figures are those of all parts together.
"""

from __future__ import annotations

from typing import Protocol

import torch
from sklearn.metrics import f1_score
from torch import Tensor
from torch.nn import functional as F

from handlerlib.spec import Task
from training.config import Train
from training.distributed import Group


class Figures(Protocol):
    """Adds up batches of logits `[B, K]` beside their targets."""

    def add(self, logits_BK: Tensor, targets: Tensor) -> None:
        """Targets as `Dataset.targets_N` holds them, on the same device."""

    def record(self, group: Group) -> dict[str, float]:
        """`validation_loss` and the task's other figures."""


def figures(task: Task, train: Train, outputs: int) -> Figures:
    """Of no batch so far."""
    if task == "regression":
        return _Values(train, outputs)
    return _Labels(outputs) if task == "multi-label" else _Classes()


def right(task: Task, logits_BK: Tensor, targets: Tensor) -> int:
    """How many answers of a batch are right: the class, or all labels at a threshold of one half; none of values."""
    if task == "regression":
        return 0
    if task == "multi-label":
        return int(((logits_BK > 0) == (targets > 0.5)).all(dim=1).sum())
    return int((logits_BK.argmax(dim=1) == targets).sum())


class _Classes:
    """Cross entropy, accuracy and macro F1."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._predicted: list[int] = []
        self._true: list[int] = []

    def add(self, logits_BK: Tensor, targets: Tensor) -> None:
        self._loss += float(F.cross_entropy(logits_BK, targets, reduction="sum"))
        self._predicted += logits_BK.argmax(dim=1).tolist()
        self._true += targets.tolist()

    def record(self, group: Group) -> dict[str, float]:
        (loss,) = group.totals(self._loss)
        predicted, true = group.collect(self._predicted), group.collect(self._true)
        right = sum(guess == truth for guess, truth in zip(predicted, true, strict=True))
        return {
            "validation_loss": loss / len(true),
            "validation_accuracy": right / len(true),
            "validation_macro_f1": float(f1_score(true, predicted, average="macro", zero_division=0)),
        }


class _Labels:
    """Binary cross entropy, the share of exact matches, and macro F1 = mean of 2 TP / (2 TP + FP + FN) over labels
    that are there or guessed; labels at a threshold of one half."""

    def __init__(self, outputs: int) -> None:
        self._loss = self._exact = self._rows = 0.0
        self._hits = torch.zeros(outputs, dtype=torch.float64)
        self._total = torch.zeros(outputs, dtype=torch.float64)

    def add(self, logits_BK: Tensor, targets: Tensor) -> None:
        guessed, true = logits_BK > 0, targets > 0.5
        self._loss += float(F.binary_cross_entropy_with_logits(logits_BK, targets, reduction="none").mean(1).sum())
        self._exact += right("multi-label", logits_BK, targets)
        self._rows += len(targets)
        self._hits += (guessed & true).sum(0).double().cpu()
        self._total += (guessed.sum(0) + true.sum(0)).double().cpu()

    def record(self, group: Group) -> dict[str, float]:
        loss, exact, rows = group.totals(self._loss, self._exact, self._rows)
        hits, total = (_over_all(group, counts) for counts in (self._hits, self._total))
        return {
            "validation_loss": loss / rows,
            "validation_accuracy": exact / rows,
            "validation_macro_f1": float((2 * hits / total.clamp(min=1)).sum() / (total > 0).sum().clamp(min=1)),
        }


class _Values:
    """The loss of standardised values and R^2 = 1 - sum (y - f)^2 / sum (y - mean y)^2, the mean over targets; a target
    that is the same throughout the split counts as 0."""

    def __init__(self, train: Train, outputs: int) -> None:
        self._absolute = train.loss == "mean_absolute_error"
        self._rows = 0.0
        self._absolutes = torch.zeros(outputs, dtype=torch.float64)
        self._squares = torch.zeros(outputs, dtype=torch.float64)
        self._sum = torch.zeros(outputs, dtype=torch.float64)
        self._sum_of_squares = torch.zeros(outputs, dtype=torch.float64)

    def add(self, logits_BK: Tensor, targets: Tensor) -> None:
        error, true = (logits_BK - targets).double().cpu(), targets.double().cpu()
        self._rows += len(true)
        self._absolutes += error.abs().sum(0)
        self._squares += error.square().sum(0)
        self._sum += true.sum(0)
        self._sum_of_squares += true.square().sum(0)

    def record(self, group: Group) -> dict[str, float]:
        (rows,) = group.totals(self._rows)
        absolutes, squares, sums, of_squares = (
            _over_all(group, one) for one in (self._absolutes, self._squares, self._sum, self._sum_of_squares)
        )
        spread = of_squares - sums.square() / rows
        r2 = torch.where(spread > 1e-9 * rows, 1 - squares / spread.clamp(min=1e-9), 0.0)
        loss = (absolutes if self._absolute else squares) / rows
        return {"validation_loss": float(loss.mean()), "validation_r2": float(r2.mean())}


def _over_all(group: Group, values_K: Tensor) -> Tensor:
    """One number per output, summed over the processes."""
    return torch.tensor(group.totals(*values_K.tolist()), dtype=torch.float64)
