"""While processes die, hang and are told to stop: nobody gets a failed answer."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import statistics
import time
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks.chaos.bench import Bench, Finding, brief, first_failure, say
from benchmarks.chaos.stack import Server, wait_until

BACK_SECONDS = 5.0
"""From the death of a worker until its successor begins to load."""
_KILL_LIMIT = 90.0
_RELOADS = 3


@dataclass(frozen=True, slots=True)
class Replaced:
    """One worker's death and what came after it."""

    seconds: float
    """Until its successor was ready."""
    loading: float
    """Of these, from the start of the successor's process."""

    @property
    def waiting(self) -> float:
        """Until the successor's process began."""
        return self.seconds - self.loading


def kill_workers(bench: Bench) -> Finding:
    """SIGKILL to a worker of either replica in turn."""
    replaced: list[Replaced] = []
    with bench.load() as under:
        turns = itertools.cycle(bench.stack.servers)
        while under.seconds() < bench.form.kills:
            next_at = under.seconds() + bench.form.kill_every
            replaced.append(_kill_a_worker(next(turns)))
            under.running.wait_seconds(max(0.0, next_at - under.seconds()))
    result = under.found()
    waits = [item.waiting for item in replaced]
    say(
        f"    {len(replaced)} kills, {result.failed} failed{first_failure(result)}, back after {max(waits):.1f} s + loading"
    )
    measured = (
        f"{result.failed} of {result.planned} failed in {len(replaced)} kills; the successor starts after "
        f"{statistics.median(waits):.1f} s (longest {max(waits):.1f} s) and loads in "
        f"{statistics.median(item.loading for item in replaced):.1f} s"
    )
    kept = result.failed == 0 and max(waits) <= BACK_SECONDS
    details = brief(result) | {"replaced": [{"waiting": item.waiting, "loading": item.loading} for item in replaced]}
    return Finding(measured, kept, details)


def stop_and_reload(bench: Bench) -> Finding:
    """SIGTERM to one replica, which comes back, and a reload of the gateway's configuration."""
    details: dict[str, Any] = {}
    victim = bench.stack.servers[0]
    with bench.load() as under:
        before = victim.restarts
        victim.terminate()
        wait_until(lambda: victim.restarts > before, "the replica has stopped", 60.0, log=victim.log)
        details["stopped_after_seconds"] = round(under.seconds(), 1)
        bench.stack.wait_ready()
    stopped = under.found()
    with bench.load() as under:
        for _ in range(_RELOADS):
            bench.stack.gate.reload()
            under.running.wait_seconds(1.5)
    reloaded = under.found()
    say(f"    SIGTERM: {stopped.failed} failed{first_failure(stopped)}")
    say(f"    reload: {reloaded.failed} failed{first_failure(reloaded)}")
    measured = (
        f"SIGTERM: {stopped.failed} of {stopped.planned} failed; {_RELOADS} reloads: {reloaded.failed} of "
        f"{reloaded.planned} failed"
    )
    details |= {"sigterm": brief(stopped), "reload": brief(reloaded)}
    return Finding(measured, stopped.failed == reloaded.failed == 0, details)


def kill_java_and_hang(bench: Bench) -> Finding:
    """SIGKILL to the java of one replica; then SIGSTOP to a worker."""
    details: dict[str, Any] = {}
    victim = bench.stack.servers[1]
    with bench.load() as under:
        before = victim.restarts
        os.kill(victim.java(), signal.SIGKILL)
        wait_until(lambda: victim.restarts > before, "the replica is started again", 60.0, log=victim.log)
        bench.stack.wait_ready()
        details["java_back_after_seconds"] = round(under.seconds(), 1)
    killed = under.found()
    with bench.load() as under:
        (worker, *_) = victim.ready_workers()
        psutil.Process(worker.pid).suspend()
        details["hang_recycled_after_seconds"] = round(_replacement(victim, worker.pid, time.time()).seconds, 1)
    hung = under.found()
    say(f"    java: {killed.failed} failed{first_failure(killed)}")
    say(f"    SIGSTOP: {hung.failed} failed{first_failure(hung)}")
    measured = (
        f"java: {killed.failed} of {killed.planned} failed; SIGSTOP: {hung.failed} of {hung.planned} failed, "
        f"recycled and ready again after {details['hang_recycled_after_seconds']:.1f} s"
    )
    details |= {"java": brief(killed), "sigstop": brief(hung)}
    return Finding(measured, killed.failed == hung.failed == 0, details)


def _kill_a_worker(server: Server) -> Replaced:
    wait_until(lambda: bool(server.ready_workers()), "a worker is ready", _KILL_LIMIT, log=server.log)
    pid = server.ready_workers()[0].pid
    at = time.time()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return _replacement(server, pid, at)


def _replacement(server: Server, gone: int, at: float) -> Replaced:
    """Returns when as many workers as before are ready and `gone` is not among them."""
    others = {worker.pid for worker in server.ready_workers()} - {gone}
    new: list[int] = []

    def back() -> bool:
        new[:] = [worker.pid for worker in server.ready_workers() if worker.pid not in others | {gone}]
        return bool(new)

    wait_until(back, f"a successor of worker {gone} is ready", _KILL_LIMIT, log=server.log)
    now = time.time()
    return Replaced(now - at, now - psutil.Process(new[0]).create_time())
