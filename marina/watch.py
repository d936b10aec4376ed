"""The state of the served models, looked at every second or so, and the small port that tells it to others."""

from __future__ import annotations

import ipaddress
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

import requests
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from marina.client import ManagementClient, ModelStatus
from marina.errors import MarinaError, Refused

UP_HEADER = "X-Marina-Up"
"""Of the gateway's health checks (deploy/gateway/haproxy.cfg): how many replicas it sends requests to."""
_ACCEPTED = "ts_inference_requests"


class Expected(Protocol):
    """A model version that must be served."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def workers(self) -> int: ...
    @property
    def required(self) -> int:
        """Of them, how many must be ready for the server to be."""
        ...

    @property
    def sha256(self) -> str: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionState:
    """One expected model version at one moment."""

    name: str
    version: str
    expected: int
    """Workers that it is meant to have."""
    required: int
    """Workers that must be ready: fewer, while an autoscaled version grows or sleeps."""
    ready: int
    """Workers that can answer."""
    dead: int
    """Workers that TorchServe keeps in its list and that cannot answer: loading again, or given up."""
    pending: int
    remaining_capacity: int
    restarts: int
    """Times since the start that a worker came back as another process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """How one autoscaled model version stands (marina/autoscale_loop.py)."""

    name: str
    version: str
    min: int
    max: int
    wanted: int
    """Workers, after the last decision."""
    reason: str
    """Of the last decision that was not to go on as before; else of the last one."""
    utilisation: float | None = None
    wait: float | None = None
    """Seconds."""
    limit: str = ""
    """What keeps it from more workers: `max`, `memory`, or nothing."""
    host_bytes: int = 0
    """Of a further worker; 0 while not known."""
    gpu_bytes: int = 0
    changes: tuple[tuple[str, int], ...] = ()
    """(action, times) since the start."""

    def as_dict(self) -> dict[str, object]:
        """As JSON shows it."""
        return {name: getattr(self, name) for name in self.__slots__} | {"changes": dict(self.changes)}


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Everything expected, at one moment; `unanswered` says why there is no newer one."""

    versions: tuple[VersionState, ...] = ()
    seen_at: float = 0.0
    """time.monotonic()"""
    unanswered: str = "not looked yet"
    recycled: tuple[tuple[str, str, str, int], ...] = ()
    """(model, version, cause, times): workers that the watchdog ended, or saw end, since the start."""
    refused: int = 0
    """Inputs that have ended two workers each and are refused."""

    def missing(self) -> list[str]:
        """Why not everything is ready, one line per model version; empty when all is."""
        if self.unanswered:
            return [self.unanswered]
        return [
            f"{item.name} {item.version}: {item.ready} of {item.required} workers ready"
            for item in self.versions
            if item.ready < item.required
        ]

    @property
    def stuck(self) -> bool:
        """Whether no worker of any version can answer: where one can, its answers must not be cut off."""
        needed = [item for item in self.versions if item.required > 0]
        return bool(needed) and all(item.ready == 0 for item in needed)

    @property
    def pending(self) -> int:
        """Requests waiting in all queues."""
        return sum(item.pending for item in self.versions)


class Watch:
    """Looks at the expected versions through the management interface."""

    def __init__(self, management: ManagementClient, expected: Callable[[], Sequence[Expected]]) -> None:
        """`expected` is asked at every look: a rollout changes what must be served."""
        self._management = management
        self._expected = expected
        self._pids: dict[tuple[str, str, str], int] = {}
        self._restarts: dict[tuple[str, str], int] = {}
        self._recycled: Counter[tuple[str, str, str]] = Counter()
        self.refused = 0
        """Told by the watchdog; see `State.refused`."""
        self._lock = threading.Lock()
        self._state = State()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def state(self) -> State:
        """What was seen last."""
        return self._state

    def look(self) -> State:
        """See for yourself, now."""
        with self._lock:
            try:
                versions = tuple(self._look_at(item) for item in self._expected())
                self._state = self._seen(versions, time.monotonic(), "")
            except (MarinaError, OSError) as error:
                self._not_seen(str(error))
            return self._state

    def recycled(self, name: str, version: str, cause: str) -> None:
        """Count one for the metrics."""
        self._recycled[name, version, cause] += 1

    def start(self, every_seconds: float) -> None:
        """Keep looking, in a thread of its own, until `stop`."""

        def keep_looking() -> None:
            while not self._stopped.wait(every_seconds):
                try:
                    self.look()
                except Exception as error:  # noqa: BLE001 - a watch that has died would tell for ever what it saw last
                    self._not_seen(f"{type(error).__name__}: {error}")

        self._thread = threading.Thread(target=keep_looking, name="marina-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No look begins after this."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _seen(self, versions: tuple[VersionState, ...], at: float, unanswered: str) -> State:
        recycled = tuple((*labels, count) for labels, count in list(self._recycled.items()))
        return State(versions=versions, seen_at=at, unanswered=unanswered, recycled=recycled, refused=self.refused)

    def _not_seen(self, reason: str) -> None:
        self._state = self._seen(self._state.versions, self._state.seen_at, reason)

    def _look_at(self, item: Expected) -> VersionState:
        key = (item.name, item.version)
        try:
            status = self._management.describe(item.name, item.version)
        except Refused as error:
            if error.status != 404:
                raise
            return self._version_state(item, ready=0, dead=0, pending=0, capacity=0)
        self._count_restarts(key, status)
        return self._version_state(
            item,
            ready=status.ready_workers,
            dead=len(status.workers) - status.ready_workers,
            pending=status.pending,
            capacity=status.remaining_capacity,
        )

    def _version_state(self, item: Expected, *, ready: int, dead: int, pending: int, capacity: int) -> VersionState:
        return VersionState(
            name=item.name,
            version=item.version,
            expected=item.workers,
            required=item.required,
            ready=ready,
            dead=dead,
            pending=pending,
            remaining_capacity=capacity,
            restarts=self._restarts.get((item.name, item.version), 0),
        )

    def _count_restarts(self, key: tuple[str, str], status: ModelStatus) -> None:
        for worker in status.workers:
            if worker.ready:
                before = self._pids.setdefault((*key, worker.id), worker.pid)
                if before != worker.pid:
                    self._pids[(*key, worker.id)] = worker.pid
                    self._restarts[key] = self._restarts.get(key, 0) + 1


def accepted(metrics_url: str, *, timeout: float = 3.0) -> int:
    """Predictions that TorchServe has taken on since its start. Raises requests.RequestException."""
    return sum(accepted_by_version(metrics_url, timeout=timeout).values())


def accepted_by_version(metrics_url: str, *, timeout: float = 3.0) -> dict[tuple[str, str], int]:
    """The same by (model, version); the version is `default` where the request named none."""
    answer = requests.get(f"{metrics_url}/metrics", params={"name[]": f"{_ACCEPTED}_total"}, timeout=timeout)
    answer.raise_for_status()
    families = text_string_to_metric_families(answer.text)
    found: Counter[tuple[str, str]] = Counter()
    for sample in (sample for family in families if family.name == _ACCEPTED for sample in family.samples):
        found[sample.labels.get("model_name", ""), sample.labels.get("model_version", "")] += int(sample.value)
    return dict(found)


class Supervised(Protocol):
    """What the small port tells about."""

    def alive(self) -> bool: ...
    def not_ready(self) -> list[str]: ...
    def stuck(self) -> bool: ...
    def draining(self) -> bool: ...
    def in_flight(self) -> int | None: ...
    def state(self) -> State: ...
    def models(self) -> Sequence[Expected]: ...
    def scaling(self) -> Sequence[Scaling]: ...
    def failures(self) -> Mapping[str, str]: ...
    def request_drain(self) -> None: ...


class SupervisorMetrics(Collector):
    """The supervisor's figures in Prometheus form, read when asked. Labels come from the expected models only."""

    def __init__(self, supervised: Supervised) -> None:
        self._supervised = supervised

    def collect(self) -> Iterator[Metric]:
        """One family after the other."""
        state = self._supervised.state()
        yield _gauge("marina_ready", "1 when every expected model version can answer", not self._supervised.not_ready())
        yield _gauge("marina_draining", "1 from the moment a stop was asked for", self._supervised.draining())
        in_flight = self._supervised.in_flight()
        if in_flight is not None:
            yield _gauge("marina_in_flight", "predictions accepted and not yet answered", in_flight)
        for name, text, attribute in _VERSION_GAUGES:
            family = GaugeMetricFamily(name, text, labels=("model", "version"))
            for item in state.versions:
                family.add_metric((item.name, item.version), getattr(item, attribute))
            yield family
        restarts = CounterMetricFamily("marina_worker_restarts", "workers that came back", labels=("model", "version"))
        archives = InfoMetricFamily("marina_archive", "the archive of each served version", labels=("model", "version"))
        for item in state.versions:
            restarts.add_metric((item.name, item.version), item.restarts)
        for model in self._supervised.models():
            archives.add_metric((model.name, model.version), {"sha256": model.sha256})
        yield restarts
        yield archives
        recycled = CounterMetricFamily(
            "marina_worker_recycles",
            "workers that the watchdog ended, or saw end, by cause",
            labels=("model", "version", "cause"),
        )
        for name, version, cause, count in state.recycled:
            recycled.add_metric((name, version, cause), count)
        yield recycled
        yield _gauge("marina_inputs_refused", "inputs that have ended two workers and are refused", state.refused)
        yield from _scaling(self._supervised.scaling())


def _scaling(found: Sequence[Scaling]) -> Iterator[Metric]:
    for name, text, attribute in _SCALING_GAUGES:
        family = GaugeMetricFamily(name, text, labels=("model", "version"))
        for item in found:
            value = getattr(item, attribute)
            if value is not None:
                family.add_metric((item.name, item.version), value)
        yield family
    limited = GaugeMetricFamily(
        "marina_autoscale_limited",
        "1 while more workers are wanted than there may be",
        labels=("model", "version", "by"),
    )
    changes = CounterMetricFamily(
        "marina_autoscale_changes", "changes of the number of workers", labels=("model", "version", "action")
    )
    for item in found:
        for by in ("max", "memory"):
            limited.add_metric((item.name, item.version, by), float(item.limit == by))
        for action, count in item.changes:
            changes.add_metric((item.name, item.version, action), count)
    yield limited
    yield changes


_SCALING_GAUGES = (
    ("marina_autoscale_min", "fewest workers", "min"),
    ("marina_autoscale_max", "most workers", "max"),
    ("marina_autoscale_wanted", "workers after the last decision", "wanted"),
    ("marina_autoscale_utilisation", "share of the time that workers were busy lately", "utilisation"),
    ("marina_autoscale_wait_seconds", "time that requests wait for a worker, lately", "wait"),
    ("marina_autoscale_worker_host_bytes", "host memory that a further worker is expected to take", "host_bytes"),
    ("marina_autoscale_worker_gpu_bytes", "GPU memory that a further worker is expected to take", "gpu_bytes"),
)
_VERSION_GAUGES = (
    ("marina_workers_expected", "workers that it is meant to have", "expected"),
    ("marina_workers_ready", "workers that can answer", "ready"),
    ("marina_workers_dead", "workers that are loading again or were given up", "dead"),
    ("marina_queue_pending", "requests waiting in TorchServe's queue", "pending"),
    ("marina_queue_remaining", "requests the queue still takes before it answers 503", "remaining_capacity"),
)


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, text)
    family.add_metric((), float(value))
    return family


class Port:
    """`GET /livez`, `/readyz`, `/metrics` and, from this machine only, `GET /failures`, `/autoscale`, `POST /drain`."""

    def __init__(self, host: str, port: int, supervised: Supervised) -> None:
        """Listens at once; OSError when it cannot."""
        registry = CollectorRegistry()
        registry.register(SupervisorMetrics(supervised))

        class Handler(_Handler):
            routes = _routes(supervised, registry)

        self._server = (_V6Server if ":" in host else _Server)((host, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="marina-port", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    content_type: str
    body: bytes


def _json(status: int, value: object) -> _Reply:
    return _Reply(status, "application/json", json.dumps(value).encode() + b"\n")


def _routes(
    supervised: Supervised, registry: CollectorRegistry
) -> Mapping[tuple[str, str], Callable[[Message], _Reply]]:
    def livez(_: Message) -> _Reply:
        alive = supervised.alive()
        return _json(200 if alive else 503, {"alive": alive})

    counted = False

    def readyz(headers: Message) -> _Reply:
        nonlocal counted
        missing = supervised.not_ready()
        status = _readiness(supervised, headers, missing, counted=counted)
        if UP_HEADER in headers:
            counted = status == 200
        return _json(status, {"ready": not missing, "missing": missing})

    def metrics(_: Message) -> _Reply:
        return _Reply(200, CONTENT_TYPE_LATEST, generate_latest(registry))

    def failures(_: Message) -> _Reply:
        return _json(200, supervised.failures())

    def autoscale(_: Message) -> _Reply:
        return _json(200, [item.as_dict() for item in supervised.scaling()])

    def drain(_: Message) -> _Reply:
        supervised.request_drain()
        return _json(202, {"draining": True})

    return {
        ("GET", "/livez"): livez,
        ("GET", "/readyz"): readyz,
        ("GET", "/metrics"): metrics,
        ("GET", "/failures"): failures,
        ("GET", "/autoscale"): autoscale,
        ("POST", "/drain"): drain,
    }


def _readiness(supervised: Supervised, headers: Message, missing: Sequence[str], *, counted: bool) -> int:
    """503 when not ready. The gateway says how many replicas it sees up, this one included if it was told 200 last
    (`counted`); it gets 404 for "nothing new, but leave what is there", and 503 when what is there waits in vain and another
    replica can be asked.
    """
    if not missing:
        return 200
    up = headers.get(UP_HEADER, "")
    if not up.isdecimal() or (supervised.stuck() and int(up) > counted):
        return 503
    return 404


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A probe that hangs up in the middle is no error of ours."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _V6Server(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    """Seconds a client may be silent; a slow one holds a thread."""
    routes: Mapping[tuple[str, str], Callable[[Message], _Reply]]

    def do_GET(self) -> None:
        self._answer("GET", private=self.path.startswith(("/failures", "/autoscale")))

    def do_POST(self) -> None:
        self._answer("POST", private=True)

    def _answer(self, method: str, *, private: bool) -> None:
        if private and not ipaddress.ip_address(self.client_address[0]).is_loopback:
            self._send(_json(403, {"error": "only from this machine"}))
            return
        route = self.routes.get((method, self.path.partition("?")[0]))
        self._send(route(self.headers) if route is not None else _json(404, {"error": "no such route"}))

    def _send(self, reply: _Reply) -> None:
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(reply.body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, format: str, *args: object) -> None:
        """Probes come every few seconds and are not worth a line."""
