"""The columns of a table that say what is known of each row: one class, several labels, or numbers.

A column that is missing, or a value that cannot be what the recipe says, is an error with its file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from handlerlib.spec import Task
from training import truth
from training.config import Data
from training.errors import DataError
from training.sources import natural

Reader = Callable[[Sequence[str], str], str]
"""A row's values and where it stands, for messages -> the label, or the text of `training.truth`. Raises DataError."""


def reader(data: Data, task: Task, column: Callable[[str], int]) -> Reader:
    """What reads a row of the recipe's table; `column` gives the place of a name and raises DataError for an unknown one."""
    if task == "regression":
        return _numbers([(name, column(name)) for name in data.target_columns])
    if task == "multi-label" and data.label_columns:
        return _flags([(name, column(name)) for name in data.label_columns])
    at = column(data.label_column)
    if task == "multi-label":
        return lambda values, where: _separated(values[at], data.label_separator, where)
    return lambda values, where: _label(values[at].strip(), where, data)


def classes(data: Data, task: Task, labels: Iterable[str], order: Callable[[str], object]) -> tuple[str, ...]:
    """The model's outputs: the recipe's columns or names where it lists them, otherwise what occurs, in `order`."""
    if task == "regression":
        return data.target_columns
    if task == "multi-label":
        found = {label for text in set(labels) for label in truth.parts(text)}
        return data.label_columns or tuple(sorted(found, key=order))  # type: ignore[arg-type]
    return data.class_names or tuple(sorted(set(labels), key=order))  # type: ignore[arg-type]


def _numbers(wanted: Sequence[tuple[str, int]]) -> Reader:
    def read(values: Sequence[str], where: str) -> str:
        for name, at in wanted:
            if not truth.is_number(values[at]):
                given = values[at].strip()
                raise DataError(
                    f"{where}: the target '{name}' is {f'{given[:40]!r}, not a finite number' if given else 'empty'}",
                    remedy="mend the row or remove it; numbers are written like 12.5 or 1e3, with a point",
                )
        return truth.of_values([float(values[at]) for _, at in wanted])

    return read


def _flags(wanted: Sequence[tuple[str, int]]) -> Reader:
    def read(values: Sequence[str], where: str) -> str:
        for name, at in wanted:
            if values[at].strip() not in ("0", "1"):
                raise DataError(
                    f"{where}: the label '{name}' is {values[at].strip()[:40]!r}, neither 0 nor 1",
                    remedy="write 1 where the row has the label and 0 where it has not",
                )
        there = {name for name, at in wanted if values[at].strip() == "1"}
        return truth.of_labels(there, [name for name, _ in wanted])

    return read


def _separated(text: str, separator: str, where: str) -> str:
    labels = [part.strip() for part in text.split(separator)] if text.strip() else []
    if "" in labels:
        raise DataError(
            f"{where}: an empty label in {text.strip()[:40]!r}",
            remedy=f"write labels with one '{separator}' between them, and nothing for none",
        )
    if len(set(labels)) < len(labels):
        raise DataError(f"{where}: a label twice in {text.strip()[:40]!r}", remedy="name each label once")
    return truth.of_labels(labels, sorted(labels, key=natural))


def _label(value: str, where: str, data: Data) -> str:
    if not data.class_names:
        if not value:
            raise DataError(
                f"{where}: no class in the column '{data.label_column}'", remedy="fill it in or remove the row"
            )
        return value
    if value in data.class_names:
        return value
    # Where a name is a number itself, a number is never a place: which of the two is meant would be a guess.
    places = not any(name.isdigit() for name in data.class_names)
    if places and value.isascii() and value.isdigit() and 1 <= int(value) <= len(data.class_names):
        return data.class_names[int(value) - 1]
    either = f"neither one of data.class_names nor a number from 1 to {len(data.class_names)}"
    raise DataError(
        f"{where}: class '{value[:40]}' is {either if places else 'not one of data.class_names'}",
        remedy="mend the row, or correct data.class_names",
    )
