"""What the autoscaler knows of a version before its workers are taken away."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from marina.autoscale import Autoscale
from marina.autoscale_loop import Autoscaler
from marina.logs import ServerLog
from marina.server import ServedModel
from marina.settings import ServeSettings


class _OneWorker(BaseHTTPRequestHandler):
    """A management interface with one version, whose only worker is this process."""

    def do_GET(self) -> None:
        worker = {"id": "9000", "pid": os.getpid(), "status": "READY", "startTime": "", "gpu": False}
        queue = {"pendingRequests": 0, "remainingCapacity": 100}
        described = {
            "modelName": "m", "modelVersion": "1.0", "modelUrl": "m.mar", "minWorkers": 1, "maxWorkers": 1,
            "batchSize": 1, "maxBatchDelay": 1, "workers": [worker], "jobQueueStatus": queue,
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
