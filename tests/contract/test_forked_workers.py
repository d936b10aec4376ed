"""Workers of a real TorchServe, forked from one process; and what becomes of them when any of these processes ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import requests

from marina import archive, store
from marina.client import ManagementClient
from marina.server import ServedModel, Server
from support import images, torchserve
from support.artifacts import write_artifact
from support.torchserve import eventually, gone

SLOW = 180.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, handlers: Path) -> ServedModel:
    folder = tmp_path_factory.mktemp("forked")
    packed = archive.pack(write_artifact(folder), handlers=handlers, destination=folder / "store")
    store.publish(folder / "store", packed)
    return replace(store.to_serve([packed])[0], scaled=2)


@pytest.fixture(scope="module")
def server(model: ServedModel) -> Iterator[Server]:
    with torchserve.running([model], fork_server=True, log_requests=False) as server:
        yield server


def workers(server: Server) -> list[psutil.Process]:
    """Those that answer. TorchServe calls one ready for a moment after its end."""
    with ManagementClient(server.management_url) as client:
        ready = [worker.pid for worker in client.describe("tiny").workers if worker.ready]
    return [psutil.Process(pid) for pid in ready if psutil.pid_exists(pid)]


def fork_server(server: Server) -> psutil.Process:
    assert server.pid is not None
    return next(
        child for child in psutil.Process(server.pid).children() if "marina.fork_server" in str(child.cmdline())
    )


def settled(server: Server, without: int) -> list[psutil.Process]:
    def ready() -> bool:
        found = [worker.pid for worker in workers(server)]
        return len(found) == 2 and without not in found

    eventually(ready, f"two workers and not {without}\n{server.log_tail()}", seconds=SLOW)
    return workers(server)


def answers(server: Server) -> bool:
    url = f"{server.inference_url}/predictions/tiny"
    return requests.post(url, data=images.photo(1), timeout=SLOW).status_code == 200


def test_they_share_what_they_have_imported(server: Server) -> None:
    parent = fork_server(server)
    for worker in workers(server):
        assert worker.ppid() == parent.pid
        used = worker.memory_full_info()
        assert used.uss < used.rss / 2, "each has imported torch for itself"
    assert answers(server)


def test_a_killed_worker_is_forked_again(server: Server) -> None:
    victim = workers(server)[0]
    victim.kill()
    for worker in settled(server, victim.pid):
        assert worker.ppid() == fork_server(server).pid
    assert answers(server)


def test_a_worker_ends_with_the_process_that_torchserve_kills(server: Server) -> None:
    """As TorchServe ends a worker: SIGKILL to the process that it has started."""
    assert server.pid is not None
    stands_for = [child for child in psutil.Process(server.pid).children() if "marina-worker" in str(child.cmdline())]
    assert len(stands_for) == 2
    before = workers(server)
    stands_for[0].kill()
    eventually(lambda: any(gone([worker]) for worker in before), "one of the two workers ends with it")
    victim = next(worker for worker in before if gone([worker]))
    settled(server, victim.pid)
    assert answers(server)


def test_workers_outlive_the_fork_server_and_come_back_without_it(server: Server) -> None:
    parent, before = fork_server(server), workers(server)
    parent.kill()
    eventually(lambda: gone([parent]), "it ends")
    assert not any(gone([worker]) for worker in before) and answers(server)
    before[0].kill()
    after = settled(server, before[0].pid)
    assert server.pid in {worker.ppid() for worker in after}, "TorchServe's own child: not forked"
    assert answers(server)


def test_nothing_is_left_of_it(model: ServedModel, tmp_path: Path) -> None:
    with torchserve.program([model], tmp_path, fork_server=True) as found:
        started = found.descendants()
        assert len(started) == 6, "java, the fork server, two workers and what stands for them"
        os.kill(found.process.pid, signal.SIGKILL)
        eventually(lambda: gone(started), "all of it ends", seconds=15)
