"""Which processes the watchdog takes for a worker of its server, and what it makes of their ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from marina import watchdog
from marina.client import ManagementClient
from marina.logs import ServerLog
from marina.quarantine import FOLDER
from marina.server import ServedModel
from marina.settings import ServeSettings
from marina.watch import Watch
from marina.watchdog import Watchdog, _Worker, is_starting
from support.torchserve import eventually

ROOT = Path(__file__).resolve().parents[3]


def test_a_worker_of_another_server_with_the_same_number_is_not_ours(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    command = [sys.executable, "-c", "print(flush=True); input()", "--sock-name", str(other / ".ts.sock.9000")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert is_starting(other, "9000")
        assert not is_starting(ours, "9000")
        assert not is_starting(other, "900")
        process.kill()


def _die_at_work(temp: Path) -> None:
    """A worker that is killed at its first request, and gone before anybody has looked at it."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from handlerlib.quarantine import Guard\n"
        "def work(inputs): os.kill(os.getpid(), signal.SIGKILL)\n"
        "Guard(Path(sys.argv[1])).run([b'deadly'], work)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "handlers")}
    done = subprocess.run([sys.executable, "-c", code, str(temp / FOLDER)], env=environment, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_worker_that_ended_before_the_first_look_is_judged_all_the_same(tmp_path: Path) -> None:
    lines: list[str] = []
    watch = Watch(ManagementClient("http://127.0.0.1:1"), lambda: ())
    dog = Watchdog(tmp_path, ServeSettings(), lambda: (), watch, ServerLog(lines.append, level="info", requests=False))
    try:
        for refused in (0, 1):
            _die_at_work(tmp_path)
            dog.look()
            assert watch.refused == refused
        assert list((tmp_path / FOLDER).glob("worker-*")) == [], "each end is judged once"
    finally:
        dog.stop()
    assert any("has ended a second worker and is refused" in line for line in lines)


def test_a_full_disk_when_a_worker_ends_does_not_end_the_watch(tmp_path: Path) -> None:
    lines: list[str] = []
    watch = Watch(ManagementClient("http://127.0.0.1:1"), lambda: ())
    dog = Watchdog(tmp_path, ServeSettings(), lambda: (), watch, ServerLog(lines.append, level="info", requests=False))
    in_the_way = tmp_path / FOLDER / ".list.json"
    in_the_way.mkdir()  # what cannot be written any more, to whoever runs the tests
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from handlerlib.quarantine import Guard\n"
        "Guard(Path(sys.argv[1])).run([b'deadly'], lambda inputs: print('at it', flush=True) or time.sleep(60))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "handlers")}
    command = [sys.executable, "-c", code, str(tmp_path / FOLDER)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        dog._began(_Worker(), process.pid)
        dog.start()
        process.kill()
    try:
        eventually(lambda: any(str(in_the_way) in line for line in lines), "the trouble is told")
        in_the_way.rmdir()
        eventually((tmp_path / FOLDER / "list.json").exists, "the suspect is made known after all")
        assert sum(str(in_the_way) in line for line in lines) == 1, lines
    finally:
        dog.stop()


@dataclass
class Listed:
    """A management interface whose version has these workers: TorchServe's number of each, and its process."""

    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, worker_id: str) -> subprocess.Popen[bytes]:
        """A process that does nothing, stopped by a signal."""
        process = subprocess.Popen(["sleep", "600"])
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "stopped")
        self.workers[worker_id] = process
        return process

    def describe(self) -> object:
        workers = [
            {"id": worker_id, "pid": process.pid, "status": "READY", "startTime": "", "gpu": False}
            for worker_id, process in self.workers.items()
        ]
        return [{
            "modelName": "m", "modelVersion": "1.0", "modelUrl": "m.mar", "minWorkers": 1, "maxWorkers": 1,
            "batchSize": 1, "maxBatchDelay": 1, "workers": workers,
            "jobQueueStatus": {"pendingRequests": 0, "remainingCapacity": 100},
        }]  # fmt: skip


@contextlib.contextmanager
def _watched(listed: Listed, temp: Path) -> Iterator[Watchdog]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(listed.describe()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    model = ServedModel(name="m", version="1.0", archive_file=temp / "m.mar", default=True, config={"minWorkers": 2})
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        settings = ServeSettings(management_port=server.server_port)
        watch = Watch(ManagementClient(settings.url("management")), lambda: ())
        log = ServerLog(lambda _: None, level="info", requests=False)
        dog = Watchdog(temp, settings, lambda: [model], watch, log)
        try:
            yield dog
        finally:
            dog.stop()
            server.shutdown()
            for process in listed.workers.values():
                process.kill()
                process.wait()


def test_each_worker_waits_for_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "BACKOFF", (0.0, 60.0))
    listed = Listed()
    with _watched(listed, tmp_path) as dog:
        both = [listed.start("9000"), listed.start("9001")]
        for _ in range(2):  # stopped at two looks: ended
            dog.look()
        assert [process.wait(10) for process in both] == [-signal.SIGKILL] * 2, "a fault that met two: both at once"

        again, new = listed.start("9000"), listed.start("9002")
        listed.workers.pop("9001")
        for _ in range(2):
            dog.look()
        assert new.wait(10) == -signal.SIGKILL
        assert again.poll() is None, "this one breaks again and again"
        assert {worker_id for _, worker_id, _ in dog._paces if worker_id} == {"9000", "9002"}, "what is listed"
        monkeypatch.setattr(watchdog, "BACKOFF", (0.0, 0.0))
        dog.look()
        assert again.wait(10) == -signal.SIGKILL
