"""The supervisor's side of `handlerlib.quarantine`: what each worker is working on, and which inputs end workers.

The first time a worker ends at its work, the inputs of that batch become suspects; workers run a suspect alone from then
on. The second time, it is one input that did it: its SHA-256 is refused, with 422, as long as this server runs.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

FOLDER = "quarantine"
PROGRESS = struct.Struct("=QIIQ")
"""The beginning of a worker's record: when its batch began (CLOCK_MONOTONIC ns, 0: idle), inputs, whether it is a suspect
that runs alone, batches done."""
_HEADER = struct.Struct(f"{PROGRESS.format}Q32s")
_REASON_AT = 64
_MARKS_AT = 256
_GENERATION = struct.Struct("=Q")
_SUSPECT_SECONDS = 600.0
"""After it, somebody whose input met a dying worker by accident is no suspect any more, answered or not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What one worker says of itself at one moment."""

    began: float | None
    """time.monotonic() at which its batch began; None: it is idle."""
    marks: tuple[int, ...]
    """Of the inputs of the batch."""
    digest: str
    """SHA-256 of the only input, when it is a suspect that runs alone; else empty."""
    done: int
    """Batches finished."""
    longest: float
    """Seconds of the longest of them."""
    broken: str
    """Why this process cannot work any more; empty while it can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blame:
    """What came out of a worker's end."""

    inputs: int
    """That it was working on."""
    refused: str
    """SHA-256 that is refused from now on; empty when there is none."""


class Quarantine:
    """The folder of one server. For one thread."""

    def __init__(self, temp: Path) -> None:
        """`temp` is the temp folder that the workers share; make it before the first worker starts."""
        self._folder = temp / FOLDER
        self._folder.mkdir(exist_ok=True)
        self._suspects: dict[int, float] = {}
        self._refused: dict[str, int] = {}
        """SHA-256 -> mark, which stays a suspect's so that workers look closely."""
        self._unpublished = ""
        descriptor = os.open(self._folder / "state", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, mmap.PAGESIZE)  # as the workers do it
            self._state = mmap.mmap(descriptor, mmap.PAGESIZE)
        finally:
            os.close(descriptor)

    @property
    def refused(self) -> int:
        """Inputs that are refused."""
        return len(self._refused)

    @property
    def unpublished(self) -> str:
        """Why the workers do not know the lists yet, a full disk perhaps; empty when they do. `tidy` tries again."""
        return self._unpublished

    def record(self, pid: int) -> Record | None:
        """None when this worker keeps none: its handler is not one of Marina's, or it has not been asked yet."""
        try:
            data = (self._folder / f"worker-{pid}").read_bytes()
        except OSError:
            return None
        return _read(data) if len(data) > _MARKS_AT else None

    def ended(self, pid: int) -> Blame:
        """A worker is no more: judge what it was at, and forget its record."""
        found = self.record(pid)
        with contextlib.suppress(OSError):
            (self._folder / f"worker-{pid}").unlink()
        if found is None or found.began is None:
            return Blame(inputs=0, refused="")
        for mark in found.marks:
            self._suspects[mark] = time.monotonic()
        if found.digest:
            self._refused[found.digest] = found.marks[0]
        self._publish()
        return Blame(inputs=len(found.marks), refused=found.digest)

    def ended_unseen(self) -> list[int]:
        """Processes that left a record and are no more: a worker may end at its first request, before any look at it."""
        numbers = (path.name.partition("-")[2] for path in self._folder.glob("worker-*"))
        return [int(number) for number in numbers if not psutil.pid_exists(int(number))]

    def tidy(self) -> None:
        """Suspects that were answered, or whose time is over, are none any more."""
        before = len(self._suspects)
        for path in self._folder.glob("survived-*"):
            self._suspects.pop(int(path.name.partition("-")[2], 16), None)
            path.unlink(missing_ok=True)
        ends = time.monotonic() - _SUSPECT_SECONDS
        self._suspects = {mark: since for mark, since in self._suspects.items() if since > ends}
        if self._unpublished or len(self._suspects) != before:
            self._publish()

    def close(self) -> None:
        self._state.close()

    def _publish(self) -> None:
        """The lists first, then the number that makes workers read them."""
        marks = sorted({*self._suspects, *self._refused.values()})
        lists = {"suspects": [f"{mark:016x}" for mark in marks], "refused": sorted(self._refused)}
        partial = self._folder / ".list.json"
        try:
            partial.write_text(json.dumps(lists))
            partial.replace(self._folder / "list.json")
        except OSError as error:
            self._unpublished = str(error)
            return
        self._unpublished = ""
        (generation,) = _GENERATION.unpack_from(self._state)
        _GENERATION.pack_into(self._state, 0, generation + 1)


def _read(data: bytes) -> Record:
    began, count, alone, done, longest, digest = _HEADER.unpack_from(data)
    (length,) = struct.unpack_from("=H", data, _REASON_AT)
    reason = data[_REASON_AT + 2 : _REASON_AT + 2 + length].decode("utf-8", "replace")
    return Record(
        began=began / 1e9 if began else None,
        marks=struct.unpack_from(f"={count}Q", data, _MARKS_AT) if began else (),
        digest=digest.hex() if alone else "",
        done=done,
        longest=longest / 1e9,
        broken=reason,
    )
