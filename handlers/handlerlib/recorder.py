"""A few of the inputs that a worker is asked about, set aside while somebody asks for them.

A rollout compares a new version with the old one on what clients really send. Only a worker has the inputs as the model
gets them, whatever form the requests had and whether a gateway stands in front or not; so the rollout makes a folder
beside the worker's temporary files, and the worker puts inputs there until there are enough (`marina.shadow` is the other
side). Without that folder it costs one look every quarter of a second.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

MOST_INPUTS = 32
MOST_BYTES = 8 << 20
"""Per folder; several workers at once may put in a little more."""
PARTIAL = "."
"""Starts the name of a file that is not complete yet."""
LONGEST_SECONDS = 60.0
"""Then whoever asked has gone away."""
_LOOK_SECONDS = 0.25


def folder_name(name: str, version: str) -> str:
    """Of the folder by which inputs of this model version are asked for, in the workers' temp folder."""
    return f"record-{name}-{version}"


class Recorder:
    """One worker's side. `offer` never raises: an input that cannot be set aside is answered all the same."""

    def __init__(self, name: str, version: str, *, folder: Path | None = None) -> None:
        """`folder` is the temp folder that the workers of one server share; the process's own by default."""
        self._folder = (folder or Path(tempfile.gettempdir())) / folder_name(name, version)
        self._look_at = 0.0

    def offer(self, inputs: Iterable[bytes | bytearray]) -> None:
        """Encoded inputs as clients sent them."""
        now = time.monotonic()
        if now < self._look_at:
            return
        with contextlib.suppress(OSError):  # nobody asks, or there is no room
            if time.time() - self._folder.stat().st_ctime < LONGEST_SECONDS and self._take(inputs):
                return
        self._look_at = now + _LOOK_SECONDS

    def _take(self, inputs: Iterable[bytes | bytearray]) -> bool:
        """Whether there is room for more."""
        sizes = [entry.stat().st_size for entry in os.scandir(self._folder)]
        count, size = len(sizes), sum(sizes)
        for data in inputs:
            if count >= MOST_INPUTS or size + len(data) > MOST_BYTES:
                return False
            whole = self._folder / f"{os.getpid()}-{time.monotonic_ns()}"
            partial = whole.with_name(f"{PARTIAL}{whole.name}")
            partial.write_bytes(data)
            partial.replace(whole)
            count, size = count + 1, size + len(data)
        return True
