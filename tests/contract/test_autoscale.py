"""Autoscaling on a real TorchServe: up under load and down after it, asleep and awake again, and never beyond memory."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
import requests

from marina.autoscale import Autoscale
from marina.client import ManagementClient
from marina.gateway import Replica
from marina.replica import LocalReplica
from marina.server import Server
from support import torchserve
from support.gateway import front
from support.torchserve import eventually

pytestmark = pytest.mark.timeout(400)
SLOW = 120.0
"""Seconds, on a machine that has much else to do."""
LOADS = 120
"""MiB that a worker takes beside its interpreter."""
WORK_MS = b"60"


@dataclass
class Scaled:
    """One model, `working`, whose bounds a test sets."""

    server: Server
    log: list[str] = field(default_factory=list)
    policy: Autoscale | None = None

    def ask(self, body: bytes = b"1", *, timeout: float = SLOW) -> requests.Response:
        return requests.post(
            f"{self.server.inference_url}/predictions/working", data=body, timeout=timeout,
            headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip

    def pids(self) -> set[int]:
        """Of the workers in TorchServe's list that are ready."""
        with ManagementClient(self.server.management_url) as client:
            return {worker.pid for worker in client.describe("working").workers if worker.ready}

    def has(self, workers: int, *, seconds: float = SLOW) -> None:
        def so_many() -> bool:
            with ManagementClient(self.server.management_url) as client:
                status = client.describe("working")
            return len(status.workers) == status.ready_workers == workers

        eventually(so_many, f"{workers} workers; the log: {self.log[-5:]}", seconds=seconds)

    def metric(self, name: str) -> float:
        lines = requests.get(f"{self.server.supervisor_url}/metrics", timeout=5).text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def ready(self) -> bool:
        return requests.get(f"{self.server.supervisor_url}/readyz", timeout=5).status_code == 200

    def told(self, words: str) -> int:
        return sum(words in line for line in self.log)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scaled]:
    folder = tmp_path_factory.mktemp("store")
    model = torchserve.pack("working", folder, batchSize=1)
    found: list[Scaled] = []
    server = Server(
        [model],
        torchserve.settings(log_requests=False),
        expected=lambda: [replace(model, autoscale=found[0].policy)],
        environment={**os.environ, "HANDLERLIB": str(torchserve.ROOT / "handlers"), "LOADS": str(LOADS)},
    )
    found.append(Scaled(server))
    server._log._write = found[0].log.append
    with server:
        try:
            yield found[0]
        except BaseException:
            sys.stderr.write("\n".join(found[0].log[-40:]))
            raise


@dataclass(frozen=True)
class Answered:
    """One request of an open loop."""

    status: int
    seconds: float
    """From the moment at which it was to be sent."""


@contextlib.contextmanager
def load(scaled: Scaled, rate: float) -> Iterator[list[Answered]]:
    """So many requests a second at equal distances, whether or not the ones before are answered; all answers."""
    stop, answers = threading.Event(), list[Answered]()

    def ask(planned: float) -> None:
        status = scaled.ask(WORK_MS).status_code
        answers.append(Answered(status, time.monotonic() - planned))

    def keep_asking(pool: ThreadPoolExecutor) -> None:
        planned = time.monotonic()
        while not stop.wait(max(0.0, planned - time.monotonic())):
            pool.submit(ask, planned)
            planned += 1 / rate

    with ThreadPoolExecutor(64) as pool:
        asking = threading.Thread(target=keep_asking, args=(pool,))
        asking.start()
        try:
            yield answers
        finally:
            stop.set()
            asking.join()


def meets_the_objective(answers: list[Answered]) -> bool:
    return len(answers) >= 20 and all(answer.seconds < 0.5 for answer in answers[-20:])


def test_ten_times_the_load_is_mastered_and_its_end_takes_the_workers_away(scaled: Scaled) -> None:
    scaled.policy = Autoscale(min=1, max=3, down_seconds=3)
    scaled.has(1)
    with load(scaled, 2.5) as before:
        eventually(lambda: len(before) >= 10, "some answers", seconds=SLOW)
        assert len(scaled.pids()) == 1
    with load(scaled, 25) as under_load:
        eventually(lambda: len(scaled.pids()) > 1, "more workers", seconds=SLOW)
        eventually(lambda: meets_the_objective(under_load), "answers come in time again", seconds=SLOW)
        assert scaled.ready(), "while workers are added the server stays ready"
    with load(scaled, 2.5) as after:
        eventually(lambda: scaled.told(": down: ") >= 1, "fewer workers", seconds=SLOW)
        scaled.has(1)
    assert {answer.status for answer in (*before, *under_load, *after)} == {200}, "none is lost on the way up or down"
    assert scaled.told("autoscale: working 1.0: up: 1 -> ") == 1 and scaled.told("utilisation")
    assert scaled.metric("marina_worker_restarts") == 0 and scaled.told("recycled") == 0


def test_without_work_there_is_no_worker_and_the_next_requests_wake_one(scaled: Scaled) -> None:
    scaled.policy = Autoscale(min=0, max=2, idle_seconds=2)
    (pid,) = scaled.pids()
    held = psutil.Process(pid).memory_info().rss
    assert held > LOADS << 20
    scaled.has(0)
    eventually(lambda: not psutil.pid_exists(pid), "the worker's memory is given back", seconds=SLOW)
    assert scaled.ready(), "asleep is ready: it would answer"
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: scaled.ask(b"1"), range(10)))
    assert [answer.status_code for answer in answers] == [200] * 10
    assert scaled.told(": sleep: 1 -> 0 workers") >= 1 and scaled.told(": wake: 0 -> 1 workers") == 1


def test_the_gateway_waits_for_a_model_that_wakes(scaled: Scaled, tmp_path: Path) -> None:
    scaled.policy = Autoscale(min=0, max=2, idle_seconds=2)
    scaled.has(0)
    replica = LocalReplica(
        store=tmp_path, inference_url=scaled.server.inference_url,
        management_url=scaled.server.management_url, supervisor_url=scaled.server.supervisor_url,
    )  # fmt: skip
    (status,) = replica.status()
    assert status.asleep and status.autoscale is not None
    assert (status.autoscale["min"], status.autoscale["max"], status.autoscale["wanted"]) == (0, 2, 0)
    settings = scaled.server.settings
    behind = Replica(address=f"127.0.0.1:{settings.inference_port}", health_port=settings.supervisor_port)
    with front(tmp_path, [behind], deadline_ms=100_000) as gate, ThreadPoolExecutor(10) as pool:

        def ask(_: int) -> int:
            headers = {"Authorization": f"Bearer {gate.key}", "Content-Type": "application/octet-stream"}
            url = f"http://127.0.0.1:{gate.port}/predictions/working"
            return requests.post(url, data=b"1", headers=headers, timeout=SLOW).status_code

        assert list(pool.map(ask, range(10))) == [200] * 10
    assert scaled.told(": wake: 0 -> 1 workers") == 2, "once for each sleep"


def test_no_worker_is_added_without_memory_for_it(scaled: Scaled) -> None:
    scaled.policy = Autoscale(min=1, max=3, down_seconds=3)
    scaled.has(1)
    autoscaler = scaled.server._autoscaler
    assert autoscaler is not None
    autoscaler._budget = int(1.5 * (LOADS << 20))
    try:
        with load(scaled, 25):
            eventually(lambda: scaled.metric('marina_autoscale_limited{by="memory"') == 1, "the refusal", seconds=SLOW)
            looks = scaled.server._watch.state.seen_at + 2
            eventually(lambda: scaled.server._watch.state.seen_at > looks, "some more looks", seconds=SLOW)
            assert len(scaled.pids()) == 1
    finally:
        autoscaler._budget = 0
    assert scaled.told("no memory for more: a worker takes ") == 1
    assert scaled.metric("marina_autoscale_worker_host_bytes") > LOADS << 20
