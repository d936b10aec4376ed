"""A real engine: the stack of docker-compose.yml under a project name and a port of its own, and load on its gateway."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest
import requests

from marina import compose, engine
from marina.compose import Container, Running, Stack
from marina.engine import Engine
from marina.errors import ServerError
from marina.home import Home
from support.gateway import free_port

ROOT = Path(__file__).resolve().parents[2]
BASE_IMAGE = "debian:bookworm-slim"
IMAGE = "marina-test"
HAPROXY_IMAGE = "marina-test-haproxy"
PROMETHEUS_IMAGE = "marina-test-prometheus"
START_ENGINE = "start one: dockerd; .ci/docker-engine does everything that the tests need"
SERVICES = ("gateway", "torchserve", "prometheus")
"""All but Grafana, which Debian does not package."""


def require_engine() -> Engine:
    """Skip where no engine with the base image is reachable; in CI that is a failure."""
    try:
        found = engine.find_engine()
        found.ask("image", "inspect", BASE_IMAGE)
    except ServerError as error:
        if os.environ.get("CI"):
            pytest.fail(f"no container tier: {error}; {START_ENGINE}")
        pytest.skip(f"{error}; {START_ENGINE}")
    return found


def build(tag: str, folder: Path) -> None:
    """An image of deploy/debian-images."""
    docker("build", "--quiet", "--tag", tag, str(folder))


def docker(*arguments: str, check: bool = True) -> str:
    """What the docker program prints; its messages when it fails."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 or not check, f"docker {' '.join(arguments)}: {done.stderr}{done.stdout}"
    return done.stdout.strip()


def project(folder: Path) -> Home:
    """A project folder of its own with everything that `marina up` reads: no `.env`, keys or stack of a developer."""
    for name in ("deploy", "marina", "handlers"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".dockerignore", "config.properties", "docker-compose.yml", "docker-compose.cpu.yml"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / "model_store").mkdir()
    return Home(folder)


def environment(*, replicas: int = 1, **extra: str) -> dict[str, str]:
    """For one stack with a name and a port of its own."""
    foreign = ("GATEWAY_", "GPU_", "COMPOSE_", "TORCHSERVE_", "MARINA_", "PROMETHEUS_")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
        "COMPOSE_PROJECT_NAME": f"marina-test-{uuid.uuid4().hex[:8]}",
        "GATEWAY_PORT": str(free_port()),
        "GATEWAY_TLS_PORT": str(free_port()),
        "BASE_IMAGE": BASE_IMAGE,
        "TORCHSERVE_IMAGE": IMAGE,
        "HAPROXY_IMAGE": HAPROXY_IMAGE,
        "PROMETHEUS_IMAGE": PROMETHEUS_IMAGE,
        "TORCHSERVE_REPLICAS": str(replicas),
        **extra,
    }


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A running stack, as a test sees it."""

    running: Running
    stack: Stack

    @property
    def home(self) -> Home:
        return self.stack.home

    @property
    def project(self) -> str:
        return self.stack.environment["COMPOSE_PROJECT_NAME"]

    @property
    def settings(self) -> dict[str, str]:
        """The variables that make a command mean this stack."""
        return settings(self.stack.environment)

    @property
    def key(self) -> str:
        return self.running.key_file.read_text().strip()

    @property
    def port(self) -> int:
        return self.stack.published.port

    def replicas(self) -> list[Container]:
        return self.stack.containers("torchserve")

    def scale(self, replicas: int) -> None:
        """`marina up` once more with another number of replicas."""
        wanted = {**self.stack.environment, "TORCHSERVE_REPLICAS": str(replicas)}
        compose.up(self.stack.home, "cpu", services=SERVICES, build=False, environment=wanted)

    def ask(
        self, path: str, *, method: str = "POST", key: str | None = "", body: bytes | None = None
    ) -> tuple[int, bytes]:
        """Status and body of one request to the gateway. `key=""` sends the first client's key, None sends none."""
        headers = {} if key is None else {"Authorization": f"Bearer {key or self.key}"}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def wait_ready(self, replicas: int, *, within_s: float = 90.0) -> None:
        """Until that many replicas say that they are ready and the gateway sends them requests."""
        eventually(lambda: self._in_service() == replicas, f"{replicas} replicas in service", self, within_s=within_s)

    def _in_service(self) -> int:
        figures = self.inside("gateway", 8405, "/metrics").splitlines()
        status = [line for line in figures if line.startswith('haproxy_server_status{proxy="predictions"')]
        return sum('state="UP"' in line and line.endswith(" 1") for line in status)

    def inside(self, service: str, port: int, path: str) -> str:
        """What a port answers that is not published."""
        return requests.get(f"{self.stack.internal_url(service, port)}{path}", timeout=5).text

    def logs(self) -> str:
        """The end of every container's log."""
        return self.stack.run("logs", "--no-color", "--tail=30")


@contextlib.contextmanager
def deployment(home: Home, *, replicas: int = 1, build: bool = False, **extra: str) -> Iterator[Deployment]:
    """`marina up` and, in the end, `marina down`."""
    wanted = environment(replicas=replicas, **extra)
    stack = compose.open_stack(home, "cpu", environment=wanted)
    try:
        running = compose.up(home, "cpu", services=SERVICES, build=build, environment=wanted)
        yield Deployment(running=running, stack=stack)
    except ServerError as error:
        pytest.fail(f"{error}\n{stack.run('logs', '--no-color', '--tail=60')}")
    finally:
        compose.down(home, environment=wanted)


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What an environment adds to that of the tests."""
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


def inspect(container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("inspect", container))[0]
    return found


def leftovers(project: str) -> dict[str, list[str]]:
    """Everything on the engine that carries the project's label."""
    label = f"label=com.docker.compose.project={project}"
    return {
        "containers": docker("ps", "-a", "-q", "--filter", label).split(),
        "networks": docker("network", "ls", "-q", "--filter", label).split(),
        "volumes": docker("volume", "ls", "-q", "--filter", label).split(),
    }


def eventually(
    condition: Callable[[], bool], what: str, deployed: Deployment | None = None, *, within_s: float = 30.0
) -> None:
    """Poll until true; the containers' last words when it does not come."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s:g} s: {what}\n{deployed.logs() if deployed else ''}")
        time.sleep(0.1)


@dataclass
class Load:
    """Four clients with kept connections that send at most 80 predictions a second as long as the block lasts.

    Below the gateway's limit of one key, 100 a second, which a fast machine would otherwise meet.
    """

    deployed: Deployment
    path: str
    body: bytes
    clients: int = 4
    answers: list[tuple[int, bytes]] = field(default_factory=list)
    """(status, body); status -1: no answer."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: Sequence[threading.Thread] = ()

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()
        self.wait_for(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def wait_for(self, more: int) -> None:
        """Return after that many further answers."""
        goal = len(self.answers) + more
        eventually(lambda: len(self.answers) >= goal, f"{more} more answers", self.deployed, within_s=60)

    def failures(self) -> list[tuple[int, bytes]]:
        return [answer for answer in self.answers if answer[0] != 200]

    def _run(self) -> None:
        connection = HTTPConnection("127.0.0.1", self.deployed.port, timeout=30)
        headers = {"Authorization": f"Bearer {self.deployed.key}"}
        while not self._stop.wait(0.05):
            try:
                connection.request("POST", self.path, self.body, headers)
                answer = connection.getresponse()
                self.answers.append((answer.status, answer.read()))
            except (OSError, HTTPException) as error:
                self.answers.append((-1, repr(error).encode()))
                connection.close()
        connection.close()
