"""What a rollout does about TorchServe's own races, with a small server that behaves as TorchServe does in them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from marina import processes
from marina import replica as replica_module
from marina.client import ModelStatus, WorkerStatus
from marina.errors import ClientError, Refused
from marina.parking import Parking, folder_of
from marina.replica import LocalReplica

NOBODY = 2**22 + 1
"""A process id that no machine has."""
RACE = 'Cannot invoke "org.pytorch.serve.job.Job.isControlCmd()" because "job" is null'


@dataclass
class Management:
    """A model with the workers `pids`; the first `refusals` scalings take effect and are answered with 500."""

    pids: list[int]
    refusals: int = 0
    message: str = RACE
    dead: int = -1
    """The worker that has no process any more, and is not ready."""
    scalings: list[int] = field(default_factory=list)

    def scale(self, workers: int) -> tuple[int, dict[str, object]]:
        self.scalings.append(workers)
        self.pids = self.pids[:workers] + [NOBODY] * (workers - len(self.pids))
        if len(self.scalings) <= self.refusals:
            return 500, {"code": 500, "type": "NullPointerException", "message": self.message}
        return 202, {"status": "Processing worker updates..."}

    def describe(self) -> list[dict[str, object]]:
        workers = [
            {
                "id": str(pid), "pid": pid, "status": "UNLOADING" if pid == self.dead else "READY",
                "startTime": "2026-01-01T00:00:00.000Z", "gpu": False,
            }
            for pid in self.pids
        ]  # fmt: skip
        queue = {"pendingRequests": 0, "remainingCapacity": 100}
        return [{
            "modelName": "m", "modelVersion": "1.0", "modelUrl": "m.mar", "minWorkers": 1, "maxWorkers": 2,
            "batchSize": 1, "maxBatchDelay": 1, "workers": workers, "jobQueueStatus": queue,
        }]  # fmt: skip


def _handler(management: Management) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            (wanted,) = [part for part in self.path.partition("?")[2].split("&") if part.startswith("min_worker=")]
            self._answer(*management.scale(int(wanted.partition("=")[2])))

        def do_GET(self) -> None:
            self._answer(200, management.describe())

        def _answer(self, status: int, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    found = [subprocess.Popen(["sleep", "600"], env=environment) for _ in range(2)]
    for process in found:
        (tmp_path / f".ts.sock.{process.pid}").touch()
    yield found
    for process in found:
        process.kill()
        process.wait()


@pytest.fixture
def management(workers: list[subprocess.Popen[bytes]]) -> Management:
    return Management([process.pid for process in workers])


@pytest.fixture
def replica(management: Management, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalReplica]:
    monkeypatch.setattr(processes, "_LEFT_OVER_SECONDS", 0.2)
    monkeypatch.setattr(replica_module, "_NOTICE_SECONDS", 0.2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(management))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    yield LocalReplica(store=tmp_path, inference_url=url, management_url=url, supervisor_url="")
    server.shutdown()
    server.server_close()


def _found(replica: LocalReplica) -> ModelStatus:
    (status,) = replica._management.versions("m")
    return status


def test_a_scaling_that_met_a_describe_is_repeated_and_nothing_is_left_behind(
    replica: LocalReplica, management: Management, workers: list[subprocess.Popen[bytes]]
) -> None:
    management.refusals = 2
    replica._scale_list(_found(replica), 1)
    assert management.scalings == [1, 1, 1]
    assert workers[1].wait(10) == -9, "taken from the list, and its process was still there"
    assert workers[0].poll() is None


def test_other_errors_and_a_race_without_end_are_told(replica: LocalReplica, management: Management) -> None:
    management.refusals = 100
    with pytest.raises(Refused):
        replica._scale_list(_found(replica), 2)
    assert management.scalings == [2, 2, 2]
    management.message = "something else"
    with pytest.raises(Refused):
        replica._scale_list(_found(replica), 2)
    assert len(management.scalings) == 4


@pytest.mark.parametrize("elsewhere", ["no socket of that number", "no such process"])
@pytest.mark.parametrize("change", ["scale", "retire", "begin anew"])
def test_workers_of_another_machine_are_left_alone_and_so_are_our_processes(
    elsewhere: str,
    change: str,
    replica: LocalReplica,
    management: Management,
    workers: list[subprocess.Popen[bytes]],
    tmp_path: Path,
) -> None:
    """The process ids that a server names are numbers of its own machine."""
    if elsewhere == "no such process":
        management.pids = [NOBODY, NOBODY - 1]
    else:
        (tmp_path / f".ts.sock.{workers[1].pid}").unlink()
    with pytest.raises(ClientError, match=r"m:1\.0 are not processes that this user can reach") as caught:
        if change == "scale":
            replica.scale("m:1.0", 1)
        elif change == "retire":
            replica.retire("m:1.0")
        else:
            replica._begin_anew(_found(replica), 2)
    assert "ssh" in caught.value.remedy
    assert management.scalings == []
    assert [process.poll() for process in workers] == [None, None]


def test_what_ends_no_worker_needs_none_of_its_processes(replica: LocalReplica, management: Management) -> None:
    management.pids = [NOBODY]
    replica.scale("m:1.0", 1)
    replica.scale("m:1.0", 2)
    assert management.scalings == [1, 2]


@pytest.mark.parametrize("number", ["nobody's", "another process's by now"])
def test_a_worker_that_has_ended_is_in_nobodys_way(
    number: str,
    replica: LocalReplica,
    management: Management,
    workers: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Parking, "supported", lambda self, within: True)
    monkeypatch.setattr(replica_module, "DRAIN_SECONDS", 0.3)
    management.dead = NOBODY if number == "nobody's" else workers[1].pid
    management.pids = [workers[0].pid, management.dead]
    (replica._store / f".ts.sock.{workers[1].pid}").unlink()
    replica.scale("m:1.0", 1)
    assert management.scalings == [1] and [process.poll() for process in workers] == [None, None]


def test_only_ended_workers_need_not_be_parked() -> None:
    with Parking("http://127.0.0.1:1", "m", "1.0") as parking:
        parking.park([NOBODY, -1], within=0.1)
    with (
        subprocess.Popen(["sleep", "600"], env={"PATH": os.environ["PATH"]}) as other,
        Parking("http://127.0.0.1:1", "m", "1.0") as parking,
    ):
        with pytest.raises(ClientError, match=f"process {other.pid} is not a worker that this user can reach"):
            parking.park([other.pid], within=0.1)
        other.kill()


def test_a_worker_may_listen_at_a_port(tmp_path: Path) -> None:
    """use_native_io=false: TorchServe gives it a port, and no socket in a folder."""
    code = "import socket; a = socket.create_server(('127.0.0.1', 0)); print(a.getsockname()[1], flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        worker = WorkerStatus(id=str(port), pid=process.pid, ready=True, started="", gpu=False)
        assert folder_of(worker) == tmp_path
        assert folder_of(dataclasses.replace(worker, id="1")) is None
        process.kill()
