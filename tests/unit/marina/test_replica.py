"""What a rollout does about TorchServe's own races, with a small server that behaves as TorchServe does in them."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from marina import processes
from marina.client import ModelStatus
from marina.errors import Refused
from marina.replica import LocalReplica

RACE = 'Cannot invoke "org.pytorch.serve.job.Job.isControlCmd()" because "job" is null'


@dataclass
class Management:
    """A model with the workers `pids`; the first `refusals` scalings take effect and are answered with 500."""

    pids: list[int]
    refusals: int = 0
    message: str = RACE
    scalings: list[int] = field(default_factory=list)

    def scale(self, workers: int) -> tuple[int, dict[str, object]]:
        self.scalings.append(workers)
        self.pids = self.pids[:workers]
        if len(self.scalings) <= self.refusals:
            return 500, {"code": 500, "type": "NullPointerException", "message": self.message}
        return 202, {"status": "Processing worker updates..."}

    def describe(self) -> list[dict[str, object]]:
        workers = [
            {"id": str(pid), "pid": pid, "status": "READY", "startTime": "2026-01-01T00:00:00.000Z", "gpu": False}
            for pid in self.pids
        ]
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
def workers() -> Iterator[list[subprocess.Popen[bytes]]]:
    found = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
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
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(management))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    yield LocalReplica(store=tmp_path, inference_url=url, management_url=url, supervisor_url=url)
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
