"""What a worker is working on, written where it outlives the worker; and the inputs that ended two workers, refused.

A worker that is killed, runs out of memory or crashes in native code says nothing any more. So each keeps a small file in
shared memory, `worker-PID`, with marks of the inputs of its current batch and since when; writing it costs no system call.
When a worker ends, the supervisor (`marina.watchdog`) reads its file: those inputs are suspects. A worker that meets a
suspect runs it alone, so that its second kill is its own beyond doubt; then it is refused, by its SHA-256, and never
reaches a model again. A suspect that is answered is none any more. The same files show a worker that hangs (how long it
has been at its batch) and one whose GPU context is lost.

Active only where a supervisor made the folder `quarantine` in the temp folder that its workers share.

    worker-PID  u64 began (CLOCK_MONOTONIC ns, 0: idle), u32 inputs, u32 alone, u64 batches done, u64 longest ns,
                32 bytes SHA-256 of a suspect that runs alone, u16 + text why it is broken (at 64), u64 marks (from 256)
    state       u64 generation of `list.json`: {"suspects": [mark as hex], "refused": [sha256 as hex]}
    survived-M  an empty file: the suspect with mark M was answered
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from handlerlib.errors import RequestError, UnprocessableInput

FOLDER = "quarantine"
RECORD_BYTES = 4096
HEADER = struct.Struct("=QIIQQ32s")
REASON_AT = 64
REASON_BYTES = 190
MARKS_AT = 256
MOST_MARKS = (RECORD_BYTES - MARKS_AT) // 8
GENERATION = struct.Struct("=Q")
_TAIL_BYTES = 256
_LOST_CONTEXT = (
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "uncorrectable ECC",
    "CUDA error: unknown error",
    "CUDA error: the launch timed out",
)
"""CUDA errors after which every later call of the same process fails (CUDA Runtime API, cudaError_t: "the only way to
continue using CUDA is to terminate and relaunch the process")."""

Output = TypeVar("Output")


def mark_of(data: bytes | bytearray) -> int:
    """A quick mark of an encoded input, 64 bits: length and checksum of its end. Others may share it; a suspect's
    SHA-256 tells them apart."""
    return zlib.crc32(data[-_TAIL_BYTES:]) << 32 | len(data) & 0xFFFFFFFF


class Guard:
    """One worker's side."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the one that the supervisor made. Raises OSError when it is not there or cannot be written."""
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        self._folder = folder
        self._record = _shared(folder / f"worker-{os.getpid()}", RECORD_BYTES)
        self._state = _shared(folder / "state", mmap.PAGESIZE)
        self._generation = 0
        self._suspects: frozenset[int] = frozenset()
        self._refused: frozenset[str] = frozenset()
        self._done = 0
        self._longest = 0
        self._broken = False

    def working_on(self, marks: Sequence[int], digest: str = "") -> int:
        """The file says that these inputs are being worked on, until `finished`; `digest` when it is one suspect, alone.

        Returns what `finished` wants.
        """
        began = time.monotonic_ns()
        if self._broken:
            return began
        count = min(len(marks), MOST_MARKS)
        record = self._record
        struct.pack_into(f"={count}Q", record, MARKS_AT, *marks[:count])
        HEADER.pack_into(record, 0, began, count, bool(digest), self._done, self._longest, bytes.fromhex(digest))
        return began

    def finished(self, began: int) -> None:
        """The file says that this worker is idle; a broken one's keeps saying what it broke at."""
        if self._broken:
            return
        self._done += 1
        self._longest = max(self._longest, time.monotonic_ns() - began)
        HEADER.pack_into(self._record, 0, 0, 0, 0, self._done, self._longest, b"")

    def run(
        self, inputs: Sequence[bytes | bytearray], work: Callable[[Sequence[bytes | bytearray]], list[Output]]
    ) -> list[Output | RequestError]:
        """`work` on the inputs, one output for each, in order: refused ones are left out, suspects go alone, and no more at
        once than the record has room for."""
        if not inputs:
            return list(work(inputs))
        if len(inputs) > MOST_MARKS:
            parts = [inputs[start : start + MOST_MARKS] for start in range(0, len(inputs), MOST_MARKS)]
            return [output for part in parts for output in self.run(part, work)]
        self._look()
        marks = [mark_of(data) for data in inputs]
        if self._suspects.isdisjoint(marks):
            return self._held(marks, "", inputs, work)
        outputs: list[Output | RequestError | None] = [None] * len(inputs)
        others = [index for index, mark in enumerate(marks) if mark not in self._suspects]
        if others:
            found = self._held([marks[index] for index in others], "", [inputs[index] for index in others], work)
            for index, output in zip(others, found, strict=True):
                outputs[index] = output
        for index, mark in enumerate(marks):
            if mark in self._suspects:
                outputs[index] = self._alone(inputs[index], mark, work)
        return [output for output in outputs if output is not None]

    def _alone(
        self, data: bytes | bytearray, mark: int, work: Callable[[Sequence[bytes | bytearray]], list[Output]]
    ) -> Output | RequestError:
        digest = hashlib.sha256(data).hexdigest()
        if digest in self._refused:
            return UnprocessableInput("this input has ended two workers of the server and is not tried again")
        (output,) = self._held([mark], digest, [data], work)
        with contextlib.suppress(OSError):
            (self._folder / f"survived-{mark:016x}").touch()
        return output

    def _held(
        self,
        marks: Sequence[int],
        digest: str,
        inputs: Sequence[bytes | bytearray],
        work: Callable[[Sequence[bytes | bytearray]], list[Output]],
    ) -> list[Output | RequestError]:
        began = self.working_on(marks, digest)
        try:
            return self._checked(work(inputs))
        finally:
            self.finished(began)

    def _checked(self, outputs: list[Output]) -> list[Output | RequestError]:
        """Tell the supervisor, in the record, of an error after which this process cannot work any more."""
        for output in outputs:
            cause = output.__cause__ if isinstance(output, RequestError) else None
            if cause is not None and any(words in str(cause) for words in _LOST_CONTEXT):
                reason = str(cause).splitlines()[0].encode()[:REASON_BYTES]
                struct.pack_into(f"=H{len(reason)}s", self._record, REASON_AT, len(reason), reason)
                self._broken = True
        return [*outputs]

    def _look(self) -> None:
        """Read the lists again when the supervisor has changed them."""
        (generation,) = GENERATION.unpack_from(self._state)
        if generation == self._generation:
            return
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            lists = json.loads((self._folder / "list.json").read_text())
            self._suspects = frozenset(int(mark, 16) for mark in lists["suspects"])
            self._refused = frozenset(lists["refused"])
            self._generation = generation


class Unguarded:
    """In place of a `Guard` where no supervisor watches."""

    def run(
        self, inputs: Sequence[bytes | bytearray], work: Callable[[Sequence[bytes | bytearray]], list[Output]]
    ) -> list[Output | RequestError]:
        """`work` on the inputs."""
        return [*work(inputs)]


def guard() -> Guard | Unguarded:
    """What this worker is to run its batches with."""
    try:
        return Guard(Path(tempfile.gettempdir()) / FOLDER)
    except OSError:
        return Unguarded()


def _shared(path: Path, size: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)  # a page that a full disk cannot give ends the process by SIGBUS
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
