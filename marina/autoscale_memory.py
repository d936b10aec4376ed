"""What one worker takes, and for how many more there is room: on the host and on GPUs.

A further worker is expected to take what the largest worker of its version takes now beyond what it shares (USS), and
what it took more than now at its largest (its peak, VmHWM, less its present resident size): loading can need both. Room
is what the system could give without swapping: of the machine, or of the control group when that is less, less a reserve
of 5 %; on GPUs what the fullest of them has left, because TorchServe deals workers out to GPUs in turn.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from marina import load_server

RESERVE = 0.05
"""Share of the memory that is left to everything else."""
_MIB = 1 << 20
_GROUPS = Path("/sys/fs/cgroup")
_NVIDIA_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Bytes of one worker."""

    host: int
    gpu: int = 0

    def __str__(self) -> str:
        gpu = f" and {self.gpu / _MIB:.0f} MiB on a GPU" if self.gpu else ""
        return f"{self.host / _MIB:.0f} MiB{gpu}"


NOTHING = Cost(host=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU at one moment, in bytes."""

    free: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Free:
    """What there is, in bytes, the reserve left out."""

    host: int
    gpus: tuple[Gpu, ...] = ()
    budget: int | None = None
    """What is left of the budget that was set for all workers; None: none was set."""

    def room(self, cost: Cost, *, loading: Cost = NOTHING) -> int:
        """Further workers of this cost, beside what workers under way will still take: on one GPU, all of them at worst."""
        host = min(self.host, self.budget if self.budget is not None else self.host) - loading.host
        rooms = [host // cost.host if cost.host else 0]
        if cost.gpu and self.gpus:
            least = min(gpu.free for gpu in self.gpus)
            rooms.append(max(0, least - loading.gpu) // cost.gpu * len(self.gpus))
        return max(0, min(rooms))

    def __str__(self) -> str:
        words = [f"{self.host / _MIB:.0f} MiB free"]
        if self.budget is not None:
            words.append(f"{self.budget / _MIB:.0f} MiB left of the budget")
        if self.gpus:
            words.append(f"{min(gpu.free for gpu in self.gpus) / _MIB:.0f} MiB free on the fullest GPU")
        return ", ".join(words)


def cost(pids: Sequence[int], *, gpu_workers: int = 0) -> Cost | None:
    """The largest of these workers of one version; None when none of them lets us look.

    `gpu_workers`: of all versions, for where the driver does not tell who uses what (in a container it knows other
    process ids): then a worker's share of all that is used.
    """
    host = [found for pid in pids if (found := _host_bytes(pid)) is not None]
    if not host:
        return None
    return Cost(host=max(host), gpu=_gpu_bytes(pids, gpu_workers) if gpu_workers else 0)


def free(*, budget: int = 0, workers: Sequence[int] = (), on_gpu: bool = False) -> Free:
    """What there is now. `budget` in bytes for all `workers` together; 0: none was set."""
    left = None
    if budget:
        trees = [process for pid in workers for process in _tree(pid)]
        used = load_server.memory(trees)
        left = budget - int((used.pss if used.pss is not None else used.rss) * _MIB)
    return Free(host=_host_free(_GROUPS), gpus=tuple(_reserved(gpu) for gpu in gpus()) if on_gpu else (), budget=left)


def gpus() -> list[Gpu]:
    """What nvidia-smi says of each GPU that workers can use; none without it."""
    found = []
    for number, line in enumerate(_nvidia("--query-gpu=memory.free,memory.total")):
        with contextlib.suppress(ValueError):
            left, total = (int(part) * _MIB for part in line.split(","))
            if _is_visible(number):
                found.append(Gpu(free=left, total=total))
    return found


def _is_visible(number: int) -> bool:
    """By CUDA_VISIBLE_DEVICES, which nvidia-smi does not heed; as in TorchServe, an empty one names none and hides none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return not visible or str(number) in [part.strip() for part in visible.split(",")]


def _reserved(gpu: Gpu) -> Gpu:
    return Gpu(free=max(0, gpu.free - int(RESERVE * gpu.total)), total=gpu.total)


def _host_bytes(pid: int) -> int | None:
    tree = _tree(pid)
    used = load_server.memory(tree)
    if not tree or not used.rss:
        return None
    own = used.uss if used.uss is not None else used.rss
    return int(own * _MIB) + sum(_beyond(process.pid) for process in tree)


def _beyond(pid: int) -> int:
    """By how much the process was larger at its largest."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        values = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
        return max(0, _kib(values["VmHWM"]) - _kib(values["VmRSS"])) if "VmHWM" in values else 0
    return 0


def _kib(text: str) -> int:
    return int(text.split()[0]) << 10


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return load_server.tree_of(psutil.Process(pid))
    except psutil.Error:
        return []


def _gpu_bytes(pids: Sequence[int], gpu_workers: int) -> int:
    used: Mapping[int, int] = _by_process()
    known = [used[pid] for pid in pids if pid in used]
    if known:
        return max(known)
    taken = sum(gpu.total - gpu.free for gpu in gpus())
    return math.ceil(taken / gpu_workers)


def _by_process() -> dict[int, int]:
    found: dict[int, int] = {}
    for line in _nvidia("--query-compute-apps=pid,used_memory"):
        with contextlib.suppress(ValueError):
            pid, used = (int(part) for part in line.split(","))
            found[pid] = found.get(pid, 0) + used * _MIB
    return found


def _nvidia(query: str) -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _host_free(groups: Path) -> int:
    machine = psutil.virtual_memory()
    left = machine.available - int(RESERVE * machine.total)
    for limit, used in _limits(groups):
        left = min(left, limit - used - int(RESERVE * limit))
    return max(0, left)


def _limits(groups: Path) -> list[tuple[int, int]]:
    """(limit, in use) of every control group above us that has a limit; what the kernel can drop is not in use."""
    found = []
    for folder in _our_groups(groups):
        for limit_file, used_file, stat_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((folder / name).read_text()) for name in (limit_file, used_file))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                found.append((limit, max(0, used - int(stat.get(stat_key, 0)))))
    return found


def _our_groups(groups: Path) -> list[Path]:
    """Version 2 (one tree), and version 1's own tree for memory."""
    folders = [groups, groups / "memory"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names in ("", "memory"):
                root = groups / names
                inner = [root / part for part in (Path(path.lstrip("/")), *Path(path.lstrip("/")).parents)]
                folders += [folder for folder in inner if folder not in folders]
    return folders
