"""The load generator: a scenario in, figures with confidence intervals out.

The sending runs in processes of their own (marina.load_engine); this side starts them, decides when the server has warmed
up, and makes the figures. A request is never repeated: what fails is counted by its class.

    result = run(Scenario(url="http://127.0.0.1:8080/predictions/digits", payloads=(Payload(body=image),)))

    with start(scenario) as load:       # to do something to the server meanwhile
        load.wait_measuring()
        ...
        load.stop()
        result = load.result()
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlsplit

from marina import load_engine, load_stats
from marina.errors import ConfigError, MarinaError, Unreachable
from marina.load_server import ServerUse, ServerWatch, find_listener
from marina.load_stats import Interval, Latency

__all__ = [
    "Check",
    "Closed",
    "Failure",
    "Interval",
    "Latency",
    "Load",
    "Open",
    "Payload",
    "Progress",
    "Result",
    "Scenario",
    "ServerUse",
    "Span",
    "run",
    "start",
]

_LEAD_SECONDS = 0.05
"""The order to measure reaches every client process before its moment."""
_STOP_DRAIN_SECONDS = 10.0
_END_SECONDS = 10.0
_WORDS_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Payload:
    """What one request carries."""

    body: bytes = b""
    content_type: str = "application/octet-stream"
    name: str = ""
    """For messages: where the body came from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Closed:
    """So many connections, each of which sends its next request when it has its answer."""

    connections: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Open:
    """Requests at times that were planned before, whether or not the server keeps up."""

    rate: float
    """Requests per second."""
    arrivals: Literal["constant", "poisson"] = "constant"
    connections: int = 256
    """At most; opened when needed. A request that finds none free waits, and the wait counts."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Check:
    """How answers are judged, in the client process: `module:factory`, called with `settings`, gives a function
    `(payload index, body) -> ""` or what is wrong. It is asked once per distinct answer of a payload.
    """

    function: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What JSON can hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One load on one address."""

    url: str
    payloads: Sequence[Payload] = (Payload(),)
    """Sent in turn."""
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    loop: Closed | Open = Closed()
    duration: float | None = 10.0
    """Seconds that are measured; None: until stopped."""
    warm_up: float | Literal["auto"] = "auto"
    """Seconds of the same load before; auto: until throughput and latency are steady."""
    warm_up_limit: float = 60.0
    """Seconds after which `auto` measures anyway; the result then says `steady=False`."""
    timeout: float = 60.0
    """Seconds from its planned time after which a request has failed."""
    check: Check | None = None
    server: int | Literal["auto"] | None = "auto"
    """Process whose tree's CPU and memory are measured; auto: the one that listens there, when it is on this machine."""
    processes: int = 1
    """Client processes; more than one where one cannot send enough."""
    ca_file: Path | None = None
    insecure: bool = False
    """Do not check the server's certificate."""


@dataclass(frozen=True, slots=True)
class Progress:
    """About half a second of load."""

    seconds: float
    """Since the first request."""
    length: float
    good: int
    failed: int
    mean_ms: float
    """Of the good ones; 0 without any."""
    measuring: bool


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of the time measured: requests by the moment for which they were planned."""

    start: float
    """Seconds since the measurement began."""
    seconds: float
    planned: int
    answered: int
    """Good answers that arrived in it."""
    failed: int
    p50_ms: float | None
    p99_ms: float | None
    """None without good answers."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One request without a good answer."""

    at: float
    """Seconds since the measurement began, of its planned time."""
    outcome: str
    detail: str
    payload: int
    request_id: str


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured. Latencies are those of good answers."""

    url: str
    loop: Closed | Open
    seconds: float
    planned: int
    """Requests whose time fell into the measurement; each is either good or failed."""
    good: int
    errors: Mapping[str, int]
    """By class: connect, reset, timeout, protocol, wrong answer, unfinished, HTTP 404 ..."""
    throughput: Interval
    """Good answers per second."""
    latency: Latency | None
    """From the planned time; None without a good answer."""
    service: Latency | None
    """From the moment of sending: in an open loop on a stalled server this looks better than it is."""
    by_outcome: Mapping[str, Latency]
    """Failed requests, by class."""
    timeline: Sequence[Span]
    failures: Sequence[Failure]
    """The first 100."""
    warm_up_seconds: float
    steady: bool
    """False when the limit of the warm-up came before the server was steady."""
    interrupted: bool
    behind: Latency | None
    """Open loop: how late the client itself was. Where it is not far below the latency, the client is the limit."""
    connects: int
    """Connections opened, the warm-up included."""
    client_cpu_us: float
    """CPU microseconds of the client per request, the warm-up included."""
    server: ServerUse | None

    @property
    def failed(self) -> int:
        """Requests without a good answer."""
        return sum(self.errors.values())

    @property
    def offered(self) -> float:
        """Requests planned per second."""
        return self.planned / self.seconds if self.seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        kind = "open" if isinstance(self.loop, Open) else "closed"
        loop = {name: getattr(self.loop, name) for name in self.loop.__slots__}
        return {
            "url": self.url,
            "loop": {"kind": kind, **loop},
            "seconds": self.seconds,
            "planned": self.planned,
            "good": self.good,
            "failed": self.failed,
            "errors": dict(self.errors),
            "offered": self.offered,
            "throughput": self.throughput.as_dict(),
            "latency": _latency_fields(self.latency),
            "service": _latency_fields(self.service),
            "by_outcome": {name: item.as_dict() for name, item in self.by_outcome.items()},
            "timeline": [_fields(item) for item in self.timeline],
            "failures": [_fields(item) for item in self.failures],
            "warm_up_seconds": self.warm_up_seconds,
            "steady": self.steady,
            "interrupted": self.interrupted,
            "behind": _latency_fields(self.behind),
            "connects": self.connects,
            "client_cpu_us": self.client_cpu_us,
            "server": self.server.as_dict() if self.server is not None else None,
        }


OnProgress = Callable[[Progress], None]


def run(scenario: Scenario, *, on_progress: OnProgress | None = None) -> Result:
    """Warm up, measure, and give the figures. Ctrl-C ends the measurement early: the result holds what there is so far.

    Raises ConfigError for a scenario that makes no sense, Unreachable when its host has no address. A server that refuses
    every request is no error but a result.
    """
    with start(scenario, on_progress=on_progress) as load:
        try:
            load.wait()
        except KeyboardInterrupt:
            load.stop(drain=0.5, interrupted=True)
        return load.result()


def start(scenario: Scenario, *, on_progress: OnProgress | None = None) -> Load:
    """The load under way. Raises as `run` does."""
    return Load(scenario, on_progress=on_progress)


class Load:
    """A scenario under way; leaving its `with` block ends it. Call it from one thread."""

    def __init__(self, scenario: Scenario, *, on_progress: OnProgress | None = None) -> None:
        target = _target(scenario)
        _refuse_nonsense(scenario)
        self.scenario = scenario
        self._on_progress = on_progress
        self._reports: queue.SimpleQueue[tuple[int, dict[str, Any] | None]] = queue.SimpleQueue()
        self._clients: list[_Client] = []
        self._results: dict[int, dict[str, Any]] = {}
        self._pending: dict[int, dict[str, Any]] = {}
        self._rates: list[float] = []
        self._times: list[float] = []
        self._measuring_from = 0
        """0: still warming up. As `_ends`, nanoseconds of the monotonic clock."""
        self._ends = 0
        self._steady = True
        self._stopped = False
        self._interrupted = False
        pid = find_listener(target.host, target.port) if scenario.server == "auto" else scenario.server
        self._watch = _watch(pid, demanded=scenario.server != "auto")
        self._watching = 0
        """1: begun, 2: ended."""
        try:
            self._launch(target)
        except BaseException:
            self.close()
            raise
        self._began = self._last = time.monotonic_ns()

    @property
    def measuring(self) -> bool:
        """Whether the warm-up is over."""
        return 0 < self._measuring_from <= time.monotonic_ns()

    def wait_measuring(self, deadline: float = 120.0) -> None:
        """Return when the measurement has begun. Raises TimeoutError."""
        ends = time.monotonic() + deadline
        while not self.measuring:
            if time.monotonic() > ends:
                raise TimeoutError(f"the load did not begin to be measured within {deadline:.0f} s")
            self._take(0.02)

    def wait_seconds(self, seconds: float) -> None:
        """Let so many seconds of load pass."""
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 and not self._done:
            self._take(min(left, 0.1))

    def wait(self) -> None:
        """Return when the measurement has ended and every request has its outcome; with no duration only `stop` ends it."""
        while not self._done:
            self._take(0.1)

    def stop(self, *, drain: float = _STOP_DRAIN_SECONDS, interrupted: bool = False) -> None:
        """Plan no further request; wait at most `drain` seconds for the answers that are still out."""
        if not self._stopped and not self._done:
            self._stopped, self._interrupted = True, interrupted
            now = time.monotonic_ns()
            self._ends = min(self._ends, now) if self._ends else now
            self._mark_end()
            self._order({"do": "end", "drain": drain})
        gives_up = time.monotonic() + drain + _END_SECONDS
        while not self._done and time.monotonic() < gives_up:
            self._take(0.1)

    def result(self) -> Result:
        """The figures, once `wait` or `stop` has returned."""
        if not self._done and self._stopped:
            silent = ", ".join(str(number) for number in range(len(self._clients)) if number not in self._results)
            raise MarinaError(
                f"client process {silent} of the load generator was told to stop and does not",
                remedy="does the check that runs in it ever end?",
            )
        if not self._done:
            raise MarinaError("the load has not ended", remedy="call wait() or stop() first")
        return _result(self)

    def close(self) -> None:
        """End the client processes, finished or not."""
        for client in self._clients:
            client.kill()
        if self._watch is not None and self._watching == 1:
            self._watch.mark()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _done(self) -> bool:
        return len(self._results) == len(self._clients)

    def _launch(self, target: _Target) -> None:
        requests = [_request(self.scenario, target, payload) for payload in self.scenario.payloads]
        for share in range(self.scenario.processes):
            plan = _plan(self.scenario, target, share)
            self._clients.append(_Client(share, plan, requests, self._reports))
        for _ in self._clients:
            _, report = self._reports.get(timeout=30.0)
            if report is None or "ready" not in report:
                why = (report or {}).get("refused", "it ended")
                raise ConfigError(
                    f"a client process cannot start: {why}", remedy="correct the check or the certificate"
                )
        for client in self._clients:
            client.go()

    def _take(self, wait: float) -> None:
        """Handle what the clients say, for at most about `wait` seconds."""
        self._mark()
        with contextlib.suppress(queue.Empty):
            number, report = self._reports.get(timeout=wait)
            if report is None:
                if number not in self._results:
                    raise MarinaError(
                        f"client process {number} of the load generator died: {self._clients[number].last_words()}",
                        remedy="is the machine out of memory?",
                    )
            elif "result" in report:
                self._results[number] = report["result"]
                self._ends = self._ends or report["result"]["end"]
                self._mark_end()
            else:
                self._pending[number] = report
                if len(self._pending) == len(self._clients) - len(self._results):
                    self._half_second(list(self._pending.values()))
                    self._pending.clear()

    def _half_second(self, reports: Sequence[Mapping[str, Any]]) -> None:
        now = max(item["at"] for item in reports)
        length = (now - self._last) / 1e9
        self._last = now
        good, failed = sum(item["good"] for item in reports), sum(item["bad"] for item in reports)
        mean_ms = sum(item["us"] for item in reports) / good / 1e3 if good else 0.0
        if not self._measuring_from and not self._stopped:
            self._rates.append(good / length if length > 0 else 0.0)
            self._times.append(mean_ms)
            self._consider_measuring(now)
        if self._on_progress is not None:
            self._on_progress(Progress((now - self._began) / 1e9, length, good, failed, mean_ms, self.measuring))

    def _consider_measuring(self, now: int) -> None:
        elapsed = (now - self._began) / 1e9
        if self.scenario.warm_up == "auto":
            steady = load_stats.steady(self._rates, self._times)
            if steady or elapsed >= self.scenario.warm_up_limit:
                self._steady = steady
                self._measure(time.monotonic_ns() + int(_LEAD_SECONDS * 1e9))

    def _measure(self, moment: int) -> None:
        self._measuring_from = moment
        duration = self.scenario.duration
        self._ends = moment + int(duration * 1e9) if duration is not None else 0
        self._order({"do": "measure", "start": moment, "end": self._ends})

    def _mark(self) -> None:
        """Begin and end what is timed on this side."""
        now = time.monotonic_ns()
        warm_up = self.scenario.warm_up
        if warm_up != "auto" and not self._measuring_from and not self._stopped:
            # Said ahead of its time, so that a fixed warm-up has its exact length.
            self._measure(max(self._began + int(warm_up * 1e9), now + int(_LEAD_SECONDS * 1e9)))
        if self._watch is not None and self._watching == 0 and 0 < self._measuring_from <= now:
            self._watching = 1
            self._watch.begin()
        if 0 < self._ends <= now:
            self._mark_end()

    def _mark_end(self) -> None:
        if self._watch is not None and self._watching == 1:
            self._watching = 2
            self._watch.mark()

    def _order(self, order: Mapping[str, Any]) -> None:
        for client in self._clients:
            client.order(order)


class _Client:
    """One client process and the thread that reads what it says."""

    def __init__(
        self,
        number: int,
        plan: Mapping[str, Any],
        requests: Sequence[bytes],
        reports: queue.SimpleQueue[tuple[int, dict[str, Any] | None]],
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", load_engine.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is ours to handle
        )
        self._words = b""
        self._readers = (
            threading.Thread(target=self._read, args=(number, reports), name="load-report", daemon=True),
            threading.Thread(target=self._read_words, name="load-report-words", daemon=True),
        )
        for reader in self._readers:
            reader.start()
        text = json.dumps(plan).encode()
        head = struct.pack(f"!II{len(requests)}I", len(text), len(requests), *map(len, requests))
        self._write(head[:8] + text + head[8:] + b"".join(requests))

    def go(self) -> None:
        self._write(b"g")

    def order(self, order: Mapping[str, Any]) -> None:
        self._write(json.dumps(order).encode() + b"\n")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(10.0)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                _given(stream).close()

    def last_words(self) -> str:
        """The last line it wrote to standard error."""
        self._process.wait(10.0)
        self._readers[1].join(10.0)
        lines = self._words.decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.returncode}"

    def _write(self, data: bytes) -> None:
        stream = _given(self._process.stdin)
        with contextlib.suppress(OSError):  # its end is told by the reader
            stream.write(data)
            stream.flush()

    def _read(self, number: int, reports: queue.SimpleQueue[tuple[int, dict[str, Any] | None]]) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in _given(self._process.stdout):
                reports.put((number, json.loads(line)))
        reports.put((number, None))

    def _read_words(self) -> None:
        """All the time: a check that prints would stop the client once nobody takes its words."""
        with contextlib.suppress(ValueError, OSError):
            while piece := os.read(_given(self._process.stderr).fileno(), 65536):
                self._words = (self._words + piece)[-_WORDS_BYTES:]


def _given(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


@dataclass(frozen=True, slots=True)
class _Target:
    host: str
    port: int
    tls: bool
    path: str
    authority: str
    family: int
    address: tuple[Any, ...]


def _target(scenario: Scenario) -> _Target:
    try:
        parts = urlsplit(scenario.url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"'{scenario.url}' is not an address: {error}", remedy=_LIKE) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"'{scenario.url}' is not an address", remedy=_LIKE)
    tls = parts.scheme == "https"
    number = port or (443 if tls else 80)
    try:
        family, _, _, _, address = socket.getaddrinfo(parts.hostname, number, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise Unreachable(f"{parts.hostname} has no address: {error}", remedy="correct the host's name") from error
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Target(parts.hostname, number, tls, path, parts.netloc.rpartition("@")[2], int(family), tuple(address))


_LIKE = "write it like http://127.0.0.1:8080/predictions/digits"


def _refuse_nonsense(scenario: Scenario) -> None:
    loop = scenario.loop
    wrong = ""
    if not scenario.payloads:
        wrong = "no payload"
    elif scenario.duration is not None and not scenario.duration > 0:
        wrong = f"a duration of {scenario.duration} s"
    elif scenario.warm_up != "auto" and not 0 <= scenario.warm_up < math.inf:
        wrong = f"a warm-up of {scenario.warm_up} s"
    elif not scenario.timeout > 0:
        wrong = f"a timeout of {scenario.timeout} s"
    elif loop.connections < scenario.processes or scenario.processes < 1:
        wrong = f"{loop.connections} connections of {scenario.processes} processes"
    elif isinstance(loop, Open) and not 0 < loop.rate < math.inf:
        wrong = f"a rate of {loop.rate} requests per second"
    elif isinstance(loop, Open) and loop.arrivals not in ("constant", "poisson"):
        wrong = f"arrivals '{loop.arrivals}'"
    elif scenario.check is not None and ":" not in scenario.check.function:
        wrong = f"a check '{scenario.check.function}' that is not module:factory"
    if wrong:
        raise ConfigError(f"a load with {wrong} cannot be run", remedy="correct the scenario")


def _request(scenario: Scenario, target: _Target, payload: Payload) -> bytes:
    """The whole request as bytes."""
    headers = {"Host": target.authority, "User-Agent": "marina-bench", "Accept": "*/*"}
    if scenario.method not in ("GET", "HEAD", "DELETE"):
        headers |= {"Content-Type": payload.content_type, "Content-Length": str(len(payload.body))}
    given = {name.lower() for name in scenario.headers}
    headers = {name: value for name, value in headers.items() if name.lower() not in given} | dict(scenario.headers)
    for name, value in headers.items():
        if any(character in f"{name}{value}" for character in "\r\n") or not name.isascii() or ":" in name:
            raise ConfigError(f"'{name}: {value}' is not a header", remedy="one line each: Name: value")
    lines = [f"{scenario.method} {target.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    try:
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    except UnicodeEncodeError as error:
        raise ConfigError(f"a header or the path cannot be sent: {error}", remedy="use ASCII") from error
    return head + (payload.body if scenario.method not in ("GET", "HEAD", "DELETE") else b"")


def _plan(scenario: Scenario, target: _Target, share: int) -> dict[str, Any]:
    """What one client process is told."""
    loop, processes = scenario.loop, scenario.processes
    check = scenario.check
    return {
        "family": target.family,
        "address": list(target.address),
        "host": target.host,
        "tls": target.tls,
        "ca_file": str(scenario.ca_file) if scenario.ca_file is not None else None,
        "insecure": scenario.insecure,
        "method": scenario.method,
        "timeout": scenario.timeout,
        "connections": loop.connections // processes + (1 if share < loop.connections % processes else 0),
        "rate": loop.rate / processes if isinstance(loop, Open) else None,
        "arrivals": loop.arrivals if isinstance(loop, Open) else None,
        "seed": loop.seed if isinstance(loop, Open) else None,
        "share": share,
        "check": check.function if check is not None else None,
        "check_settings": dict(check.settings) if check is not None else None,
        "path": [*(str(Path(item).resolve()) for item in sys.path), str(Path(__file__).resolve().parents[1])],
    }


def _watch(pid: int | None, *, demanded: bool) -> ServerWatch | None:
    if pid is None:
        return None
    import psutil

    try:
        return ServerWatch(pid)
    except (psutil.Error, ValueError) as error:
        if demanded:
            raise ConfigError(
                f"process {pid} cannot be measured: {error}", remedy="is it the server's process id?"
            ) from error
        return None


def _result(load: Load) -> Result:
    parts = list(load._results.values())
    start, end = load._measuring_from, load._ends
    measured = [item["windows"] for item in parts if item["windows"] is not None]
    seconds = max(0.0, (end - start) / 1e9) if start else 0.0
    windows = _joined(measured, seconds)
    lengths = _lengths(windows, seconds)
    inside = slice(0, len(lengths))
    histograms = [dict(item) for item in windows.latency]
    longest = max((item["longest_us"] for item in parts), default=0) / 1e3
    answers = sum(sum(item.values()) for item in histograms)
    mean_ms = sum(item["sum_us"] for item in parts) / answers / 1e3 if answers else None
    outcomes = _by_outcome(parts)
    sent = sum(item["requests_sent"] for item in parts)
    cpu = sum(item["cpu_seconds"] for item in parts)
    server = load._watch.use(seconds=seconds, answers=answers) if load._watch is not None else None
    return Result(
        url=load.scenario.url,
        loop=load.scenario.loop,
        seconds=seconds,
        planned=sum(windows.planned),
        good=answers,
        errors={name: sum(counts.values()) for name, counts in outcomes.items()},
        throughput=load_stats.rate(windows.good[inside], lengths),
        latency=load_stats.latency(histograms, mean_ms=mean_ms, max_ms=longest),
        service=_whole([item["service"] for item in parts]),
        by_outcome={
            name: found for name, counts in outcomes.items() if (found := load_stats.latency([counts])) is not None
        },
        timeline=_timeline(windows, histograms, lengths),
        failures=_failures(parts, start),
        warm_up_seconds=max(0.0, ((start or end) - load._began) / 1e9),
        steady=load._steady and start > 0,
        interrupted=load._interrupted,
        behind=_whole([item["behind"] for item in parts]),
        connects=sum(item["connects"] for item in parts),
        client_cpu_us=cpu / sent * 1e6 if sent else 0.0,
        server=server,
    )


@dataclass(frozen=True, slots=True)
class _Joined:
    """Windows of all client processes, of one length."""

    seconds: float
    planned: list[int]
    failed: list[int]
    good: list[int]
    latency: list[dict[int, int]]


def _joined(parts: Sequence[Mapping[str, Any]], seconds: float) -> _Joined:
    """The processes started their windows together, but one may have merged its own once more than another. Where nothing
    happened until the end there are empty windows.
    """
    length = max((item["length"] for item in parts), default=load_engine.FIRST_WINDOW_NS)
    count = max((math.ceil(len(item["planned"]) * item["length"] / length) for item in parts), default=0)
    count = max(count, math.ceil(seconds * 1e9 / length - 1e-6))
    joined = _Joined(length / 1e9, [0] * count, [0] * count, [0] * count, [{} for _ in range(count)])
    for item in parts:
        several = length // item["length"]
        for index in range(len(item["planned"])):
            target = index // several
            joined.planned[target] += item["planned"][index]
            joined.failed[target] += item["failed"][index]
            joined.good[target] += item["good"][index]
            for slot, number in item["latency"][index]:
                joined.latency[target][slot] = joined.latency[target].get(slot, 0) + number
    return joined


def _lengths(windows: _Joined, seconds: float) -> list[float]:
    """Of the windows that lie in the time measured, the last one perhaps shorter; answers arrive after its end too."""
    if seconds <= 0:
        return []
    count = max(1, math.ceil(seconds / windows.seconds - 1e-6))
    covered = [windows.seconds] * count
    covered[-1] = min(windows.seconds, seconds - windows.seconds * (count - 1))
    return covered


def _by_outcome(parts: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, int]]:
    names = sorted({name for item in parts for name in item["outcomes"]})
    return {name: load_stats.merged([dict(item["outcomes"].get(name, ())) for item in parts]) for name in names}


def _whole(parts: Sequence[Sequence[tuple[int, int]]]) -> Latency | None:
    return load_stats.latency([load_stats.merged([dict(part) for part in parts])])


def _timeline(windows: _Joined, histograms: Sequence[Mapping[int, int]], lengths: Sequence[float]) -> tuple[Span, ...]:
    return tuple(
        Span(
            start=index * windows.seconds,
            seconds=length,
            planned=windows.planned[index],
            answered=windows.good[index],
            failed=windows.failed[index],
            p50_ms=load_stats.percentile_ms(histograms[index], 0.5) if histograms[index] else None,
            p99_ms=load_stats.percentile_ms(histograms[index], 0.99) if histograms[index] else None,
        )
        for index, length in enumerate(lengths)
    )


def _failures(parts: Sequence[Mapping[str, Any]], start: int) -> tuple[Failure, ...]:
    found = [
        Failure((item["at"] - start) / 1e9, item["outcome"], item["detail"], item["payload"], item["request_id"])
        for part in parts
        for item in part["failures"]
    ]
    return tuple(sorted(found, key=lambda item: item.at)[: load_engine.MOST_FAILURES])


def _latency_fields(latency: Latency | None) -> dict[str, object] | None:
    return latency.as_dict() if latency is not None else None


def _fields(item: Span | Failure) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__slots__}
