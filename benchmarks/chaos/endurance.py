"""Long stretches: a soak, and many deploys and retirements. Does anything grow?"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos import resources
from benchmarks.chaos.bench import Bench, Finding, brief, say
from benchmarks.chaos.resources import Held, Slope
from benchmarks.chaos.stack import Stack, wait_until
from marina.rollout import Rollout, Trial

_SAMPLES = 120
_LEAST_SECONDS = 2.0
_WARM_UP = 0.4
"""Share of a soak in which buffers, compiled code and heaps reach their size."""
_FLAT = 0.05
"""Growth of a process's memory over the rest of a soak that counts as none, as a share of it."""
_EXPLAINED = ("readAddress(..) failed: Connection reset by peer",)
"""HAProxy closes pooled connections that rest with a reset, which TorchServe logs as an error; no request is on them."""
_CYCLE_MIB = 0.25
"""Growth per cycle that counts as none: freed memory that an allocator keeps."""


def soak(bench: Bench, minutes: float, temp: Path) -> Finding:
    """60 % of the capacity for so long: no error that has no cause, and memory that stays."""
    held: list[tuple[float, Held]] = []
    marks = {server.name: server.log.stat().st_size for server in bench.stack.servers}
    with bench.load() as under:
        every = max(_LEAST_SECONDS, minutes * 60 / _SAMPLES)
        while under.seconds() < minutes * 60:
            held.append((under.seconds(), resources.look(bench.stack.pids(), temp)))
            under.running.wait_seconds(every)
    result = under.found()
    complaints = [line for server in bench.stack.servers for line in _complaints(server.log, marks[server.name])]
    slopes = _slopes(held)
    growing = [name for name, slope in slopes.items() if _grows(slope, held[-1][0] * (1 - _WARM_UP))]
    words = ", ".join(
        f"{name} {slope.per_unit * 3600:+.0f} MiB/h [{slope.low * 3600:+.0f}, {slope.high * 3600:+.0f}]"
        for name, slope in sorted(slopes.items())
    )
    measured = (
        f"{minutes:g} minutes: {result.failed} of {result.planned} failed, {len(complaints)} warnings in the log; "
        f"{'memory flat' if not growing else 'growing: ' + ', '.join(growing)}; {words}"
    )
    say(f"    {measured}")
    details: dict[str, Any] = {
        "load": brief(result), "complaints": complaints[:20], "minutes": minutes,
        "mib_per_second": {name: slope.as_dict() for name, slope in slopes.items()},
        "memory_mib": [{"seconds": round(at, 1), **item.memory} for at, item in held],
    }  # fmt: skip
    return Finding(measured, result.failed == 0 and not complaints and not growing, details)


def _slopes(held: list[tuple[float, Held]]) -> dict[str, Slope]:
    """MiB per second of each process, after the warm-up."""
    late = [(at, item.memory) for at, item in held if at >= _WARM_UP * held[-1][0]]
    found = {}
    for name in sorted({name for _, memory in late for name in memory}):
        points = [(at, memory[name]) for at, memory in late if name in memory]
        found[name] = resources.fit([at for at, _ in points], [size for _, size in points])
    return found


def _grows(slope: Slope, seconds: float) -> bool:
    """Whether it certainly does, and by more than a little."""
    return slope.low > 0 and slope.per_unit * seconds > _FLAT * slope.mean


def _complaints(log: Path, start: int) -> list[str]:
    """Warnings and errors that a server wrote from there on."""
    found = []
    with log.open("rb") as stream:
        stream.seek(start)
        for line in stream:
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                serious = isinstance(entry, dict) and entry.get("level") in ("WARN", "ERROR", "FATAL")
                if serious and not any(words in str(entry.get("exception", "")) for words in _EXPLAINED):
                    found.append(line.decode("utf-8", "replace").strip()[:500])
    return found


def cycles(stack: Stack, archive: Path, count: int, temp: Path, *, before: int = 3) -> Finding:
    """Deploy the second version, roll back, retire it: so often. What is there afterwards is what was there when the
    first `before` of them were done: they fill caches and load code.
    """
    trial = Trial(sample_seconds=0.0, stages=None)
    wait_until(lambda: _only_ready_workers(stack), "only ready workers run", 60.0, log=stack.servers[0].log)
    roles = _roles(stack)
    held = [_after_cycles(stack, archive, before, temp, trial, roles)]
    began = time.monotonic()
    done = 0
    while done < count:
        several = min(max(1, count // 20), count - done)
        held.append(_after_cycles(stack, archive, several, temp, trial, roles))
        done += several
        say(f"    {done} of {count} cycles, {resources.grown(held[0], held[-1])}")
    per_cycle = max(1, count // 20)
    memory = resources.fit(
        [index * per_cycle for index in range(len(held))], [sum(item.memory.values()) for item in held]
    )
    grown = resources.grown(held[0], held[-1])
    more = {name: grown[name] for name in ("descriptors", "sockets", "temp_files") if grown[name] > 0}
    certain = max(memory.low, 0.0) if len(held) > 4 else max(0.0, grown["memory_mib"] / count)
    kept = not grown["processes"] and not more and certain <= _CYCLE_MIB
    measured = (
        f"{count} cycles in {time.monotonic() - began:.0f} s: processes {grown['processes'] or 'the same'}, descriptors "
        f"{grown['descriptors']:+d}, sockets {grown['sockets']:+d}, temp files {grown['temp_files']:+d}, memory "
        f"{grown['memory_mib']:+.0f} MiB ({memory.per_unit * 1024:+.0f} KiB per cycle)"
    )
    say(f"    {measured}")
    details = {"cycles": count, "grown": grown, "mib_per_cycle": memory.as_dict()}
    details["memory_mib"] = [item.memory for item in held]
    return Finding(measured, kept, details)


def _only_ready_workers(stack: Stack) -> bool:
    """Nothing of what was done before is still ending."""
    return all(
        {pid for pid, role in server.pids().items() if role.endswith(" worker")}
        == {worker.pid for worker in server.ready_workers()}
        for server in stack.servers
    )


def _roles(stack: Stack) -> list[list[str]]:
    return [sorted(server.pids().values()) for server in stack.servers]


def _after_cycles(stack: Stack, archive: Path, count: int, temp: Path, trial: Trial, roles: list[list[str]]) -> Held:
    for _ in range(count):
        rollout = Rollout(stack.replicas(), stack.store, python=sys.executable, trial=trial)
        rollout.deploy(archive)
        rollout.rollback(stack.model)
        rollout.retire(stack.model, "2.0")
        (stack.store / archive.name).unlink(missing_ok=True)

    def settled() -> bool:
        """Nothing of the last cycle is still ending."""
        noted = (int(path.name.removeprefix("worker-")) for path in temp.rglob("worker-*"))
        return _roles(stack) == roles and all(psutil.pid_exists(pid) for pid in noted)

    wait_until(settled, f"the same processes run as before: {roles}", 60.0, log=stack.servers[0].log)
    return resources.look(stack.pids(), temp)
