"""Two servers behind the gateway, without Docker: `marina serve` twice, each started again when it ends, and HAProxy.

What docker-compose is in production: replicas with one model store, restarted when they end, a proxy that asks their
supervisors whether they are ready.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks.chaos.cases import ROOT
from benchmarks.errors import BenchmarkError
from marina import gateway, processes
from marina.canary import FileLog, Front
from marina.client import NO_RETRIES, ManagementClient, ModelStatus, Timeout, WorkerStatus
from marina.errors import ClientError
from marina.gateway import GatewayConfig, RunningGateway
from marina.replica import LocalReplica

READY_SECONDS = 180.0
_RESTART_PAUSE = 0.1
"""As a Docker engine waits before its first restart."""
_STOP_SECONDS = 45.0
_LOOK_SECONDS = 0.05

Command = Callable[[Mapping[str, int], Path], Sequence[str]]
"""Ports by setting name and the log file -> the program that serves on them."""


class Server:
    """One `marina serve`, kept alive by a thread of ours until `stop`."""

    def __init__(self, name: str, command: Command, folder: Path, model: str) -> None:
        self.name = name
        self.model = model
        self.folder = folder
        self.log = folder / f"{name}.log"
        self.restarts = 0
        kinds = ("inference", "management", "metrics", "supervisor")
        self._ports = dict(zip((f"{kind}_port" for kind in kinds), processes.free_ports(4), strict=True))
        self._command = command(self._ports, self.log)
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._management = ManagementClient(
            self.url("management"), timeout=Timeout(connect=1.0, read=10.0), retries=NO_RETRIES
        )
        self._keeper = threading.Thread(target=self._keep, name=f"keep-{name}", daemon=True)
        self._keeper.start()

    def url(self, kind: str) -> str:
        """Of one of its four interfaces."""
        return f"http://127.0.0.1:{self._ports[f'{kind}_port']}"

    @property
    def upstream(self) -> gateway.Replica:
        """As the gateway is told of it."""
        ports = self._ports
        return gateway.Replica(address=f"127.0.0.1:{ports['inference_port']}", health_port=ports["supervisor_port"])

    def replica(self, store: Path) -> LocalReplica:
        """As rollouts reach it."""
        return LocalReplica(
            store=store,
            inference_url=self.url("inference"),
            management_url=self.url("management"),
            supervisor_url=self.url("supervisor"),
            name=self.name,
        )

    def ready(self) -> bool:
        """Whether its supervisor says so."""
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url('supervisor')}/readyz", timeout=2).status_code == 200
        return False

    def status(self, version: str | None = None) -> ModelStatus | None:
        """Of the model's default version; None while it does not say."""
        with contextlib.suppress(ClientError):
            return self._management.describe(self.model, version)
        return None

    def ready_workers(self) -> tuple[WorkerStatus, ...]:
        """Of the default version."""
        status = self.status()
        return tuple(worker for worker in status.workers if worker.ready) if status is not None else ()

    def pids(self) -> dict[int, str]:
        """Every process of it, with what it is."""
        process = self._process
        found: dict[int, str] = {}
        with contextlib.suppress(psutil.Error):
            if process is not None:
                found[process.pid] = f"{self.name} supervisor"
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        found[child.pid] = f"{self.name} {_role(child)}"
        return found

    def java(self) -> int:
        """Its process id. Raises BenchmarkError when none runs."""
        for pid, role in self.pids().items():
            if role.endswith(" java"):
                return pid
        raise BenchmarkError(f"{self.name}: java does not run", remedy=f"see {self.log}")

    def terminate(self) -> None:
        """SIGTERM, as `docker stop` sends it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """For good."""
        self._stopping.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
            if process.poll() is None:
                processes.kill_session(process)
        self._keeper.join(_STOP_SECONDS)
        self._management.close()

    def _keep(self) -> None:
        """Start it again whenever it ends. In one thread all the time, because it dies with the thread that started it."""
        path = os.pathsep.join((str(ROOT / "handlers"), str(ROOT)))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MARINA_")}
        environment |= {"PYTHONPATH": path, "MARINA_HOME": str(ROOT), "TMPDIR": str(self.folder)}
        while not self._stopping.is_set():
            self._process = processes.spawn(self._command, environment=environment, folder=ROOT)
            assert self._process.stdout is not None
            with self._process.stdout as printed, (self.folder / f"{self.name}.out").open("ab") as output:
                for line in printed:
                    output.write(line)
            self._process.wait()
            if not self._stopping.wait(_RESTART_PAUSE):
                self.restarts += 1


def _role(process: psutil.Process) -> str:
    if process.name() == "java":
        return "java"
    command = process.cmdline()
    stands_for_one = any(Path(part).name == "marina-worker" for part in command[:2])
    return "worker" if not stands_for_one and any("model_service_worker" in part for part in command) else "helper"


@dataclass
class Stack:
    """What is running, and what clients need to know of it."""

    servers: tuple[Server, ...]
    gate: RunningGateway
    store: Path
    model: str
    key: str
    clients: Path

    @property
    def url(self) -> str:
        """Where predictions are asked for."""
        return f"{self.gate.url}/predictions/{self.model}"

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def front(self) -> Front:
        """As rollouts reach the gateway."""
        return Front(splits=self.clients.parent / gateway.SPLITS_FILE, open_log=lambda: FileLog(self.gate.log))

    def replicas(self) -> list[LocalReplica]:
        """As rollouts reach the servers."""
        return [server.replica(self.store) for server in self.servers]

    def ready_servers(self) -> int:
        """How many the gateway sends requests to."""
        port = self.gate.config.metrics_bind.rpartition(":")[2]
        text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
        name = 'haproxy_backend_active_servers{proxy="predictions"}'
        return next((int(float(line.rpartition(" ")[2])) for line in text.splitlines() if line.startswith(name)), 0)

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        """Every server ready, and the gateway knows. Raises BenchmarkError."""

        def ready() -> bool:
            return all(server.ready() for server in self.servers) and self.ready_servers() == len(self.servers)

        wait_until(ready, "every server is ready", seconds, log=self.servers[0].log)

    def pids(self) -> dict[int, str]:
        """Every process of it, with what it is."""
        found = {pid: role for server in self.servers for pid, role in server.pids().items()}
        return found | dict.fromkeys(self.gate.pids(), "gateway")


def wait_until(condition: Callable[[], bool], what: str, seconds: float, *, log: Path | None = None) -> float:
    """Returns the seconds that it took. Raises BenchmarkError with the log's tail."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            tail = "\n".join(log.read_text().splitlines()[-10:]) if log is not None and log.exists() else ""
            raise BenchmarkError(f"not within {seconds:.0f} s: {what}\n{tail}".rstrip(), remedy="see the server's log")
        time.sleep(_LOOK_SECONDS)
    return time.monotonic() - began


@contextlib.contextmanager
def running(
    folder: Path, model: str, command: Command, *, store: Path, servers: int = 2, **settings: Any
) -> Iterator[Stack]:
    """Started and ready; nothing of it is left after the block. `settings` are the gateway's."""
    folder.mkdir(parents=True, exist_ok=True)
    secrets = gateway.create_keys(folder / "secrets")
    # Before there are threads that start processes: one that is being started holds what is open here until it has begun.
    ports = processes.free_ports(2)
    with contextlib.ExitStack() as stop:
        started = []
        for number in range(servers):
            started.append(Server(f"replica{number + 1}", command, folder, model))
            stop.callback(started[-1].stop)
        values: dict[str, Any] = {
            "bind": f"127.0.0.1:{ports[0]}",
            "metrics_bind": f"127.0.0.1:{ports[1]}",
            "clients": secrets.clients,
            "replicas": tuple(server.upstream for server in started),
            # One client sends everything here; what a single client may send is not what is measured.
            "rate_limit": 1_000_000,
        }
        gate = gateway.start_gateway(GatewayConfig.parse(values | settings), folder / "gateway.log")
        stop.callback(gate.stop, drain_s=1.0)
        stack = Stack(tuple(started), gate, store, model, secrets.key.read_text("ascii").strip(), secrets.clients)
        stack.wait_ready()
        yield stack


def marina_serve(store: Path) -> Command:
    """`marina serve` of a model store."""

    def command(ports: Mapping[str, int], log: Path) -> Sequence[str]:
        return (
            sys.executable, "-m", "marina", "serve", "--store", str(store), "--device", "cpu", "--log-file", str(log),
            "--port", str(ports["inference_port"]), "--management-port", str(ports["management_port"]),
            "--metrics-port", str(ports["metrics_port"]), "--supervisor-port", str(ports["supervisor_port"]),
        )  # fmt: skip

    return command
