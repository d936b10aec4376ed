"""Errors that cross from one process to another: their message, kind, exit code and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from handlerlib.errors import MarinaError
from training import files
from training.errors import Interrupted


def fields(error: MarinaError) -> dict[str, Any]:
    return {
        "error": str(error),
        "kind": type(error).__name__,
        "exit_code": error.exit_code,
        "remedy": error.remedy,
    }


def save(path: Path, error: MarinaError) -> None:
    files.write_text(path, json.dumps(fields(error)))


def error_of(told: dict[str, Any]) -> MarinaError:
    """The error, to be raised here under its own name."""
    if told["kind"] == Interrupted.__name__:
        return Interrupted(told["error"])
    kind: type[MarinaError] = type(told["kind"], (MarinaError,), {"exit_code": told["exit_code"]})
    return kind(told["error"], remedy=told["remedy"])
