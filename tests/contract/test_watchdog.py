"""Workers that die, hang, break and grow, on a real TorchServe: each is back soon, and log and metrics name the cause."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import requests

from marina.client import ManagementClient
from marina.server import Server
from support import torchserve
from support.torchserve import eventually

WORKERS = 2
SLOW = 90.0
"""Seconds, on a machine that has much else to do."""


@dataclass
class Watched:
    """Two workers of the handler `guarded`, which does what it is told."""

    server: Server
    broken_while: Path
    log: list[str] = field(default_factory=list)

    def ask(self, body: str, *, timeout: float = 30.0) -> requests.Response:
        return requests.post(
            f"{self.server.inference_url}/predictions/guarded", data=body, timeout=timeout,
            headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip

    def pids(self) -> set[int]:
        """Of the workers that are ready."""
        with ManagementClient(self.server.management_url) as client:
            return {worker.pid for worker in client.describe("guarded").workers if worker.ready}

    def wait_ready(self, before: set[int] | None = None, *, gone: int = 0) -> set[int]:
        """Returns when all workers are ready, and `gone` of those `before` are not among them."""
        known = before or set()

        def settled() -> bool:
            now = self.pids()
            return len(now) == WORKERS and len(known - now) == gone

        eventually(settled, f"{WORKERS} workers ready, {gone} of {known} gone", seconds=SLOW)
        return self.pids()

    def recycled(self, cause: str) -> float:
        text = requests.get(f"{self.server.supervisor_url}/metrics", timeout=5).text
        found = re.search(rf'marina_worker_recycles_total\{{cause="{cause}",[^}}]*\}} (\S+)', text)
        return float(found[1]) if found else 0.0

    def teach(self) -> None:
        """Enough quick batches on each worker that a long one stands out."""
        workers, seen = self.pids(), Counter[int]()
        for _ in range(2000):
            seen[self.ask("hello").json()["pid"]] += 1
            if min(seen[pid] for pid in workers) > 20:
                return
        pytest.fail(f"the requests went to {seen}")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("store")
    model = torchserve.pack("guarded", folder, minWorkers=WORKERS, maxWorkers=WORKERS, batchSize=1, responseTimeout=60)
    broken_while = folder / "broken"
    environment = {**os.environ, "HANDLERLIB": str(torchserve.ROOT / "handlers"), "BROKEN_WHILE": str(broken_while)}
    server = Server(
        [model],
        torchserve.settings(hang_seconds=1.5, worker_memory_mb=1000, log_requests=False, fork_server=True),
        environment=environment,
    )
    found = Watched(server, broken_while)
    server._log._write = found.log.append
    with server:
        yield found


@pytest.fixture(autouse=True)
def all_ready(watched: Watched) -> None:
    watched.wait_ready()


def _told(watched: Watched, words: str) -> bool:
    return any(words in line for line in watched.log)


def test_a_killed_worker_is_back_and_its_end_is_told(watched: Watched) -> None:
    before = watched.pids()
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    watched.wait_ready(before, gone=1)
    eventually(lambda: watched.recycled("died") == 1, "the metric", seconds=SLOW)
    assert _told(watched, f"(pid {victim}) of guarded 1.0 is recycled: died: ")


def test_a_stopped_worker_is_recycled_while_others_answer(watched: Watched) -> None:
    before = watched.pids()
    psutil.Process(min(before)).suspend()
    watched.wait_ready(before, gone=1)
    assert watched.recycled("stopped") == 1
    assert _told(watched, "stopped: the process was stopped by a signal")
    assert watched.ask("hello").status_code == 200


def test_a_hanging_worker_is_recycled_long_before_its_timeout(watched: Watched) -> None:
    watched.teach()
    before = watched.pids()
    assert watched.ask("hang", timeout=SLOW).status_code in (500, 507)
    watched.wait_ready(before, gone=1)
    assert watched.recycled("hung") == 1 and _told(watched, "hung: no answer for ")


def test_a_worker_that_spins_is_recycled_because_the_others_move(watched: Watched) -> None:
    watched.teach()
    before = watched.pids()
    answers: list[int] = []
    spinning = threading.Thread(target=lambda: answers.append(watched.ask("spin", timeout=SLOW).status_code))
    spinning.start()
    while spinning.is_alive():
        assert watched.ask("hello").status_code == 200
    spinning.join()
    assert answers[0] in (500, 507)
    watched.wait_ready(before, gone=1)
    assert watched.recycled("hung") == 2


def test_a_lost_gpu_context_is_recycled(watched: Watched) -> None:
    before = watched.pids()
    assert watched.ask("gpu").status_code == 500
    watched.wait_ready(before, gone=1)
    assert watched.recycled("gpu") == 1
    assert _told(watched, "gpu: CUDA error: device-side assert triggered")


def test_a_worker_over_its_memory_finishes_first(watched: Watched) -> None:
    """Clients keep asking: none of them notices."""
    before = watched.pids()
    stop = threading.Event()
    statuses: list[int] = []

    def keep_asking() -> None:
        while not stop.wait(0.02):
            statuses.append(watched.ask("hello").status_code)

    threads = [threading.Thread(target=keep_asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert watched.ask("grow 1000").status_code == 200
        watched.wait_ready(before, gone=1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200}
    assert watched.recycled("memory") == 1 and _told(watched, "MB resident, the limit is 1000 MB")


def test_an_input_that_kills_workers_is_refused_after_the_second_and_no_other(watched: Watched) -> None:
    for _ in range(2):
        before = watched.pids()
        assert watched.ask("kill with this input").status_code in (500, 507)
        watched.wait_ready(before, gone=1)
    before = watched.pids()
    refused = watched.ask("kill with this input")
    assert refused.status_code == 422 and refused.headers["Content-Type"] == "application/problem+json"
    assert "ended two workers" in refused.json()["detail"]
    assert watched.ask("hello").status_code == 200
    assert [watched.ask("kill with this input").status_code for _ in range(10)] == [422] * 10
    assert watched.pids() == before
    assert _told(watched, "is refused with 422 from now on: sha256 ")
    text = requests.get(f"{watched.server.supervisor_url}/metrics", timeout=5).text
    assert "marina_inputs_refused 1.0" in text


def test_torchserves_long_waits_are_cut_short(watched: Watched) -> None:
    """A worker that cannot load for a while: TorchServe would wait 5, 8, 13, 21 s and more between its tries."""
    before = watched.pids()
    watched.broken_while.touch()
    try:
        os.kill(min(before), signal.SIGKILL)
        eventually(lambda: watched.recycled("waiting") >= 1, "its waiting is seen", seconds=SLOW)
        assert watched.ask("hello").status_code == 200, "the other worker serves on all the time"
    finally:
        watched.broken_while.unlink()
    watched.wait_ready(before, gone=1)
    assert _told(watched, "waiting: TorchServe waits before it starts this one again")


def test_when_no_worker_is_left_the_queue_is_served_as_soon_as_one_can_load(watched: Watched) -> None:
    """TorchServe takes requests for dead workers, and would let them hang."""
    before = watched.recycled("waiting")
    watched.broken_while.touch()
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(watched.ask("hello", timeout=2 * SLOW).status_code))
    try:
        for pid in watched.pids():
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not watched.pids(), "no worker left", seconds=SLOW)
        asking.start()
        eventually(lambda: watched.recycled("waiting") >= before + WORKERS, "their waiting is seen", seconds=SLOW)
    finally:
        watched.broken_while.unlink()
    asking.join(2 * SLOW)
    assert answers and answers[0] in (200, 503)
    watched.wait_ready()
