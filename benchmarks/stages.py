"""Where a Marina worker's time goes, from its own metrics: read before and after a burst, told per answer."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

import requests

STAGES = ("decode", "preprocess", "inference", "postprocess")
_LINE = re.compile(r"^(marina_\w+?)(?:\{([^}]*)\})? (\S+)", re.MULTILINE)
_SETTLE_SECONDS = 3.0
"""Workers hand in their figures about once a second."""


def totals(text: str) -> dict[str, float]:
    """Prometheus text -> the sum over all workers of each `marina_*_sum` and `marina_*_count`."""
    found: dict[str, float] = {}
    for name, _, value in _LINE.findall(text):
        if name.endswith(("_sum", "_count")):
            found[name] = found.get(name, 0.0) + float(value)
    return found


def engine(text: str) -> str | None:
    """The engine that the workers say they answer with; None when they do not say."""
    for name, labels, value in _LINE.findall(text):
        if name == "marina_engine" and float(value) == 1.0:
            found = re.search(r'engine="([^"]*)"', labels)
            return found[1] if found else None
    return None


def read(session: requests.Session, url: str) -> str:
    """The metrics once they stand still; empty when they cannot be had."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    last = _get(session, url)
    while time.monotonic() < deadline:
        time.sleep(1.1)
        now = _get(session, url)
        if totals(now) == totals(last):
            return now
        last = now
    return last


def between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float] | None:
    """Milliseconds of worker time per answer by stage, the rest of `handle`, the time in java's queue, and the mean batch.

    None when nothing was counted between the two readings.
    """

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    answers, batches = grown("marina_batch_size_sum"), grown("marina_batch_size_count")
    if answers <= 0 or batches <= 0:
        return None
    found = {stage: 1e3 * grown(f"marina_{stage}_seconds_sum") / answers for stage in STAGES}
    found["rest"] = 1e3 * grown("marina_handle_seconds_sum") / answers - sum(found.values())
    waited = grown("marina_queue_seconds_count")
    if waited > 0:
        found["queue"] = 1e3 * grown("marina_queue_seconds_sum") / waited
    return found | {"mean_batch": answers / batches}


def _get(session: requests.Session, url: str) -> str:
    try:
        answer = session.get(url, timeout=(1.0, 5.0))
    except requests.RequestException:
        return ""
    return answer.text if answer.status_code == 200 else ""
