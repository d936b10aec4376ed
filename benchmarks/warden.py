"""The parent of one measured server: whatever the server starts stays below it, and ends with it.

Run as a script, with nothing but the standard library: `warden.py PARENT SECONDS NETWORK COMMAND...`. It adopts every
orphan of the server (a child subreaper), dies with PARENT, ends after SECONDS at the latest, and leaves nothing alive
behind it. NETWORK `isolated` puts the server into a network of its own that has loopback only; `shared` does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from types import FrameType

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_GRACE_SECONDS = 5.0


class _Stop(BaseException):
    """A signal asked for the end."""


def main(arguments: list[str]) -> int:
    """Run the command; its exit status once nothing of it is left, 124 when time ran out, 143 when told to stop."""
    parent, seconds, network, *command = arguments
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    library.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != int(parent):
        return 1
    if network == "isolated":
        _isolate(library)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, _stop)
    signal.alarm(int(seconds))
    first: int | None = None
    try:
        first = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True).pid
        return _wait(first)
    except _Stop as stop:
        return 124 if stop.args[0] == signal.SIGALRM else 143
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        _end(first)


def _stop(number: int, _: FrameType | None) -> None:
    raise _Stop(number)


def _wait(first: int) -> int:
    """The first process's status, once every process is gone."""
    status = 0
    while True:
        try:
            pid, state = os.wait()
        except ChildProcessError:
            return status
        if pid == first:
            status = os.waitstatus_to_exitcode(state)


def _end(first: int | None) -> None:
    """SIGTERM to the server, so that it may clean up its files, then SIGKILL to everything, until nothing is left."""
    if first is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    while _reap() and time.monotonic() < deadline and _alive(first):
        time.sleep(0.02)
    while _reap():
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _reap() -> bool:
    """Take the status of those that ended; False when there is no child any more."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _alive(pid: int | None) -> bool:
    return pid is not None and pid in _descendants(os.getpid())


def _descendants(root: int) -> list[int]:
    parents = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - thousands of Path objects a second would be measured too
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/stat") as file:  # noqa: PTH123
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    found, front = [], [root]
    while front:
        front = [pid for pid, parent in parents.items() if parent in front]
        found += front
    return found


def _isolate(library: ctypes.CDLL) -> None:
    if library.unshare(_CLONE_NEWNET):
        reason = os.strerror(ctypes.get_errno())
        sys.exit(f"a network of its own cannot be had here: {reason}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
