"""Labelled samples that a model is asked and was not divided from its own data: class folders, or a .csv."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from handlerlib.spec import ModelSpec, Task
from training import scoring, sources, truth
from training.config import TABLES, TEXT_SOURCES, Data
from training.errors import DataError
from training.export import PROVENANCE_FILE
from training.scoring import Questions
from training.sources import Entry

_OWN = frozenset(["source", "root", "max_images", "train_rows", "validation_rows", "test_rows"])
"""What a recipe says of its own data alone."""


def labelled(path: Path, artifact: Path | None) -> Questions:
    """All samples of a .csv, or of `path/<class>/**` (of `path/test/<class>/**` where there is such a folder).

    A .csv has the columns, and texts the encoding, of the data that `artifact` was trained on. Raises DataError.
    """
    recorded, task = ({}, "multi-class") if artifact is None else _recorded(artifact)
    if path.suffix.lower() == ".csv":
        return _of_csv(path, recorded if recorded.get("source") in TABLES else {}, task)
    if task != "multi-class":
        raise DataError(
            f"{path}: a model for the task {task} is not judged on class folders",
            remedy="give a .csv with the columns of the table that it was trained on",
        )
    if recorded.get("source") in TEXT_SOURCES:
        return _of_texts(path, str(recorded.get("encoding", "utf-8")))
    return scoring.labelled_folder(path)


def _of_csv(path: Path, recorded: dict[str, Any], task: Task) -> Questions:
    if not path.is_file():
        raise DataError(f"{path} does not exist", remedy="give a .csv file or a folder with one folder per class")
    if task != "multi-class" and not any(
        recorded.get(key) for key in ("label_columns", "label_separator", "target_columns")
    ):
        raise DataError(
            f"{path}: the model's own data is no table, so that its columns are not known",
            remedy="evaluate its test split, without --data",
        )
    columns = {key: value for key, value in recorded.items() if key not in _OWN}
    data = Data.model_validate(columns | {"source": recorded.get("source", "csv"), "root": str(path)})
    try:
        entries = sources.listing(data, task).entries
    except DataError as error:
        labels = data.target_columns or data.label_columns or (data.label_column,)
        content = (data.path_column,) if data.source == "image_csv" else data.text_columns
        wanted = ", ".join((*labels, *content))
        raise DataError(
            str(error), remedy=f"give a file like the one the model was trained on, with {wanted}"
        ) from error
    return _questions(path, entries, task)


def _of_texts(folder: Path, encoding: str) -> Questions:
    data = Data(source="texts", root=str(folder), encoding=encoding)
    entries = sources.listing(data).entries
    if any(entry.given is not None for entry in entries):
        entries = tuple(entry for entry in entries if entry.given == "test")
    return _questions(folder, entries)


def _questions(path: Path, entries: tuple[Entry, ...], task: Task = "multi-class") -> Questions:
    if not entries:
        raise DataError(f"{path} holds no labelled samples", remedy="one folder of files per class, or rows of a .csv")
    labels = {entry.label for entry in entries}
    if task != "multi-class":
        labels = set() if task == "regression" else {label for text in labels for label in truth.parts(text)}

    return scoring.of_entries(str(path), entries, labels)


def _recorded(artifact: Path) -> tuple[dict[str, Any], Task]:
    """What the artifact's recipe says of its data, nothing where it records none, and its task."""
    task = ModelSpec.load(artifact).task
    try:
        recipe = json.loads((artifact / PROVENANCE_FILE).read_text(encoding="utf-8")).get("recipe") or {}
    except (OSError, ValueError):
        return {}, task
    return dict(recipe.get("data", {})), task
