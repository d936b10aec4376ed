"""Timings and sizes of a batch into TorchServe's metrics, as histograms in seconds.

TorchServe's own histograms use the Prometheus client's default buckets (0.005 to 10) for milliseconds, so everything
falls into the last one; in seconds the same buckets fit.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

STAGES = ("decode", "preprocess", "inference", "postprocess")
LOAD_FAILED = "MARINA_LOAD_FAILED"
"""Starts the one line by which a worker tells the supervisor why it cannot serve."""


class Stopwatch:
    """Seconds spent in each stage of one batch."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the block to the stage `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started


def publish(metrics: Any, stopwatch: Stopwatch, batch_size: int) -> None:
    """Send one batch's figures to TorchServe's metrics cache. A metric that fails never hurts an answer."""
    if metrics is None:
        return
    try:
        # Only where TorchServe itself handed us its metrics cache is there a `ts` to import from.
        from ts.metrics.metric_type_enum import MetricTypes

        figures = {f"marina_{stage}_seconds": (value, "s") for stage, value in stopwatch.seconds.items()}
        figures["marina_batch_size"] = (float(batch_size), "count")
        for name, (value, unit) in figures.items():
            # idx=0: otherwise the ids of the whole batch are written into every line.
            metrics.add_metric(name, round(value, 6), unit, idx=0, dimensions=[], metric_type=MetricTypes.HISTOGRAM)
    except Exception:
        logger.exception("metrics of a batch were not sent")


def announce_load_failure(error: BaseException) -> None:
    """Print the line that the supervisor turns into its own error message."""
    cause = {"type": type(error).__name__, "error": str(error)}
    print(f"{LOAD_FAILED} {json.dumps(cause, ensure_ascii=False)}", file=sys.stderr, flush=True)
