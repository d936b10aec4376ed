"""What processes hold: memory, file descriptors, sockets, temp files, and whether it grows."""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from marina.journal import OLDER_FILE
from marina.load_stats import student_t


@dataclass(frozen=True, slots=True)
class Held:
    """At one moment."""

    memory: dict[str, float]
    """What the process is -> MiB that are its own (USS), of all such processes together."""
    processes: dict[str, int]
    descriptors: dict[str, int]
    sockets: int
    temp_files: frozenset[str]
    """Below the temp folder of this run."""


def look(pids: Mapping[int, str], temp: Path) -> Held:
    """What these processes hold now. One that has just ended is left out."""
    memory: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    descriptors: Counter[str] = Counter()
    sockets = 0
    for pid, role in pids.items():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            own = process.memory_full_info().uss
            open_files = process.num_fds()
            sockets += _sockets(pid)
            memory[role] += own
            descriptors[role] += open_files
            counted[role] += 1
    # The journal of rollouts is turned over after some hundred lines: at most one older file, whatever is done.
    found = (path for path in temp.rglob("*") if not path.is_dir() and path.name != OLDER_FILE)
    files = frozenset(str(path.relative_to(temp)) for path in found)
    return Held({role: own / 2**20 for role, own in memory.items()}, dict(counted), dict(descriptors), sockets, files)


def _sockets(pid: int) -> int:
    found = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found += str(path.readlink()).startswith("socket:")
    return found


@dataclass(frozen=True, slots=True)
class Slope:
    """A straight line through samples."""

    per_unit: float
    low: float
    high: float
    """With 95 % confidence."""
    mean: float

    def as_dict(self) -> dict[str, float]:
        """As JSON shows it."""
        return {"slope": self.per_unit, "low": self.low, "high": self.high, "mean": self.mean}


def fit(x: Sequence[float], y: Sequence[float]) -> Slope:
    """Least squares with Student's interval of the slope, widened for samples that depend on their neighbours: the number of
    independent ones is n (1 - r) / (1 + r), r the correlation of neighbouring residuals (Bartlett 1935).
    """
    count = len(x)
    middle_x, middle_y = sum(x) / count, sum(y) / count
    spread = sum((item - middle_x) ** 2 for item in x)
    if count < 4 or spread == 0:
        return Slope(0.0, -math.inf, math.inf, middle_y)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread
    rest = [b - middle_y - slope * (a - middle_x) for a, b in zip(x, y, strict=True)]
    square = sum(item**2 for item in rest)
    near = sum(a * b for a, b in itertools.pairwise(rest)) / square if square > 0 else 0.0
    near = min(max(near, 0.0), 0.99)
    independent = max(3.0, count * (1 - near) / (1 + near))
    error = math.sqrt(square / (independent - 2) / spread * count / independent) if square > 0 else 0.0
    half = student_t(max(1, round(independent) - 2)) * error
    return Slope(slope, slope - half, slope + half, middle_y)


@contextlib.contextmanager
def temp_folder() -> Iterator[Path]:
    """A new one with a path short enough for Unix sockets, gone after the block."""
    with tempfile.TemporaryDirectory(prefix="c-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def grown(before: Held, after: Held) -> dict[str, Any]:
    """What there is more of."""
    names = {*before.processes, *after.processes}
    return {
        "processes": {
            name: after.processes.get(name, 0) - before.processes.get(name, 0)
            for name in names
            if after.processes.get(name, 0) != before.processes.get(name, 0)
        },
        "descriptors": sum(after.descriptors.values()) - sum(before.descriptors.values()),
        "sockets": after.sockets - before.sockets,
        "temp_files": len(after.temp_files) - len(before.temp_files),
        "new_files": sorted(after.temp_files - before.temp_files),
        "memory_mib": round(sum(after.memory.values()) - sum(before.memory.values()), 1),
    }
