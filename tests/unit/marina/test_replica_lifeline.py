"""What was begun inside a container ends with the command that asked for it: nothing goes on after "reverted".

`docker` is a script that, like the real one, starts a process which does not end with it. That process is the real one, and
talks to a server whose queue never empties, so that a version is never retired.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

from marina import lifeline, remote
from marina.errors import ClientError, Interrupted
from support.commands import ROOT, environment

WITHIN = 60.0
VERSION = {
    "modelName": "m", "modelVersion": "1.0", "modelUrl": "m-1.0.mar", "minWorkers": 1, "maxWorkers": 1, "batchSize": 1,
    "maxBatchDelay": 1, "jobQueueStatus": {"pendingRequests": 1, "remainingCapacity": 9},
    "workers": [{"id": "9000", "pid": 0, "status": "READY", "startTime": "now", "gpu": False}],
}  # fmt: skip


class Busy:
    """A server whose version `m:1.0` always has a request waiting."""

    def __init__(self) -> None:
        self.asked = Event()
        self.changed: list[str] = []

    def port(self) -> Iterator[int]:
        busy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps([VERSION]).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                busy.asked.set()

            def do_DELETE(self) -> None:
                busy.changed.append(self.path)

            do_PUT = do_POST = do_DELETE

            def log_message(self, format: str, *args: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            yield server.server_port
            server.shutdown()
            thread.join()


@pytest.fixture
def busy() -> Busy:
    return Busy()


@pytest.fixture
def inside(busy: Busy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder with `docker`, and, once the process inside has ended, its exit code in `ended`."""
    (tmp_path / "docker").write_text(
        f"""#!/bin/sh
shift 4
exec 3<&0
(setsid '{sys.executable}' -m marina "$@" <&3; echo $? > '{tmp_path}/ending'; mv '{tmp_path}/ending' '{tmp_path}/ended') &
exec 3<&-
wait
"""
    )
    (tmp_path / "docker").chmod(0o755)
    for name, value in environment(ROOT).items():
        monkeypatch.setenv(name, value)
    for port in busy.port():
        monkeypatch.setenv("MARINA_MANAGEMENT_PORT", str(port))
        yield tmp_path


def _container(inside: Path) -> remote.ContainerReplica:
    return remote.ContainerReplica("box", docker=str(inside / "docker"))


def test_ctrl_c_ends_what_runs_inside_before_anything_is_reverted(inside: Path, busy: Busy) -> None:
    def press() -> None:
        busy.asked.wait(WITHIN)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    pressing = Thread(target=press)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        _container(inside).retire("m:1.0")
    assert (inside / "ended").read_text().strip() == str(Interrupted.exit_code)
    pressing.join()
    assert busy.asked.is_set() and busy.changed == []


def test_an_action_that_takes_too_long_has_ended_before_that_is_said(
    inside: Path, busy: Busy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ACTION_SECONDS", 0.2)
    with pytest.raises(ClientError, match="retire did not end within"):
        _container(inside).retire("m:1.0")
    assert (inside / "ended").read_text().strip() == str(Interrupted.exit_code)
    assert busy.changed == []


def test_a_killed_command_leaves_nothing_running_inside(inside: Path, busy: Busy) -> None:
    code = f"from marina import remote; remote.ContainerReplica('box', docker='{inside}/docker').retire('m:1.0')"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as command:
        assert busy.asked.wait(WITHIN)
        command.kill()
    deadline = time.monotonic() + WITHIN
    while not (inside / "ended").exists():
        assert time.monotonic() < deadline, "it runs on inside"
        time.sleep(0.05)
    assert (inside / "ended").read_text().strip() == str(Interrupted.exit_code)
    assert busy.changed == []


@pytest.mark.parametrize("given", ["", "é\n" * 200_000])
def test_the_input_arrives_whole_and_the_pipe_stays_open(given: str) -> None:
    code = "from marina import lifeline; given = lifeline.follow(); print(len(given), given[-2:].encode())"
    done = lifeline.run([sys.executable, "-c", code], given, within=WITHIN)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{len(given)} {given[-2:].encode()!r}\n", "")


def test_an_action_without_anybody_who_waits_for_it_does_not_begin(inside: Path, busy: Busy) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "marina", "replica", "retire", "m:1.0"], stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == Interrupted.exit_code and not busy.asked.is_set()
