"""A measured server with everything that it starts: begin, what it costs, its network, end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from benchmarks.errors import NotAvailable

_WARDEN = Path(__file__).with_name("warden.py")
_CLONE_NEWNET = 0x40000000
_STOP_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tree of processes has taken so far, and holds now."""

    cpu_seconds: float
    """User and system time, of the processes that have ended too."""
    pss_mib: float
    """Proportional set size: shared pages are divided among those that share them."""
    rss_mib: float
    processes: int


class Tree:
    """One command and its descendants, below a warden of their own. Use it as a context: leaving it ends them all."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        log: Path,
        seconds: float,
        isolated: bool = False,
    ) -> None:
        """`seconds` is the longest life of the tree; `isolated` gives it a network that has loopback only."""
        self.log = log
        self._isolated = isolated
        network = "isolated" if isolated else "shared"
        warden = [sys.executable, "-I", "-S", str(_WARDEN), str(os.getpid()), str(int(seconds)), network]
        with log.open("wb") as output:
            self._warden = subprocess.Popen(
                [*warden, *command],
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The warden's."""
        return self._warden.pid

    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self._warden.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """The server's own processes, without the warden."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def usage(self) -> Usage:
        """As of now. Processes that end while they are looked at count as ended."""
        cpu, pss, rss = self._ended_cpu_seconds(), 0, 0
        found = self.processes()
        for process in found:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                cpu += times.user + times.system + times.children_user + times.children_system
                memory = process.memory_full_info()
                pss, rss = pss + memory.pss, rss + memory.rss
        return Usage(cpu, pss / 2**20, rss / 2**20, len(found))

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Inside it this thread, and what it starts, lives in the server's network."""
        if not self._isolated:
            yield
            return
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter_network(Path(f"/proc/{self.pid}/ns/net"))
            yield
        finally:
            ctypes.CDLL(None).setns(own, _CLONE_NEWNET)
            os.close(own)

    def stop(self) -> None:
        """End all of it. Returns when nothing is left."""
        self._warden.send_signal(signal.SIGTERM)
        try:
            self._warden.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self._warden.kill()
            self._warden.wait()

    def log_tail(self, lines: int = 8) -> str:
        """The last lines that it printed."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 16_384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])

    def _ended_cpu_seconds(self) -> float:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self.pid).cpu_times()
            return float(times.children_user + times.children_system)
        return 0.0


def _enter_network(namespace: Path) -> None:
    target = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if library.setns(target, _CLONE_NEWNET):
            reason = os.strerror(ctypes.get_errno())
            raise NotAvailable(f"its own network cannot be entered: {reason}", remedy="run as root")
    finally:
        os.close(target)
