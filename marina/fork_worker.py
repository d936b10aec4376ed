"""The command `marina-worker`, which TorchServe starts in place of `python`: a worker forked from `marina.fork_server`.

It stands for the worker towards java: standard streams, signals, exit status. Where there is no fork server, or it does
not fork this one, the process becomes what TorchServe asked for: `python SCRIPT ARGUMENTS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from marina.fork_server import MESSAGE_BYTES, SOCKET_VARIABLE, Asked, pass_on, send

_COMMAND = "marina-worker"
_SCRIPT = "model_service_worker.py"
_PATIENCE_SECONDS = 60.0
"""The fork server answers after its imports, which a busy machine may take long for."""


def program() -> Path | None:
    """Where the command is: beside the interpreter, or beside `marina`; None where it is not, or on another system."""
    for folder in (Path(sys.executable).parent, Path(sys.argv[0]).absolute().parent):
        if sys.platform == "linux" and os.access(folder / _COMMAND, os.X_OK):
            return folder / _COMMAND
    return None


def main() -> NoReturn:
    """Be the worker that `sys.argv[1:]` names."""
    arguments = sys.argv[1:]
    path = os.environ.get(SOCKET_VARIABLE, "")
    if path and arguments and Path(arguments[0]).name == _SCRIPT:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            answer = _ask(connection, path, arguments)
            if "pid" in answer:
                _stand_for(answer["pid"], connection)
            if "refused" in answer:
                sys.stderr.write(f"this worker imports everything by itself: {answer['refused']}\n")
    _become(arguments)


def _ask(connection: socket.socket, path: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The fork server's first answer; nothing where there is no server, or none in time."""
    try:
        connection.connect(path)
        send(connection, Asked(arguments, str(Path.cwd()), dict(os.environ), (0, 1, 2)))
    except OSError:
        return {}
    ready, _, _ = select.select([connection], [], [], _PATIENCE_SECONDS)
    return _receive(connection) if ready else {}


def _stand_for(pid: int, connection: socket.socket) -> NoReturn:
    for passed_on in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        pass_on(passed_on, pid)
    status = _receive(connection).get("status")
    if not isinstance(status, int):  # the fork server has died; the worker lives on
        _wait_for(pid)
        os._exit(1)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if not os.WIFSIGNALED(status) else 1)


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Nothing when the other side has gone."""
    try:
        data = connection.recv(MESSAGE_BYTES)
    except ConnectionError:
        return {}
    value: dict[str, Any] = json.loads(data) if data else {}
    return value


def _wait_for(pid: int) -> None:
    with contextlib.suppress(OSError):
        watched = os.pidfd_open(pid)
        select.select([watched], [], [])


def _become(arguments: Sequence[str]) -> NoReturn:
    os.execv(sys.executable, [sys.executable, *arguments])
