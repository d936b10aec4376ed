"""Child processes that never outlive us, ports, and temp folders that a killed run leaves behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from marina.errors import PortBusy, ServerError

SOCKET_PATH_LIMIT = 100
"""Bytes. A Unix socket's path has at most 107; TorchServe puts `/.ts.sock.NNNNN` behind the temp folder."""

_LEFT_OVER_SECONDS = 5.0
_PRIORITY_SECONDS = 5.0
_PREFIX = "marina-"
_MARKER = "locked"
"""Empty; it comes after the lock on its folder. Where `in-use` lies instead, that file is locked, not the folder."""
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

# Runs before java, in a process of its own: preexec_fn is unsafe in a process with threads. The signal follows the
# death of the thread that started us, so `spawn` must be called from a thread that lives as long as the child.
_DIE_WITH_PARENT = """
import ctypes, json, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
beside = json.loads(sys.argv[2])
if beside:
    os.posix_spawn(beside[0], beside, {name: os.environ[name] for name in os.environ if name not in sys.argv[3].split()})
os.execv(sys.argv[4], sys.argv[4:])
"""


def spawn(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    beside: Sequence[str] = (),
    hidden: Iterable[str] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own, stdout and stderr in one pipe; it gets SIGTERM when we die.

    The command `beside` is started as its child, in the same session and with the same streams, without the environment
    variables `hidden`. Call it from a thread that lives as long as the child.
    """
    given = [str(os.getpid()), json.dumps([*beside]), " ".join(hidden)]
    launcher = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, *given, *command]
    return subprocess.Popen(
        launcher,
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and everything it started; returns when none of them is alive.

    Raises ServerError when one cannot be killed.
    """
    deadline = time.monotonic() + 10.0
    while _signal_group(process.pid, signal.SIGKILL):
        if process.poll() is not None:
            _reap_group(process.pid)
            if not _any_alive(process.pid):
                break  # dead, and not yet reaped by the init process, which takes its time
        if time.monotonic() > deadline:
            raise ServerError(
                f"processes of session {process.pid} cannot be killed", remedy=f"look at them: ps -s {process.pid}"
            )
        time.sleep(0.01)
    process.wait()


def set_priority(session: int, nice: int) -> None:
    """Let a session's processes together count so much where the kernel shares cores out by session (autogroups, sched(7)).

    Unlike a process's own niceness it can be raised again by anybody. It does nothing in a container, where the control
    group decides, and where autogroups are off.
    """
    ends = time.monotonic() + _PRIORITY_SECONDS
    while time.monotonic() < ends:
        try:
            Path(f"/proc/{session}/autogroup").write_text(str(nice))
        except BlockingIOError:  # the kernel lets ordinary users write ten times a second, all together
            time.sleep(0.02)
        except OSError:
            return
        else:
            return


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and a lost terminal are KeyboardInterrupt, as Ctrl-C is: what was begun is taken back.

    What is ignored already stays so: `nohup` means a lost terminal to change nothing.
    """

    def interrupt(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_left_over(pids: Iterable[int]) -> None:
    """Make sure of the end of idle workers that TorchServe has taken from its list, and should have ended."""
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.Error, ValueError):
            processes.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(processes, timeout=_LEFT_OVER_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that the system says is free now."""
    with socket.socket(_family(host)) as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def free_ports(count: int, host: str = "127.0.0.1", *, apart_from: Iterable[int] = ()) -> list[int]:
    """`count` different free TCP ports, none of them in `apart_from`."""
    taken = set(apart_from)
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            listener = held.enter_context(socket.socket(_family(host)))
            listener.bind((host, 0))
            port = int(listener.getsockname()[1])
            if port not in taken:
                found.append(port)
    return found


def is_free(host: str, port: int) -> bool:
    """Whether we could listen there now."""
    try:
        require_port(host, port, purpose="", option="")
    except ServerError:
        return False
    return True


def require_port(host: str, port: int, *, purpose: str, option: str) -> None:
    """Raises PortBusy, naming the program that holds the port where that can be seen, when we could not listen there."""
    try:
        with socket.socket(_family(host)) as listener:
            # As java binds: a port whose last connections still time out is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(1)
    except socket.gaierror as error:
        raise ServerError(
            f"the {purpose} host '{host}' is not an address of this machine", remedy="use 127.0.0.1"
        ) from error
    except PermissionError as error:
        raise PortBusy(
            f"the {purpose} port {port} needs privileges", remedy=f"choose one above 1023 with {option}"
        ) from error
    except OSError as error:
        raise PortBusy(
            f"the {purpose} port {port} on {host} is taken{_holder(port)}",
            remedy=f"stop that program, or choose another port with {option}",
        ) from error


def private_folder(root: Path | None = None) -> tuple[Path, int]:
    """A new folder with a path short enough for a Unix socket, and the lock that says it is in use.

    Folders that killed runs left beside it are removed. Raises ServerError when the path is too long.
    """
    base = Path(tempfile.gettempdir() if root is None else root).resolve()
    if not base.is_dir() or not os.access(base, os.W_OK):
        raise ServerError(f"the temp folder {base} is not a writable folder", remedy="set TMPDIR to one that is")
    _sweep(base)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    if socket_path_bytes(base) > SOCKET_PATH_LIMIT:
        folder.rmdir()
        raise ServerError(
            f"the temp folder {base} has too long a path for a Unix socket",
            remedy="set TMPDIR to a short one, e.g. /tmp",
        )
    # On the folder itself: systemd-tmpfiles(8) leaves alone what it finds locked so, however old its files are.
    lock = os.open(folder, _FOLDER_FLAGS)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / _MARKER).touch(mode=0o600)
    return folder, lock


def socket_path_bytes(root: Path) -> int:
    """The longest path of a worker's socket in a `private_folder` of `root`."""
    return len(os.fsencode(root.resolve() / f"{_PREFIX}xxxxxxxx" / ".ts.sock.65535"))


def remove_folder(folder: Path, lock: int) -> None:
    """Remove what `private_folder` made."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _sweep(base: Path) -> None:
    """Remove the folders whose lock nobody holds: their process was killed."""
    for marker in base.glob(f"{_PREFIX}*/{_MARKER}"):
        with contextlib.suppress(OSError):
            lock = os.open(marker.parent, _FOLDER_FLAGS)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(marker.parent, ignore_errors=True)
            finally:
                os.close(lock)


def _signal_group(group: int, number: signal.Signals) -> bool:
    """False when the group has no process any more."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _any_alive(group: int) -> bool:
    """Whether a process of the group still runs; killpg counts zombies too."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def reap_orphans(spare: int | None) -> None:
    """As PID 1 every orphan becomes our child: take the exit status of those that ended. `spare` has its own reader."""
    if os.getpid() != 1:
        return
    with contextlib.suppress(ChildProcessError):
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while (found := os.waitid(os.P_ALL, 0, ended)) is not None and found.si_pid != spare:
            os.waitpid(found.si_pid, os.WNOHANG)


def _reap_group(group: int) -> None:
    """As PID 1 we inherit the workers of a killed java; unreaped they would stay as zombies for ever."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass


def _holder(port: int) -> str:
    """` by pid 12 (name)` where the system lets us see it, else empty."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                return f" by pid {connection.pid} ({psutil.Process(connection.pid).name()})" if connection.pid else ""
    return ""


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
