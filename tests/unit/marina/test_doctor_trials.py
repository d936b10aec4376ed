"""What a killed tuner left on the server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from marina.doctor import live
from marina.tune import only_one


class _Trial(BaseHTTPRequestHandler):
    """A management interface with the registration of a tuner."""

    def do_GET(self) -> None:
        described = {
            "modelName": "m--tune", "modelVersion": "1.0", "modelUrl": "m.mar", "minWorkers": 0, "maxWorkers": 0,
            "batchSize": 1, "maxBatchDelay": 1, "workers": [],
            "jobQueueStatus": {"pendingRequests": 0, "remainingCapacity": 100},
        }  # fmt: skip
        listed = {"models": [{"modelName": "m--tune", "modelUrl": "m.mar"}]}
        body = json.dumps([described] if self.path.startswith("/models/") else listed).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_trial_of_a_killed_tuner_is_named_and_one_of_a_tuner_at_work_is_not(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Trial) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        port = server.server_address[1]
        addresses = live.Addresses(
            supervisor="http://127.0.0.1:1", management=f"http://127.0.0.1:{port}", management_port=port
        )
        try:
            with only_one(tmp_path / "runs" / "tune", "m"):
                assert list(live.served(addresses, tmp_path)) == []
            (found,) = live.served(addresses, tmp_path)
        finally:
            server.shutdown()
    assert found.code == "trial-left" and found.severity == "warning"
    assert "m--tune 1.0" in found.cause and "marina tune" in found.remedy
