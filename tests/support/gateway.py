"""A real HAProxy in front of real, misbehaving HTTP servers (misbehaving_server.py)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest

from marina import gateway
from marina.gateway import GatewayConfig, Replica, RunningGateway

INSTALL = gateway.INSTALL_HAPROXY
SERVER = Path(__file__).with_name("misbehaving_server.py")


def require_haproxy() -> None:
    """Skip on a machine without HAProxy; in CI its absence is a failure."""
    if shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"):
        return
    if os.environ.get("CI"):
        pytest.fail(f"haproxy is missing; {INSTALL}")
    pytest.skip(f"haproxy is missing; {INSTALL}")


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str, *, within_s: float = 10.0, log: Path | None = None) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            tail = log.read_text()[-3000:] if log is not None else ""
            pytest.fail(f"not within {within_s:g} s: {what}\n{tail}")
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------- the server behind it


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A process that answers like one TorchServe with its supervisor. The header `X-Mode` of a request says how:

    `sleep:0.3`             answer after 0.3 s
    `status:507:text`       TorchServe's kind of error: JSON with this text, connection closed
    `problem:422`           a handler's own error: problem+json, connection closed as TorchServe does
    `drop`                  close without an answer
    Each can be limited to one replica with `@name` at its end, `status:507:x@a`, or to paths that end so: `drop@/2.0`.
    """

    name: str
    process: subprocess.Popen[str]
    port: int
    control_port: int
    host: str = "127.0.0.1"

    @property
    def replica(self) -> Replica:
        return Replica(address=f"{self.host}:{self.port}", health_port=self.control_port)

    def control(self, path: str) -> Any:
        connection = HTTPConnection(self.host, self.control_port, timeout=5)
        with contextlib.closing(connection):
            connection.request("POST", path)
            return json.loads(connection.getresponse().read())

    def set_ready(self, ready: bool) -> None:
        """Not ready as a server that drains is: it finishes what it has."""
        self.control(f"/ready/{200 if ready else 404}")

    def set_stuck(self) -> None:
        """Not ready, and what it has waits in vain."""
        self.control("/ready/503")

    def served(self) -> int:
        """Prediction requests that reached this replica."""
        return int(self.control("/served"))


@contextlib.contextmanager
def backends(*names: str, hosts: Sequence[str] = (), port: int = 0, control_port: int = 0) -> Iterator[list[Backend]]:
    """Start one server per name; they end with the block."""
    started: list[Backend] = []
    try:
        for number, name in enumerate(names):
            host = hosts[number] if hosts else "127.0.0.1"
            process = subprocess.Popen(
                [sys.executable, str(SERVER), name, host, str(port), str(control_port)],
                stdout=subprocess.PIPE,
                text=True,
            )
            assert process.stdout is not None
            ports = json.loads(process.stdout.readline())
            started.append(Backend(name=name, process=process, host=host, port=ports[0], control_port=ports[1]))
        yield started
    finally:
        for backend in started:
            backend.process.kill()
            backend.process.wait()
            assert backend.process.stdout is not None
            backend.process.stdout.close()


# ---------------------------------------------------------------------------------------------------------- the gateway


@dataclass(frozen=True, kw_only=True)
class Front:
    """A running gateway with the first client's key."""

    running: RunningGateway
    key: str
    clients: Path

    @property
    def port(self) -> int:
        return int(self.running.config.bind.rpartition(":")[2])

    @property
    def metrics_port(self) -> int:
        return int(self.running.config.metrics_bind.rpartition(":")[2])

    def ask(
        self,
        path: str = "/predictions/m",
        *,
        method: str = "POST",
        body: bytes | None = b"x",
        key: str | None = "",
        port: int | None = None,
        **headers: str,
    ) -> Answer:
        """One request on its own connection. `key=""` sends the first client's key, None none; `x_mode=` is X-Mode."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            sent["Authorization"] = f"Bearer {key or self.key}"
        connection = HTTPConnection("127.0.0.1", port or self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body, sent)
            return Answer.read(connection)

    def raw(self, data: bytes, *, timeout_s: float = 20.0) -> bytes:
        """Send bytes as they are, and read until the gateway closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
            return _read_all(connection)

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.running.log.read_text().splitlines() if line.startswith("{")]

    def log_of(self, request_id: str) -> dict[str, Any]:
        wait_until(
            lambda: any(line["request_id"] == request_id for line in self.log_lines()),
            f"a log line of request {request_id}",
            log=self.running.log,
        )
        return next(line for line in self.log_lines() if line["request_id"] == request_id)

    def wait_ready(self, replicas: int) -> None:
        wait_until(
            lambda: self.ready_replicas() == replicas, f"{replicas} replicas ready", log=self.running.log, within_s=15
        )

    def ready_replicas(self) -> int:
        text = self.ask("/metrics", method="GET", body=None, key=None, port=self.metrics_port).body.decode()
        return int(
            next(
                float(line.rpartition(" ")[2])
                for line in text.splitlines()
                if line.startswith('haproxy_backend_active_servers{proxy="predictions"}')
            )
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @classmethod
    def read(cls, connection: HTTPConnection) -> Answer:
        response = connection.getresponse()
        return cls(
            status=response.status,
            headers={name.lower(): value for name, value in response.getheaders()},
            body=response.read(),
        )

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def problem(self) -> str:
        """The code of a problem+json answer, after checking that it is a complete one."""
        assert self.headers["content-type"] == "application/problem+json", (self.status, self.headers, self.body)
        assert set(self.json) == {"type", "title", "status", "detail", "instance"}
        assert self.json["status"] == self.status
        assert self.json["instance"] == self.headers["x-request-id"]
        return str(self.json["type"]).removeprefix("urn:marina:problem:")


@contextlib.contextmanager
def front(folder: Path, replicas: Sequence[Replica], *, wait: int | None = None, **settings: Any) -> Iterator[Front]:
    """A gateway on free ports with fresh keys; waits until `wait` replicas (all by default) are ready."""
    require_haproxy()
    made = gateway.create_keys(folder / "secrets")
    values: dict[str, Any] = {
        "bind": f"127.0.0.1:{free_port()}",
        "metrics_bind": f"127.0.0.1:{free_port()}",
        "clients": made.clients,
        "replicas": tuple(replicas),
        "rate_limit": 1_000_000,
    }
    running = gateway.start_gateway(GatewayConfig.parse(values | settings), folder / "gateway.log")
    try:
        found = Front(running=running, key=made.key.read_text().strip(), clients=made.clients)
        found.wait_ready(len(replicas) if wait is None else wait)
        yield found
    finally:
        running.stop(drain_s=0.5)


@dataclass
class Load:
    """Closed-loop clients with kept connections, as long as the block lasts."""

    front: Front
    clients: int = 6
    size: int = 20_000
    """Bytes of each body."""
    headers: dict[str, str] = field(default_factory=dict)
    key_of: Callable[[], str] | None = None
    answers: list[tuple[int, float]] = field(default_factory=list)
    """(status, seconds); status -1: no answer."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def wait_for(self, more: int) -> None:
        goal = len(self.answers) + more
        wait_until(lambda: len(self.answers) >= goal, f"{more} more answers", within_s=20, log=self.front.running.log)

    def failures(self) -> list[tuple[int, float]]:
        return [answer for answer in self.answers if answer[0] != 200]

    def _run(self) -> None:
        connection = HTTPConnection("127.0.0.1", self.front.port, timeout=20)
        while not self._stop.is_set():
            key = self.key_of() if self.key_of else self.front.key
            began = time.monotonic()
            try:
                connection.request(
                    "POST", "/predictions/m", b"x" * self.size, {"Authorization": f"Bearer {key}", **self.headers}
                )
                response = connection.getresponse()
                response.read()
                status = response.status
            except (OSError, HTTPException):
                status = -1
                connection.close()
            self.answers.append((status, time.monotonic() - began))
        connection.close()


def _read_all(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    return data
