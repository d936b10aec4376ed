"""The echo row of the comparison: the front end and the worker protocol alone, measured by `benchmarks.echo`."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import load, measure
from benchmarks.echo.systems import SYSTEMS
from benchmarks.measure import Plan

BODY_BYTES = 784
WARM_UP_SECONDS = 8.0
"""java compiles the hot path for that long."""


def measure_marina(generator: load.Generator, seconds: float) -> list[dict[str, Any]]:
    """One start of Marina's echo server: a row for 1 connection and one for 64."""
    body = random.Random(0).randbytes(BODY_BYTES)
    # A short path: it holds Unix sockets.
    with tempfile.TemporaryDirectory(prefix="echo-", dir="/tmp") as scratch:
        folder = Path(scratch)
        plan = Plan((1, 64), seconds, WARM_UP_SECONDS)
        found = measure.visit(SYSTEMS["marina"](folder), [body], plan, generator, folder / "output.txt")
    return [dataclasses.asdict(row) for row in found.rows]
