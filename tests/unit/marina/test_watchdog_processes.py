"""Which processes the watchdog takes for a worker of its server, and what it makes of their ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from marina.client import ManagementClient
from marina.logs import ServerLog
from marina.quarantine import FOLDER
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
