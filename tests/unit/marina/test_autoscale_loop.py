"""What the autoscaler knows of a version before its workers are taken away."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from marina.autoscale import Autoscale
from marina.autoscale_loop import Autoscaler, _Version
from marina.autoscale_memory import Cost
from marina.logs import ServerLog
from marina.server import ServedModel
from marina.settings import ServeSettings


class _OneWorker(BaseHTTPRequestHandler):
    """A management interface with one version, whose only ready worker is this process."""

    loading = 0
    """Further ones."""

    def do_GET(self) -> None:
        worker = {"id": "9000", "pid": os.getpid(), "status": "READY", "startTime": "", "gpu": False}
        under_way = {**worker, "id": "9001", "pid": -1, "status": "UNLOADING"}
        queue = {"pendingRequests": 0, "remainingCapacity": 100}
        described = {
            "modelName": "m", "modelVersion": "1.0", "modelUrl": "m.mar", "minWorkers": 1, "maxWorkers": 1,
            "batchSize": 1, "maxBatchDelay": 1, "workers": [worker, *[under_way] * self.loading], "jobQueueStatus": queue,
        }  # fmt: skip
        body = json.dumps([described]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_worker_is_measured_before_its_version_can_go_to_sleep(tmp_path: Path) -> None:
    """Else nobody knows whether there is memory to wake it."""
    model = ServedModel(
        name="m", version="1.0", archive_file=tmp_path / "m.mar", default=True, config={"minWorkers": 1},
        autoscale=Autoscale(min=0, max=4),
    )  # fmt: skip
    with ThreadingHTTPServer(("127.0.0.1", 0), _OneWorker) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        port = server.server_address[1]
        scaler = Autoscaler(
            tmp_path, ServeSettings(management_port=port, metrics_port=1), lambda: [model],
            ServerLog(lambda _: None, level="info", requests=False),
            may_sleep=True, changing=threading.Lock(), alone=lambda: contextlib.nullcontext(True),
        )  # fmt: skip
        try:
            scaler.look(100.0)
            (known,) = scaler.scaling()
        finally:
            scaler.stop()
            server.shutdown()
    assert known.reason and known.host_bytes > 1 << 20


def test_what_workers_that_load_will_take_of_a_gpu_is_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,400 MiB are to be had; a worker takes 1,000."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\ncase $1 in\n*gpu=*) echo '2600, 4000';;\nesac\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    model = ServedModel(
        name="m", version="1.0", archive_file=tmp_path / "m.mar", default=True, config={"minWorkers": 1},
        autoscale=Autoscale(min=1, max=4),
    )  # fmt: skip
    known = _Version(Autoscale(min=1, max=4), cost=Cost(host=1, gpu=1000 << 20), cost_at=100.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), _OneWorker) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        scaler = Autoscaler(
            tmp_path, ServeSettings(management_port=server.server_port, metrics_port=1), lambda: [model],
            ServerLog(lambda _: None, level="info", requests=False),
            may_sleep=True, changing=threading.Lock(), alone=lambda: contextlib.nullcontext(True),
        )  # fmt: skip
        scaler._versions["m", "1.0"] = known
        try:
            assert scaler._room(known, 100.0)[0] == 2
            monkeypatch.setattr(_OneWorker, "loading", 1)
            room, words = scaler._room(known, 100.0)
        finally:
            scaler.stop()
            server.shutdown()
    assert room == 1
    assert "1000 MiB on a GPU of it for workers that load" in words
