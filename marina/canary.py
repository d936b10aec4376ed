"""A growing share of real requests for a new version, and how it does with them, seen at the gateway.

The gateway reads a small file, four times a second, that says which share of the requests without a version goes to which
version (`deploy/gateway/splits.lua`). What clients got is read from the gateway's own access log, since only there every
failure counts that a client saw, whoever caused it. An entry expires unless it is renewed: a killed rollout leaves no
canary behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from marina.errors import ClientError
from marina.gates import Arm, Gates, Verdict, judge

LEASE_SECONDS = 30
"""After the last renewal."""
SETTLE_SECONDS = 1.0
"""From a change of the file until no request follows the old one; the gateway reads it every 0.25 s."""
QUEUE_SECONDS = 5.0
"""How long a request that has its version may then wait in the gateway: its `GATEWAY_QUEUE_TIMEOUT_MS` unless it is set."""
_RENEW_SECONDS = 5.0
_LOOK_SECONDS = 0.25
_CERTAIN_FAILURES = 2
"""Failed requests with which a stage that fails need not be waited for."""


class Stages(BaseModel):
    """How the share grows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    percents: tuple[float, ...] = (1, 5, 25, 100)
    seconds: float = Field(default=5.0, gt=0)
    """Each stage lasts at least so long,"""
    requests: int = Field(default=20, ge=1)
    """until the new version has answered so many,"""
    longest_seconds: float = Field(default=30.0, gt=0)
    """but no longer than this. Where no request comes at all, `seconds` are enough."""


class AccessLog(Protocol):
    """The gateway's access log from the moment of opening."""

    def lines(self) -> Iterable[str]:
        """What was written since the last call."""
        ...

    def close(self) -> None: ...


class FileLog:
    """A gateway of this machine that logs to a file."""

    def __init__(self, path: Path) -> None:
        """Raises ClientError when it cannot be read."""
        try:
            self._stream: IO[bytes] = path.open("rb")
        except OSError as error:
            raise ClientError(
                f"the gateway's log {path} cannot be read: {error.strerror}", remedy="correct --gateway-log"
            ) from error
        self._stream.seek(0, os.SEEK_END)
        self._rest = b""

    def lines(self) -> Iterable[str]:
        *whole, self._rest = (self._rest + self._stream.read()).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole]

    def close(self) -> None:
        self._stream.close()


class ContainerLog:
    """A gateway in a container, by its engine's `logs`."""

    def __init__(self, docker: str, container: str) -> None:
        command = [docker, "logs", "--follow", "--since", f"{time.time():.3f}", container]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._container = container
        self._found: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="marina-gateway-log", daemon=True)
        self._reader.start()

    def lines(self) -> Iterable[str]:
        if self._process.poll() is not None:
            raise ClientError(
                f"the log of {self._container} cannot be followed, so a canary cannot be judged",
                remedy="its logging driver must be one that docker logs can read; or deploy with --canary none",
            )
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._found.get_nowait())
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._found.put(line.decode("utf-8", "replace"))


@dataclass(frozen=True, slots=True)
class Front:
    """The gateway in front of the servers, as a rollout needs it."""

    splits: Path
    """The file that it reads."""
    open_log: Callable[[], AccessLog]
    queue_seconds: float = QUEUE_SECONDS


# ---------------------------------------------------------------------------------------------------------- the file


def set_split(path: Path, name: str, version: str, percent: float, *, now: float | None = None) -> None:
    """Send `percent` of the model's requests without a version to `version`, for `LEASE_SECONDS`."""
    expires = int((time.time() if now is None else now) + LEASE_SECONDS)
    _write(path, [*_others(path, name), f"{name} {version} {percent:g} {expires}"])


def clear_split(path: Path, name: str) -> bool:
    """No canary for this model; whether there was one."""
    others = _others(path, name)
    if not path.exists() or len(others) == len(path.read_text("ascii").splitlines()):
        return False
    _write(path, others)
    return True


def _others(path: Path, name: str) -> list[str]:
    lines = path.read_text("ascii").splitlines() if path.exists() else []
    return [line for line in lines if line.split(" ")[0] != name]


def _write(path: Path, lines: Sequence[str]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(line + "\n" for line in lines), encoding="ascii")
    partial.chmod(0o644)  # read by the gateway's own user in its container
    partial.replace(path)


@contextlib.contextmanager
def _leased(path: Path, name: str, version: str, percent: float) -> Iterator[None]:
    """The share, renewed as long as the block lasts. It stays at the end: the next stage changes it, or `clear_split`."""
    set_split(path, name, version, percent)
    stopped = threading.Event()

    def renew() -> None:
        while not stopped.wait(_RENEW_SECONDS):
            set_split(path, name, version, percent)

    thread = threading.Thread(target=renew, name="marina-canary", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


# --------------------------------------------------------------------------------------------------------- the stages


@dataclass(slots=True)
class _Counted:
    answers: int = 0
    errors: int = 0
    latencies_ms: list[float] = field(default_factory=list)

    def add(self, entry: Mapping[str, Any]) -> None:
        status = int(entry["status"])
        refused = status == 429
        if status < 0 or (status < 500 and entry["replica"] in ("", "-")):
            return  # the client left, or the gateway let it not in (no key, too much): neither is the version's doing
        self.answers += 1
        if status >= 500 or refused:  # a replica refuses when the version's own queue is full or it has no worker
            self.errors += 1
        else:
            self.latencies_ms.append(float(entry["total_ms"]) - max(0.0, float(entry["request_ms"])))

    def arm(self) -> Arm:
        return Arm(answers=self.answers, errors=self.errors, latencies_ms=tuple(self.latencies_ms))


class Canary:
    """One canary from its first stage to its last. Closing it ends the reading, not the share."""

    def __init__(self, front: Front, name: str, version: str, *, gates: Gates, stages: Stages) -> None:
        self._front = front
        self._name = name
        self._version = version
        self._gates = gates
        self._stages = stages
        self._log = front.open_log()
        self._old = _Counted()
        """Over all stages: at 100 % none is left to compare with."""
        self._new = _Counted()

    def stage(self, percent: float) -> tuple[Verdict, ...]:
        """Have this share, wait for what it shows, and judge. Raises ClientError when the log cannot be read."""
        self._new = _Counted()
        before = self._old.answers
        started = time.monotonic()
        with _leased(self._front.splits, self._name, self._version, percent):
            while True:
                time.sleep(_LOOK_SECONDS)
                self._read()
                seconds = time.monotonic() - started
                verdicts = judge(self._gates, f"canary {percent:g} %", self._old.arm(), self._new.arm())
                failing = self._new.errors >= _CERTAIN_FAILURES and not all(item.passed for item in verdicts)
                if failing or self._complete(seconds, self._old.answers - before):
                    return verdicts

    def close(self) -> None:
        self._log.close()

    def __enter__(self) -> Canary:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _complete(self, seconds: float, old_answers: int) -> bool:
        if seconds < self._stages.seconds:
            return False
        idle = not self._new.answers and not old_answers
        return idle or self._new.answers >= self._stages.requests or seconds >= self._stages.longest_seconds

    def _read(self) -> None:
        wanted = f'"model":"{self._name}"'
        for line in self._log.lines():
            if line.startswith("{") and wanted in line:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # cut off: a log driver's limit, a full disk
                if entry["canary"] == self._version:
                    self._new.add(entry)
                elif entry["version"] in ("", "-"):
                    self._old.add(entry)
