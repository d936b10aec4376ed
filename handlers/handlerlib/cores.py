"""How many threads a worker may use for the batch that it begins: all cores when it is alone, else its share.

No setting has to choose between latency and throughput. The workers of one server (children of one java process,
whatever model they hold) write on a board, a small file that all of them map into memory, when their batch begins and
ends. A worker that begins reads how many others are busy and takes `cores // (busy others + 1)` threads. That costs a
few microseconds and no system call.

Under load a worker is idle for the millisecond in which java fetches its answer and gives it the next batch. Taking it
for idle then would have another worker use all cores beside it. So one that has just ended still counts when its last
batch overlapped with ours: overlapping batches are what load looks like, while a client that sends one request at a
time alternates between workers and overlaps with nothing.

A worker that dies stops counting: each holds a lock on a file of its own, which the kernel lets go of with the process.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

logger = logging.getLogger(__name__)

_PREFIX = "marina-cores-"
_PLACES = 64
_RECENT = 5_000_000
"""Nanoseconds for which a worker counts after a batch that overlapped with ours; java takes about one millisecond."""
_SUSPICIOUS = 1_000_000_000
"""Nanoseconds after which a batch may be that of a worker that has died: its lock is tried."""
_PATIENCE = 3
"""Batches in a row that must be allowed more threads before a team of several threads grows."""


def usable(proc: Path = Path("/proc/self"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use, at least 1: its affinity mask, or its control group's CPU quota where smaller.

    Both versions of control groups are read; a quota of two and a half cores counts as two, because a third thread
    would only be throttled.
    """
    return max(1, min(len(os.sched_getaffinity(0)), *(int(quota) for quota in _quotas(proc, mount))))


def _quotas(proc: Path, mount: Path) -> list[float]:
    """The quota of this process's group and of every group above it, in cores; 2**31 for none."""
    found = [2.0**31]
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = [mount] if not controllers else [mount / controllers, mount / "cpu"]
        parts = Path(path.strip("/")).parts
        for root in roots:
            # In a container the path is often the host's, and the group itself is mounted at the root.
            for depth in range(len(parts) + 1):
                found += _quota(root.joinpath(*parts[:depth]), version=1 if controllers else 2)
    return found


def _quota(group: Path, version: int) -> list[float]:
    try:
        if version == 1:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            quota, period = (group / "cpu.max").read_text().split()
        return [float(quota) / float(period)] if float(quota) > 0 else []
    except (OSError, ValueError):
        return []  # no such group here, or "max"


class Board:
    """One worker's place on the board of its server. Several threads may read it, one writes.

    The file holds 64-bit numbers: two of its own, of which the first says how many places were ever taken, then two per
    place: when its worker's last batch began and ended, by `time.monotonic_ns`, a clock that all processes of a machine
    share. A batch is under way while `began` is above `ended`.
    """

    def __init__(self, folder: Path) -> None:
        """Take a free place on the board in `folder`, made when it is not there.

        Raises OSError when the folder is not ours alone, cannot be written, or has no free place.
        """
        _make_private(folder)
        self._folder = folder
        place, self._lock = self._claim()
        self._at = 2 * place + 2
        file = os.open(folder / "board", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = 16 * (_PLACES + 1)
            os.posix_fallocate(file, 0, size)
            self._map = mmap.mmap(file, size)
            self._cells = memoryview(self._map).cast("q")
            self._cells[0] = max(self._cells[0], place + 1)
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: the map keeps a duplicate
            os.close(file)
        self._clear()
        self._before = (0, 0)

    def begin(self) -> None:
        """A batch of ours begins."""
        cells, at = self._cells, self._at
        self._before = cells[at], cells[at + 1]
        cells[at] = time.monotonic_ns()

    def end(self) -> None:
        """It is over."""
        self._cells[self._at + 1] = time.monotonic_ns()

    def others(self) -> int:
        """Workers beside us that need cores now."""
        cells, ours, now = self._cells, self._at, time.monotonic_ns()
        count = 0
        for at in range(2, 2 * cells[0] + 2, 2):
            if at == ours:
                continue
            began, ended = cells[at], cells[at + 1]
            if began > ended:
                count += now - began < _SUSPICIOUS or self._alive(at)
            elif now - ended < _RECENT:
                count += began < self._before[1] and self._before[0] < ended
        return count

    def close(self) -> None:
        """Give the place back."""
        self._clear()
        self._cells.release()
        self._map.close()
        os.close(self._lock)

    def _clear(self) -> None:
        self._cells[self._at] = self._cells[self._at + 1] = 0

    def _claim(self) -> tuple[int, int]:
        for place in range(_PLACES):
            lock = self._try_lock(place)
            if lock is not None:
                return place, lock
        raise OSError(f"all {_PLACES} places in {self._folder} are taken")

    def _try_lock(self, place: int) -> int | None:
        lock = os.open(self._folder / f"place-{place}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    def _alive(self, at: int) -> bool:
        lock = self._try_lock((at - 2) // 2)
        if lock is None:
            return True
        self._cells[at + 1] = self._cells[at]
        os.close(lock)
        return False


class Cores:
    """The cores of this machine as one worker sees them. `begin`, any number of `share`, `end`, per batch."""

    def __init__(self, count: int, board: Board | None, workers: int = 1) -> None:
        """Without a board each of `workers` keeps to its part of the `count` cores, busy or not."""
        self.count = count
        self._board = board
        self._without = max(1, count // max(1, workers))
        self._last = 1
        self._allowed = 0

    @classmethod
    def of_server(cls, workers: int) -> Cores:
        """The cores that this process may use, on the board of the java process that started it."""
        try:
            board = Board(_folder())
        except OSError as error:
            logger.warning("no board of busy workers (%s): each of %d keeps to its part of the cores", error, workers)
            board = None
        return cls(usable(), board, workers)

    def begin(self) -> None:
        """A batch begins."""
        if self._board is not None:
            self._board.begin()

    def end(self) -> None:
        """The batch is over."""
        if self._board is not None:
            self._board.end()

    def shares(self) -> tuple[int, ...]:
        """All that `share` may ever give, the largest first."""
        if self._board is None:
            return (self._without,)
        return tuple(dict.fromkeys(max(1, self.count // busy) for busy in range(1, _PLACES + 1)))

    def share(self) -> int:
        """Threads for what is done next, 1 to `count`."""
        if self._board is None:
            return self._without
        wanted = max(1, self.count // (self._board.others() + 1))
        # Going to one thread and back costs nothing, but OpenMP ends and starts threads when a team of several changes
        # its size (1.4 ms measured for 2 to 4): so it shrinks at once, and grows when that looks lasting.
        if wanted <= self._last or self._last == 1:
            self._last, self._allowed = wanted, 0
        else:
            self._allowed += 1
            if self._allowed >= _PATIENCE:
                self._last, self._allowed = wanted, 0
        return self._last


def _folder() -> Path:
    """The board's folder; those of servers that are gone are removed on the way."""
    temp, start = Path(tempfile.gettempdir()), f"{_PREFIX}{os.geteuid()}-"
    for old in temp.glob(f"{start}*"):
        pid = old.name.removeprefix(start)
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(old, ignore_errors=True)
    return temp / f"{start}{os.getppid()}"


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of ours alone")
