"""One process that has imported torch, from which every worker is forked: memory is shared, and a worker starts at once.

`import torch` with CUDA libraries costs each worker two seconds of processor time and some 280 MB of its own. Here it is
paid once per server: workers share those pages until they write to them (copy on write), and one that replaces a killed
worker, or that a rollout adds, is there in the time of a fork. The idea is that of `multiprocessing`'s fork server and of
gunicorn's `preload_app`; what makes it safe is that this process starts no thread, that those which numpy's OpenBLAS starts
end before each fork (its own `pthread_atfork`), and that no GPU is touched.

TorchServe starts a worker as `marina-worker .../ts/model_service_worker.py --sock-name ...` (`marina.fork_worker`). That
small process asks here for the real worker, hands over its standard streams, passes signals on and ends as the worker
ends; TorchServe sees one process whichever of the two it looks at. What cannot be forked runs as TorchServe would run it.

Protocol, over a Unix socket of packets: the asking process sends `{"argv", "cwd", "environment"}` as JSON with the file
descriptors 0, 1 and 2; the answer is `{"pid": N}` or `{"refused": why}`, and later `{"status": N}` as `os.waitpid` gives
it. The worker keeps its end of the connection: when the asking process dies, the kernel sends the worker SIGKILL, so that
whoever kills the one kills the other.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from marina.worker_start import gently, handlers, import_gently

SOCKET_VARIABLE = "MARINA_FORK_SOCKET"
"""Name of the environment variable that holds the socket's path."""

MESSAGE_BYTES = 192 * 1024
"""Of the longest request; a packet must fit into the socket's buffer, 208 KiB by default."""

PRELOADED = (
    "torch",
    "handlerlib.lean",
    "numpy",
    "psutil",
    "yaml",
    "safetensors.torch",
    "ts.arg_parser",
    "ts.async_service",
    "ts.metrics.metric_cache_yaml_impl",
    "ts.model_loader",
    "ts.service",
)
"""What every worker of ours imports before it looks at its archive. One that is not there is left out."""

_ARCHIVES_OWN = ("handlerlib",)
"""Packages that each archive brings itself: none of ours may be in their place."""

PER_WORKER = ("PYTHONPATH", "CUDA_VISIBLE_DEVICES", "METRICS_LOCATION", "LOG_LOCATION")
"""Environment variables that may differ from this process's without having been read already, as may those whose names
start with `TS_` or `MARINA_`. With any other difference the worker is not forked."""

_FORK_ROOM = 1024
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Asked:
    """One worker that is wanted."""

    argv: Sequence[str]
    """The script of the worker and its arguments."""
    cwd: str
    environment: Mapping[str, str]
    streams: Sequence[int]
    """Standard input, output and error."""


@dataclass
class ForkServer:
    """The loop. Single-threaded, so that a fork copies no lock that somebody holds."""

    listener: socket.socket
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    """What the modules have been imported with."""
    path: Sequence[str] = field(default_factory=lambda: [entry for entry in sys.path if entry])
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _workers: dict[int, tuple[int, socket.socket]] = field(default_factory=dict)
    """pidfd -> process id and the connection of the process that asked for it."""

    def run(self) -> NoReturn:
        """For ever: the process ends with java, by its parent-death signal."""
        self._selector.register(self.listener, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self.listener:
                    with contextlib.suppress(OSError):  # no descriptor is left, or nobody is there any more
                        connection, _ = self.listener.accept()
                        self._selector.register(connection, selectors.EVENT_READ)
                elif isinstance(key.fileobj, socket.socket):
                    self._selector.unregister(key.fileobj)
                    self._serve(key.fileobj)
                else:
                    self._ended(key.fd)

    def _serve(self, connection: socket.socket) -> None:
        streams: list[int] = []
        pid = 0
        try:
            asked = _receive(connection, streams)
            if asked is None:
                connection.close()
                return
            different = sorted(_different(asked.environment, self.environment))
            if different:
                _send(connection, {"refused": f"other values of {', '.join(different)}"})
                connection.close()
                return
            pid = os.fork()
            if pid == 0:
                self._become(asked, connection)
            watched = os.pidfd_open(pid)
            self._selector.register(watched, selectors.EVENT_READ)
            self._workers[watched] = (pid, connection)
            _send(connection, {"pid": pid})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if pid:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            _send(connection, {"refused": f"{type(error).__name__}: {error}"})
            connection.close()
        finally:
            for stream in streams:
                os.close(stream)

    def _ended(self, watched: int) -> None:
        self._selector.unregister(watched)
        pid, connection = self._workers.pop(watched)
        _, status = os.waitpid(pid, 0)
        os.close(watched)
        _send(connection, {"status": status})
        connection.close()

    def _leave(self) -> None:
        """Close, in a new worker, what belongs to the fork server."""
        for key in [*self._selector.get_map().values()]:
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()
        for watched, (_, other) in self._workers.items():
            os.close(watched)
            other.close()

    def _become(self, asked: Asked, connection: socket.socket) -> NoReturn:
        """In the new process: be what TorchServe would have started. Does not return."""
        code = 1
        try:
            _die_with(connection)
            self._leave()
            for number, stream in enumerate(asked.streams):
                os.dup2(stream, number)
            for stream in asked.streams:
                os.close(stream)
            _set_environment(asked.environment)
            os.chdir(asked.cwd)
            _show_as([sys.executable, *asked.argv])
            code = _run(asked, self.path)
        except BaseException:  # noqa: BLE001 - the end of a process: shown, and then its exit status
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(BaseException):
                # As the end of an interpreter: os._exit leaves both out.
                threading._shutdown()  # type: ignore[attr-defined]
                atexit._run_exitfuncs()
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


def command(path: Path) -> list[str]:
    """How it is started, listening at `path`. The last argument has no meaning: it is where `_show_as` writes to."""
    start = "import sys; from marina.fork_server import main; main(sys.argv[1])"
    return [sys.executable, "-P", "-s", "-u", "-c", start, str(path), "-" * _FORK_ROOM]


def main(path: str, modules: Sequence[str] = PRELOADED) -> NoReturn:
    """Listen at `path`, import `modules`, and fork workers until java ends.

    java is the parent and leads the session. Raises OSError when it cannot listen at `path`.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != os.getsid(0):  # java, whose session this is, has ended already
        sys.exit(1)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    preload(modules)
    ForkServer(listener).run()


def preload(modules: Sequence[str]) -> None:
    """Import `modules`, as far as they are there, and put everything that they made out of the collector's sight."""
    for module in modules:
        with contextlib.suppress(Exception):  # the worker that needs it will say what is wrong, where it can be seen
            importlib.import_module(module)
    for name in [name for name in sys.modules if name.partition(".")[0] in _ARCHIVES_OWN]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()


def send(connection: socket.socket, asked: Asked) -> None:
    """Ask for a worker. Raises OSError, also when the message is too long."""
    message = {"argv": list(asked.argv), "cwd": asked.cwd, "environment": dict(asked.environment)}
    streams = array.array("i", asked.streams)
    connection.sendmsg([json.dumps(message).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])


def _receive(connection: socket.socket, streams: list[int]) -> Asked | None:
    """None when the other side has gone. What is received goes into `streams` first, so that it is closed in any case."""
    room = socket.CMSG_LEN(3 * array.array("i").itemsize)
    data, sent, flags, _ = connection.recvmsg(MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in sent:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            streams.extend(array.array("i", content[: len(content) - len(content) % 4]))
    if not data:
        return None
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(streams) != 3:
        raise ValueError("the message is too long, or came without the three standard streams")
    value: dict[str, Any] = json.loads(data)
    return Asked(value["argv"], value["cwd"], value["environment"], tuple(streams))


def _send(connection: socket.socket, value: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError):  # nobody is there to be told
        connection.send(json.dumps(value).encode(), socket.MSG_NOSIGNAL)


def _different(theirs: Mapping[str, str], ours: Mapping[str, str]) -> set[str]:
    names = {name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name)}
    return {name for name in names if name not in PER_WORKER and not name.startswith(("TS_", "MARINA_"))}


def _die_with(connection: socket.socket) -> None:
    """SIGKILL from the kernel as soon as the other end of `connection` is closed; at once when it is already."""
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(connection, fcntl.F_SETFL, fcntl.fcntl(connection, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(connection, select.POLLHUP)
    if poll.poll(0):
        os._exit(1)
    connection.detach()  # stays open as long as this process lives


def _set_environment(environment: Mapping[str, str]) -> None:
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)


def _show_as(command: Sequence[str]) -> None:
    """Let `ps` and /proc show the worker's own command line, as far as there is room where ours was."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(") ")[2].split()
        start, end = int(fields[45]), int(fields[46])
        text = b"\0".join(part.encode() for part in command)[: end - start - 1]
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def _run(asked: Asked, path: Sequence[str]) -> int:
    """The script, as `python SCRIPT ARGUMENTS` would run it; its exit code."""
    script = asked.argv[0]
    own = [entry for entry in asked.environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.argv = list(asked.argv)
    sys.path[:] = [str(Path(script).parent), *own, *path]
    sys.path_importer_cache.clear()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # every fork has the same state otherwise
    import_gently([*handlers(own)])
    _load_gently()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None:
            return 0
        if isinstance(end.code, int):
            return end.code
        sys.stderr.write(f"{end.code}\n")
        return 1
    return 0


def _load_gently() -> None:
    """Have TorchServe load the model at low priority."""
    with contextlib.suppress(ImportError):  # there are scripts of others in tests
        from ts.model_loader import TsModelLoader

        TsModelLoader.load = gently(TsModelLoader.load)


def pass_on(number: int, pid: int) -> None:
    """Hand every signal `number` that this process gets from now on to the worker `pid`."""

    def handle(received: int, _: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, received)

    signal.signal(number, handle)
