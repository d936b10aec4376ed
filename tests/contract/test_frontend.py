"""What the patches of TorchServe's front end do, next to the same server without them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from marina import java
from marina.client import ManagementClient
from marina.server import ServedModel, Server
from support import torchserve
from support.torchserve import eventually

BINARY = {"Content-Type": "application/octet-stream"}
QUEUED = 8
LARGE = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return torchserve.pack("batches", tmp_path_factory.mktemp("store"), batchSize=32)


@pytest.fixture(scope="module")
def patched(model: ServedModel) -> Iterator[Server]:
    with torchserve.running([model]) as server:
        yield server


@pytest.fixture(scope="module")
def as_shipped(model: ServedModel) -> Iterator[Server]:
    with torchserve.running([model], frontend_patches=False) as server:
        yield server


def ask(server: Server, body: bytes, name: str = "batches") -> int:
    """The size of the batch in which the request was."""
    url = f"{server.inference_url}/predictions/{name}"
    return int(requests.post(url, data=body, headers=BINARY, timeout=60).text)


def register(server: Server, *, name: str, batch_size: int, delay_ms: int) -> None:
    with ManagementClient(server.management_url) as management:
        archive = server.models[0].archive_file.name
        management.register(archive, workers=1, batch_size=batch_size, max_batch_delay_ms=delay_ms, name=name)


def batch_sizes(server: Server, gate: Path, name: str = "batches") -> list[int]:
    """The batches of requests that queue up while the worker is busy with one that waits for `gate`."""
    with ManagementClient(server.management_url) as management, ThreadPoolExecutor(QUEUED + 1) as pool:

        def pending() -> int:
            return management.describe(name).pending

        # Without it the first of the others could get into its batch.
        started = gate.with_suffix(".started")
        busy = pool.submit(ask, server, f"wait {gate}".encode(), name)
        eventually(started.exists, "the first request is with the worker")
        queued = [pool.submit(ask, server, b"x", name) for _ in range(QUEUED)]
        eventually(lambda: pending() == QUEUED, "the others are queued")
        gate.touch()
        assert busy.result() == 1
        return [future.result() for future in queued]


def test_what_is_queued_is_one_batch(patched: Server, tmp_path: Path) -> None:
    assert batch_sizes(patched, tmp_path / "gate") == [QUEUED] * QUEUED


def test_a_delay_that_is_used_up_does_not_split_the_queue(patched: Server, as_shipped: Server, tmp_path: Path) -> None:
    """0 ms is used up from the start: as shipped, a second request still gets into the batch and no third one."""
    for server in (patched, as_shipped):
        register(server, name="at_once", batch_size=32, delay_ms=0)
    assert batch_sizes(as_shipped, tmp_path / "first", "at_once") == [2] * QUEUED
    assert batch_sizes(patched, tmp_path / "second", "at_once") == [QUEUED] * QUEUED


def test_a_longer_delay_is_still_waited_for(patched: Server) -> None:
    register(patched, name="patient", batch_size=2, delay_ms=30_000)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, patched, b"x", "patient")
        second = _after_the_queue_is_empty(patched, pool, first)
        assert (first.result(), second.result()) == (2, 2)


def _after_the_queue_is_empty(server: Server, pool: ThreadPoolExecutor, first: Future[int]) -> Future[int]:
    with ManagementClient(server.management_url) as management:
        metrics = f"{server.metrics_url}/metrics"
        accepted = 'ts_inference_requests_total{model_name="patient"'
        eventually(lambda: accepted in requests.get(metrics, timeout=5).text, "the first request is accepted")
        eventually(lambda: all(item.pending == 0 for item in management.status()), "it is taken from the queue")
    assert not first.done()
    return pool.submit(ask, server, b"x", "patient")


def test_no_thread_is_started_for_a_batch(patched: Server, as_shipped: Server) -> None:
    if java.find().major < 25:
        pytest.skip("older javas start one thread per batch on two cores, which is gone before it can be seen")
    for server in (patched, as_shipped):
        assert ask(server, b"x") == 1
    assert not [name for name in thread_names(patched) if name.startswith("ForkJoinPool")]
    assert [name for name in thread_names(as_shipped) if name.startswith("ForkJoinPool")]


def test_a_large_body_is_read_in_large_pieces(patched: Server, as_shipped: Server) -> None:
    as_before, now = reads_of_a_large_body(as_shipped), reads_of_a_large_body(patched)
    assert as_before >= LARGE // 4096
    assert now < as_before / 4


def reads_of_a_large_body(server: Server) -> int:
    before = reads(server)
    assert ask(server, bytes(LARGE)) == 1
    return reads(server) - before


def reads(server: Server) -> int:
    """Read system calls of java so far."""
    lines = Path(f"/proc/{server.pid}/io").read_text().splitlines()
    return int(next(line.removeprefix("syscr: ") for line in lines if line.startswith("syscr: ")))


def thread_names(server: Server) -> list[str]:
    return [comm.read_text().strip() for comm in Path(f"/proc/{server.pid}/task").glob("*/comm")]
