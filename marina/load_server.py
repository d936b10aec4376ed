"""What a local server costs while it is measured: CPU time and memory of its whole process tree.

Memory is PSS (shared pages divided among their users), which may be summed over processes, and USS (what ending a process
would give back); RSS counts shared pages once per process and is shown for comparison with other tools only.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil

_MIB = 1 << 20
_SAMPLE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ServerUse:
    """A process tree over the time measured."""

    pids: tuple[int, ...]
    """Those at the end."""
    cpu_seconds: float
    cpu_ms_per_request: float | None
    """None without any good answer."""
    cores: float
    """CPU seconds per second."""
    pss_mib: float | None
    """At the end; None where the system does not say (another user's processes)."""
    pss_peak_mib: float | None
    """The largest of samples 2 s apart: reading it stops the process for some milliseconds."""
    uss_mib: float | None
    rss_mib: float

    def as_dict(self) -> dict[str, object]:
        """As JSON shows it."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Memory:
    """MiB, summed over processes."""

    pss: float | None
    uss: float | None
    rss: float


def find_listener(host: str, port: int) -> int | None:
    """The process to blame for a local address: the top of the tree that listens there; None when it cannot be seen.

    Where java was started by `marina serve`, that supervisor is the top.
    """
    if not is_local(host):
        return None
    try:
        found = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return None
    pids = {
        item.pid
        for item in found
        if item.status == psutil.CONN_LISTEN and item.laddr and item.laddr.port == port and item.pid is not None
    }
    tops = {pid for pid in pids if not pids & set(_ancestors(pid))}
    if len(tops) != 1:
        return min(tops) if tops else None  # several copies of one server beside each other: the first started
    (top,) = tops
    return _supervisor_of(top) or top


def is_local(host: str) -> bool:
    """Whether the host is an address of this machine."""
    try:
        addresses = {str(item[4][0]) for item in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = {item.address.partition("%")[0] for items in psutil.net_if_addrs().values() for item in items}
    return any(ipaddress.ip_address(text.partition("%")[0]).is_loopback or text in own for text in addresses)


class ServerWatch:
    """CPU time and memory of a process and all it starts, between `begin` and `end`. Counts processes that end meanwhile
    up to their last sample.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._before: dict[tuple[int, float], float] = {}
        self._latest: dict[tuple[int, float], float] = {}
        self._peak: float | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """The measurement starts now."""
        self._before = _cpu(self._tree())
        self._latest = dict(self._before)
        self._thread = threading.Thread(target=self._sample, name="server-use", daemon=True)
        self._thread.start()

    def mark(self) -> None:
        """The measurement ends now; figures are asked for later."""
        self._latest |= _cpu(self._tree())
        self._stop.set()

    def use(self, *, seconds: float, answers: int) -> ServerUse | None:
        """What was used between `begin` and `mark`; None when the process is gone."""
        self._stop.set()
        if self._thread is None:
            return None
        self._thread.join()
        tree = self._tree()
        if not tree:
            return None
        spent = sum(value - self._before.get(key, 0.0) for key, value in self._latest.items())
        used = memory(tree)
        return ServerUse(
            pids=tuple(process.pid for process in tree),
            cpu_seconds=spent,
            cpu_ms_per_request=spent / answers * 1e3 if answers else None,
            cores=spent / seconds if seconds > 0 else 0.0,
            pss_mib=used.pss,
            pss_peak_mib=max((value for value in (self._peak, used.pss) if value is not None), default=None),
            uss_mib=used.uss,
            rss_mib=used.rss,
        )

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            tree = self._tree()
            self._latest |= _cpu(tree)
            found = memory(tree).pss
            if found is not None:
                self._peak = max(found, self._peak or 0.0)

    def _tree(self) -> list[psutil.Process]:
        return tree_of(self._root)


def tree_of(root: psutil.Process) -> list[psutil.Process]:
    """The process and all its descendants that still exist."""
    try:
        return [root, *root.children(recursive=True)] if root.is_running() else []
    except psutil.Error:
        return []


def memory(processes: Sequence[psutil.Process]) -> Memory:
    """PSS and USS are None when one of the processes does not let us read them."""
    pss, uss, rss = 0.0, 0.0, 0.0
    known = True
    for process in processes:
        try:
            rss += process.memory_info().rss
            full = process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        except (psutil.AccessDenied, OSError):
            known = False
            continue
        pss += getattr(full, "pss", full.uss)
        uss += full.uss
    return Memory(pss / _MIB if known else None, uss / _MIB if known else None, rss / _MIB)


def _cpu(processes: Iterable[psutil.Process]) -> dict[tuple[int, float], float]:
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found[process.pid, process.create_time()] = times.user + times.system
    return found


def _ancestors(pid: int) -> list[int]:
    try:
        return [parent.pid for parent in psutil.Process(pid).parents()]
    except psutil.Error:
        return []


def _supervisor_of(pid: int) -> int | None:
    try:
        parent = psutil.Process(pid).parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return None
    named = any(word.endswith("marina") or word == "marina" for word in words[:4])
    return parent.pid if parent is not None and named and "serve" in words[:5] else None
