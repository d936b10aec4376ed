"""What a worker tells about itself: figures for Prometheus, a line per answer of 500 or more, the cause of a failed load.

The only way out of a worker is its stdout, where java matches a regular expression against every line. So figures are
added up here and sent at most once a second, whatever the load. They are sent as counters, histograms too (`_bucket`,
`_sum` and `_count`): TorchServe's own histograms have fixed buckets, 0.005 to 10, too coarse for a network that takes
2 ms. Names and labels must be those of marina/torchserve/metrics.yaml, or java drops them.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from handlerlib.drift import Bins
from handlerlib.errors import RequestError
from handlerlib.spec import Baseline, ModelSpec

logger = logging.getLogger(__name__)

STAGES = ("decode", "preprocess", "inference", "postprocess")
LOAD_FAILED = "MARINA_LOAD_FAILED"
"""Starts the one line by which a worker tells the supervisor why it cannot serve."""
ARRIVAL_HEADER = "x-request-start"
"""`t=` and Unix time in microseconds, set by the gateway when a request arrives there."""
REPORT_SECONDS = 1.0
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
HISTOGRAMS: Mapping[str, Sequence[float]] = {
    **{f"marina_{stage}_seconds": SECONDS for stage in (*STAGES, "handle", "queue", "request")},
    "marina_batch_size": (1, 2, 4, 8, 16, 32, 64, 128),
}
"""Upper edges of the buckets. Per batch: the stages, `handle` (all of them) and the batch size; per request: `queue`
(from the gateway to the worker, where a gateway says when) and `request` (from the gateway to the answer)."""

_ARRIVAL = re.compile(r"t=(\d{16})")
_TRACE_ID = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_LONGEST_WAIT = 3600.0


class Serving(Protocol):
    """What is told about the engine: `handlerlib.loading.Serving`."""

    @property
    def engine(self) -> str: ...
    @property
    def packed(self) -> str | None: ...
    @property
    def fallback(self) -> str | None: ...


Labels = tuple[str, ...]
"""Values, in the order of metrics.yaml."""


class Stopwatch:
    """Seconds spent in each stage of one batch, and since it began."""

    __slots__ = ("_began", "_last", "began", "seconds")

    def __init__(self) -> None:
        self.began = time.time()
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._began = self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap, or since the beginning, to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now

    def elapsed(self) -> float:
        """Seconds since the batch began."""
        return time.perf_counter() - self._began


class _Histogram:
    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._edges, value)] += 1
        self._sum += value

    def take(self, name: str) -> Iterator[tuple[str, Labels, float]]:
        """Increases of its counters, each bucket with all smaller ones in it; then it counts from nothing."""
        so_far = 0
        for edge, count in zip((*(f"{edge:g}" for edge in self._edges), "+Inf"), self._counts, strict=True):
            so_far += count
            if so_far:
                yield f"{name}_bucket", (edge,), so_far
        if so_far:
            yield f"{name}_count", (), so_far
            yield f"{name}_sum", (), self._sum
        self._counts, self._sum = [0] * len(self._counts), 0.0


class Figures:
    """What has been counted and not been sent yet. Not for several threads at once."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, Labels]] = Counter()
        self._histograms = {name: _Histogram(edges) for name, edges in HISTOGRAMS.items()}

    def add(self, name: str, *labels: str) -> None:
        """Count one."""
        self._counts[name, labels] += 1

    def observe(self, name: str, value: float) -> None:
        """Put a value into a histogram of `HISTOGRAMS`."""
        self._histograms[name].observe(value)

    def take(self) -> list[tuple[str, Labels, float]]:
        """(counter, labels, increase) of all that changed; from here on it counts from nothing."""
        taken: list[tuple[str, Labels, float]] = [(name, labels, n) for (name, labels), n in self._counts.items()]
        self._counts.clear()
        for name, histogram in self._histograms.items():
            taken += histogram.take(name)
        return taken


class Reporter:
    """Adds up the figures of one worker's batches and sends them in a thread of its own.

    Whatever goes wrong here is logged and never hurts an answer.
    """

    def __init__(self, spec: ModelSpec, metrics: Any, serving: Serving | None = None) -> None:
        """`metrics` is TorchServe's metrics cache; with None nothing is sent. `serving` says which engine answers."""
        self._own = (spec.name, spec.version)
        self._metrics = metrics
        self._bins = Bins.of(spec.labels, spec.baseline)
        self._figures = Figures()
        self._lock = threading.Lock()
        self._something = threading.Event()
        if metrics is None:
            return
        try:
            self._announce(spec.baseline)
            if serving is not None:
                self._announce_engine(serving)
        except Exception as error:  # noqa: BLE001 - a server with another metrics.yaml must be able to serve us
            logger.warning("no figures are sent, this server's metrics.yaml lacks ours: %s", error)
            self._metrics = None
            return
        threading.Thread(target=self._report, name="telemetry", daemon=True).start()

    def record(
        self,
        stopwatch: Stopwatch,
        *,
        arrivals: Sequence[float | None],
        outcomes: Sequence[str],
        answers: Sequence[tuple[int, float]],
    ) -> None:
        """One batch: `arrival` and `outcome` of each request, and of each input that has an answer its first label's
        index and probability."""
        if self._metrics is None:
            return
        try:
            with self._lock:
                self._count(stopwatch, arrivals, outcomes, answers)
            self._something.set()
        except Exception:
            logger.exception("figures of a batch were lost")

    def flush(self) -> None:
        """Send now what has been counted."""
        with self._lock:
            taken = self._figures.take()
        for name, labels, increase in taken:
            self._send(name, labels, increase)

    def _count(
        self,
        stopwatch: Stopwatch,
        arrivals: Sequence[float | None],
        outcomes: Sequence[str],
        answers: Sequence[tuple[int, float]],
    ) -> None:
        figures, total = self._figures, stopwatch.elapsed()
        for stage, seconds in stopwatch.seconds.items():
            figures.observe(f"marina_{stage}_seconds", seconds)
        figures.observe("marina_handle_seconds", total)
        figures.observe("marina_batch_size", len(answers))
        for arrived, result in zip(arrivals, outcomes, strict=True):
            waited = 0.0
            if arrived is not None:
                waited = max(0.0, stopwatch.began - arrived)  # two machines' clocks may differ a little
                figures.observe("marina_queue_seconds", waited)
            figures.observe("marina_request_seconds", waited + total)
            figures.add("marina_requests_total", result)
        for index, probability in answers:
            confidence, predicted = self._bins.of_answer(index, probability)
            figures.add("marina_answers_total", "confidence", confidence)
            figures.add("marina_answers_total", "class", predicted)

    def _announce(self, baseline: Baseline | None) -> None:
        """Counters appear with 0, so that their first increase is seen; the baseline stands still."""
        for result in OUTCOMES:
            self._send("marina_requests_total", (result,), 0)
        for distribution, names in self._bins.names().items():
            for name in names:
                self._send("marina_answers_total", (distribution, name), 0)
        for histogram, edges in HISTOGRAMS.items():
            for edge in (*(f"{edge:g}" for edge in edges), "+Inf"):
                self._send(f"{histogram}_bucket", (edge,), 0)
        if baseline is not None:
            for (distribution, name), count in self._bins.expected(baseline).items():
                self._send("marina_baseline_answers", (distribution, name), count, kind="gauge")

    def _announce_engine(self, serving: Serving) -> None:
        """Which engine answers, and the reason when it is not the packed one; both stand still."""
        # The other one is sent too: it may have answered before this worker was started again.
        for name in dict.fromkeys((serving.engine, *((serving.packed, "plain") if serving.packed else ()))):
            self._send("marina_engine", (name,), int(name == serving.engine), kind="gauge")
        if serving.fallback is not None:
            self._send("marina_engine_fallback", (serving.fallback,), 1, kind="gauge")

    def _send(self, name: str, labels: Labels, amount: float, *, kind: str = "counter") -> None:
        # Only where TorchServe itself handed us its metrics cache is there a `ts` to import from.
        from ts.metrics.metric_type_enum import MetricTypes

        self._metrics.get_metric(name, MetricTypes(kind)).add_or_update(round(amount, 6), [*self._own, *labels])

    def _report(self) -> None:
        while True:
            self._something.wait()
            self._something.clear()
            try:
                self.flush()
            except Exception:
                logger.exception("figures were lost")
            time.sleep(REPORT_SECONDS)


OUTCOMES = ("ok", *sorted(error.code for error in RequestError.__subclasses__()))
"""The label `outcome` of `marina_requests_total`."""


def outcome(outputs: Iterable[object]) -> str:
    """`ok`, or the code of the first error among one request's outputs."""
    return next((output.code for output in outputs if isinstance(output, RequestError)), "ok")


def arrival(headers: Mapping[str, Any]) -> float | None:
    """Unix time at which the gateway received a request, by its headers (names in lower case).

    None without a gateway or for an absurd time.
    """
    given = headers.get(ARRIVAL_HEADER)
    found = _ARRIVAL.fullmatch(str(given)) if given is not None else None
    arrived = int(found[1]) / 1e6 if found else 0.0
    return arrived if abs(time.time() - arrived) < _LONGEST_WAIT else None


def trace_id(headers: Mapping[str, str]) -> str | None:
    """The trace that a request belongs to, from its W3C `traceparent`; None when it has none that is valid."""
    found = _TRACE_ID.fullmatch(headers.get("traceparent", ""))
    return found[1] if found else None


def log_failure(error: RequestError, *, request_id: str, trace_id: str | None, spec: ModelSpec) -> None:
    """One line of JSON on stderr about an answer of 500 or more; its traceback, where there is one, is a field of it."""
    line = {
        "event": "request failed",
        "request_id": request_id,
        "trace_id": trace_id,
        "model": spec.name,
        "version": spec.version,
        "status": error.status,
        "code": error.code,
        "detail": str(error),
    }
    if error.__cause__ is not None:
        line["exception"] = "".join(traceback.format_exception(error.__cause__))
    print(json.dumps(line, ensure_ascii=False), file=sys.stderr, flush=True)


def announce_load_failure(error: BaseException) -> None:
    """Print the line that the supervisor turns into its own error message."""
    cause = {"type": type(error).__name__, "error": str(error)}
    print(f"{LOAD_FAILED} {json.dumps(cause, ensure_ascii=False)}", file=sys.stderr, flush=True)
