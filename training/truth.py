"""What is known of a sample where it is no single class: a set of labels, or the values of named targets.

It travels as one text, a JSON list, wherever a class would be a label: `["3", "7"]`, or `[12.0, -2.0]` in the order of
the targets. Digests, duplicates and conflicting copies are then found as they are found for classes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from handlerlib.spec import Scaling, Task
from training.config import Recipe
from training.errors import DataError
from training.sources import Split

_LEAST_SCALE, _LARGEST = 1e-30, 1e30
"""Well within float32, in which a network computes and a worker answers."""


def of_labels(labels: Collection[str], classes: Sequence[str]) -> str:
    """Some labels of `classes` -> the text that stands for them, the same in whatever order they come."""
    return json.dumps([label for label in classes if label in labels], ensure_ascii=False)


def of_values(values: Sequence[float]) -> str:
    """One number per target -> the text that stands for them."""
    return json.dumps([float(value) for value in values])


def parts(text: str) -> list[str]:
    """The labels of a text of `of_labels`."""
    return [str(label) for label in json.loads(text)]


def rows(texts: Sequence[str], classes: Sequence[str], task: Task) -> Tensor:
    """Texts -> float64 `[N, K]`: 1 where a sample has a label and 0 where not, or the targets' values."""
    if task == "regression":
        return torch.tensor([json.loads(text) for text in texts], dtype=torch.float64).view(len(texts), len(classes))
    numbers = {label: number for number, label in enumerate(classes)}
    found = torch.zeros(len(texts), len(classes), dtype=torch.float64)
    for row, text in enumerate(texts):
        found[row, [numbers[label] for label in parts(text)]] = 1.0
    return found


def learned(
    texts: Sequence[str], classes: Sequence[str], task: Task, train: Sequence[int]
) -> tuple[Tensor, tuple[Scaling, ...]]:
    """What a network learns to give, a row per sample, and how a regression's values were standardised.

    int64 `[N]` class numbers; float32 `[N, K]` zeros and ones; or float32 `[N, K]` of (value - mean) / scale with mean
    and standard deviation of the rows `train`. Raises DataError for a target that is the same in all of these rows.
    """
    if task == "multi-class":
        numbers = {label: number for number, label in enumerate(classes)}
        return torch.tensor([numbers[text] for text in texts]), ()
    rows_NK = rows(texts, classes, task)
    if task == "multi-label":
        return rows_NK.float(), ()
    scaling = tuple(_scaling(name, rows_NK[list(train), k]) for k, name in enumerate(classes))
    mean_K = torch.tensor([one.mean for one in scaling], dtype=torch.float64)
    scale_K = torch.tensor([one.scale for one in scaling], dtype=torch.float64)
    return ((rows_NK - mean_K) / scale_K).float(), scaling


def _scaling(name: str, values_N: Tensor) -> Scaling:
    mean, scale = float(values_N.mean()), float(values_N.std(correction=0))
    # Rounding leaves a little of a constant's deviation.
    if not scale > 1e-12 * abs(mean):
        raise DataError(
            f"the target '{name}' is {mean:g} in all training rows: there is nothing to learn",
            remedy="leave it out of data.target_columns",
        )
    if not (_LEAST_SCALE < scale < _LARGEST and abs(mean) < _LARGEST):
        raise DataError(
            f"the target '{name}' has values of {mean:g} +- {scale:g}, beyond what float32 holds",
            remedy="give it in another unit",
        )
    return Scaling(mean=float(f"{mean:.9g}"), scale=float(f"{scale:.9g}"))


def check(texts: Sequence[str], classes: Sequence[str], recipe: Recipe) -> None:
    """Raises DataError when a data set for labels or values cannot be learned from."""
    root, thing = recipe.data.root or recipe.data.source, recipe.thing
    if len(texts) < 3:
        raise DataError(
            f"{root} has {len(texts) or 'no'} readable {thing}{'s' * (len(texts) != 1)}, three are the least",
            remedy=f"give {thing}s for training, validation and test",
        )
    if recipe.task == "regression":
        return
    if not classes:
        raise DataError(f"{root}: no row has a label", remedy="fill in the labels, or correct data.label_column")
    counts = Counter(label for text in texts for label in parts(text))
    for label in classes:
        if not counts[label]:
            raise DataError(
                f"no {thing} in {root} has the label '{label}': its column holds only 0",
                remedy="leave the column out of data.label_columns",
            )
        if counts[label] == len(texts):
            raise DataError(
                f"every {thing} in {root} has the label '{label}': there is nothing to learn",
                remedy=f"leave the label out, or add {thing}s without it",
            )


def check_splits(
    texts: Sequence[str], rows: Mapping[Split, Sequence[int]], classes: Sequence[str], recipe: Recipe
) -> None:
    """Raises DataError when a split is empty, or the training split knows no example of a label."""
    for split, numbers in rows.items():
        if not numbers:
            raise DataError(
                f"no {recipe.thing} is left for the {split} split", remedy=f"give more different {recipe.thing}s"
            )
    if recipe.task == "regression":
        return
    counts = Counter(label for row in rows["train"] for label in parts(texts[row]))
    for label in classes:
        if not 0 < counts[label] < len(rows["train"]):
            much = "every" if counts[label] else "no"
            raise DataError(
                f"{much} {recipe.thing} of the training split has the label '{label}'",
                remedy=f"add different {recipe.thing}s, or leave the label out",
            )


def is_number(text: str) -> bool:
    """Whether a column's text is a finite number."""
    try:
        return "_" not in text and math.isfinite(float(text))
    except ValueError:
        return False
