"""Workers forked from one process: to TorchServe, and to the worker, as if each had been started by itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from marina import processes
from marina.fork_server import SOCKET_VARIABLE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forked workers are for Linux")

SERVER = "import sys; from marina.fork_server import main; main(sys.argv[1], ('yaml', 'handlerlib.errors'))"
WORKER = """
import json, os, sys
sys.stdout.write(json.dumps({
    "pid": os.getpid(), "argv": sys.argv, "cwd": os.getcwd(), "path": sys.path, "name": __name__,
    "variable": os.environ.get("TS_OWN"), "hidden": os.environ.get("MARINA_GONE"),
    "modules": [name for name in sys.modules if name.partition(".")[0] in ("yaml", "handlerlib")],
}) + "\\n")
sys.stdout.flush()
word = sys.stdin.readline().strip()
if word == "fail":
    raise ValueError("as asked")
if word == "refuse":
    sys.exit("no licence")
if "--at-exit" in sys.argv:
    import atexit
    atexit.register(lambda: sys.stderr.write("said at exit"))
sys.exit(int(word or 0))
"""
DEADLINE = 60.0


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def ended(pid: int) -> bool:
    """Whether no such process runs."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Started:
    """A process that stands for a worker, and what that worker said of itself."""

    def __init__(self, folder: Path, environment: Mapping[str, str], *arguments: str) -> None:
        command = [sys.executable, "-c", "from marina.fork_worker import main; main()"]
        script = folder / "model_service_worker.py"
        script.write_text(WORKER)
        self.process = subprocess.Popen(
            [*command, str(script), *arguments],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said, self.process.stderr.read() if self.process.stderr else ""
        self.said = json.loads(said)
        self.pid: int = self.said["pid"]

    def close(self) -> None:
        """End it."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        self.process.wait()

    def tell(self, word: str) -> str:
        """Say it to the worker; what it writes to standard error, at its end."""
        return self.process.communicate(word + "\n", timeout=DEADLINE)[1]


Start = Callable[..., Started]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    names = {name: value for name, value in os.environ.items() if not name.startswith(("TS_", "MARINA_"))}
    return {**names, SOCKET_VARIABLE: str(tmp_path / "s")}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def started(environment: Mapping[str, str], *arguments: str) -> Started:
            worker = Started(tmp_path, environment, *arguments)
            stack.callback(worker.close)
            return worker

        yield started


def beside(path: Path) -> list[str]:
    return [sys.executable, "-c", SERVER, str(path), "-" * 600]


@pytest.fixture
def server(tmp_path: Path, environment: dict[str, str]) -> Iterator[psutil.Process]:
    """Beside a program that has java's place, as the supervisor starts it."""
    path = tmp_path / "s"
    java = processes.spawn(
        ["/bin/sleep", "1000"], environment={**environment, "MARINA_GONE": "1"}, folder=tmp_path, beside=beside(path)
    )
    try:
        until(lambda: path.exists() or java.poll() is not None, "no socket")
        yield psutil.Process(java.pid).children()[0]
    finally:
        processes.kill_session(java)
        assert java.stdout is not None
        java.stdout.close()


def test_it_is_what_python_would_have_started(
    server: psutil.Process, start: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    worker = start({**environment, "TS_OWN": "yes", "PYTHONPATH": str(folder)}, "--sock-name", "x y")
    assert worker.pid != worker.process.pid and psutil.Process(worker.pid).ppid() == server.pid
    assert worker.said["argv"] == [str(tmp_path / "model_service_worker.py"), "--sock-name", "x y"]
    assert worker.said["cwd"] == str(tmp_path) and worker.said["name"] == "__main__"
    assert worker.said["path"][:2] == [str(tmp_path), str(folder)]
    assert worker.said["variable"] == "yes" and worker.said["hidden"] is None
    assert [part for part in psutil.Process(worker.pid).cmdline() if part][1:] == worker.said["argv"]
    assert "yaml" in worker.said["modules"] and "handlerlib" not in worker.said["modules"]
    worker.tell("7")
    assert worker.process.returncode == 7


def test_a_traceback_is_where_torchserve_looks(
    server: psutil.Process, start: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    worker = start(environment)
    assert "ValueError: as asked" in worker.tell("fail")
    assert worker.process.returncode == 1


def test_whoever_kills_one_kills_the_other(
    server: psutil.Process, start: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    first, second = start(environment), start(environment)
    first.process.kill()
    until(lambda: ended(first.pid), "the worker outlives the process that stands for it")
    os.kill(second.pid, signal.SIGKILL)
    assert second.process.wait(DEADLINE) == -signal.SIGKILL
    third = start(environment)
    third.process.terminate()
    assert third.process.wait(DEADLINE) == -signal.SIGTERM
    assert ended(third.pid)


def test_a_worker_outlives_the_fork_server_and_is_still_stood_for(
    server: psutil.Process, start: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    worker = start(environment)
    server.kill()
    until(lambda: ended(server.pid), "it ends")
    assert psutil.Process(worker.pid).is_running() and worker.process.poll() is None
    worker.tell("0")
    assert worker.process.returncode == 1, "how it ended, nobody can say"
    assert ended(worker.pid)


@pytest.mark.parametrize("other", [{"OMP_NUM_THREADS": "63"}, {SOCKET_VARIABLE: "/nowhere/s"}, {SOCKET_VARIABLE: ""}])
def test_what_cannot_be_forked_starts_by_itself(
    server: psutil.Process, start: Start, environment: dict[str, str], tmp_path: Path, other: dict[str, str]
) -> None:
    worker = start(environment | other)
    assert worker.pid == worker.process.pid
    assert worker.said["argv"] == [str(tmp_path / "model_service_worker.py")]
    said = worker.tell("3")
    assert worker.process.returncode == 3
    assert ("OMP_NUM_THREADS" in said) == ("OMP_NUM_THREADS" in other)


def test_many_at_once(server: psutil.Process, start: Start, environment: dict[str, str]) -> None:
    workers = [start(environment) for _ in range(12)]
    assert len({worker.pid for worker in workers}) == 12
    for number, worker in enumerate(workers):
        worker.tell(str(number))
    assert [worker.process.returncode for worker in workers] == list(range(12))
    until(lambda: not server.children(), "children that nobody reaped")
    until(lambda: server.num_fds() <= 8, f"open descriptors are left: {server.open_files()}")


def test_it_ends_with_java_however_soon_that_is(tmp_path: Path, environment: dict[str, str]) -> None:
    """It holds java's standard streams: a supervisor would wait for their end until its patience is over."""
    for program in ("/bin/true", "/bin/cat"):  # one ends before the fork server has begun, one when it is told to
        java = processes.spawn([program], environment=environment, folder=tmp_path, beside=beside(tmp_path / "s"))
        assert java.stdout is not None
        with java.stdout:
            assert java.stdout.read() == b""
        assert java.wait(DEADLINE) == 0


def test_what_a_worker_leaves_for_its_end_is_done(
    server: psutil.Process, start: Start, environment: dict[str, str]
) -> None:
    assert "said at exit" in start(environment, "--at-exit").tell("0")
    worker = start(environment)
    assert "no licence" in worker.tell("refuse")
    assert worker.process.returncode == 1
