"""What every row of the table is measured with: the stack, its loads, what is normal, and the verdict's form."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos.cases import MODEL, Cases
from benchmarks.chaos.stack import Stack
from marina import loadgen, serving
from marina.canary import Stages
from marina.loadgen import Closed, Open, Result, Scenario
from marina.rollout import Rollout, Step, Trial
from marina.serving import ModelServing, Serving

SHARE = 0.6
"""Of the capacity, at which everything happens."""
CONNECTIONS = 64
"""Of the closed loop that finds the capacity: as many requests as the gateway lets two replicas work on."""
OPEN_CONNECTIONS = 512
REQUEST_SECONDS = 35.0
"""After which a client has given up: later than the gateway's own deadline, so that a request that hangs is answered 504."""
TIMES_QUIET_P99 = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How long it all takes."""

    name: str
    capacity: float
    quiet: float
    least: float
    """Of every load beside which something is done."""
    kills: float
    """Seconds of killing workers."""
    kill_every: float
    overload: float
    poison: float
    """Of each stretch."""
    poison_rounds: int
    requests: int
    """Of the identity model, at most,"""
    identity: float | None
    """and for so long at most."""
    canary: float
    """Of each of its shares."""


FULL = Form(
    name="full", capacity=12.0, quiet=15.0, least=10.0, kills=120.0, kill_every=10.0, overload=60.0, poison=4.0,
    poison_rounds=4, requests=1_000_000, identity=120.0, canary=3.0,
)  # fmt: skip
QUICK = Form(
    name="quick", capacity=6.0, quiet=8.0, least=5.0, kills=21.0, kill_every=10.0, overload=10.0, poison=2.0,
    poison_rounds=3, requests=50_000, identity=60.0, canary=1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table."""

    measured: str
    kept: bool
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    """Handed from row to row."""

    stack: Stack
    cases: Cases
    form: Form
    share: float = SHARE
    capacity: float = 0.0
    """Good answers per second of a closed loop."""
    quiet_p99_ms: float = 0.0
    """When nothing happens, just before the row."""
    first_p99_ms: float = 0.0
    """The same when the capacity was measured."""

    @property
    def rate(self) -> float:
        """60 % of the capacity, or the share that was asked for."""
        return self.share * self.capacity

    def scenario(self, loop: Open | Closed, *, damaged_every: int = 0, **changes: Any) -> Scenario:
        """Real images, every answer checked, over as long as the caller wants."""
        values: dict[str, Any] = {
            "url": self.stack.url,
            "headers": self.stack.headers,
            "payloads": self.cases.payloads(damaged_every),
            "check": self.cases.check(damaged_every),
            "loop": loop,
            "duration": None,
            "warm_up": 2.0,
            "timeout": REQUEST_SECONDS,
            "server": None,
        }
        return Scenario(**values | changes)

    def open_loop(self, rate: float | None = None) -> Open:
        """Constant arrival at 60 % of the capacity, or at `rate`."""
        return Open(rate=rate or self.rate, connections=OPEN_CONNECTIONS)

    @contextlib.contextmanager
    def load(self, **changes: Any) -> Iterator[Under]:
        """60 % of the capacity while the block lasts, and for some time at least; then `result`."""
        with loadgen.start(self.scenario(self.open_loop(), **changes)) as running:
            running.wait_measuring()
            under = Under(running)
            yield under
            running.wait_seconds(max(2.0, self.form.least - under.seconds()))
            running.stop()
            under.result = running.result()

    def rollout(self) -> Rollout:
        """On both replicas, with a canary at the gateway."""
        stages = Stages(seconds=self.form.canary)
        trial = Trial(sample_seconds=2.0, stages=stages)
        return Rollout(
            self.stack.replicas(), self.stack.store, python=sys.executable, front=self.stack.front, trial=trial,
            report=_tell,
        )  # fmt: skip

    def restore(self) -> None:
        """Whatever the row before has left: both servers ready, version 1.0 with one worker each, nothing else."""
        self.stack.wait_ready()
        rollout = self.rollout()
        rollout.recover()
        wanted = ModelServing(default="1.0", versions={"1.0": 1})
        known = serving.read(self.stack.store)
        if known is None or known.models.get(MODEL) != wanted or not self._as_wanted():
            serving.write(self.stack.store, known or Serving())
            rollout.bring(MODEL, wanted)
        self.stack.wait_ready()

    def _as_wanted(self) -> bool:
        found = [item for replica in self.stack.replicas() for item in replica.status()]
        return len(found) == len(self.stack.servers) and all(
            (item.version, item.ready_workers, len(item.workers)) == ("1.0", 1, 1) for item in found
        )


@dataclass
class Under:
    """A load that is running."""

    running: loadgen.Load
    began: float = field(default_factory=time.monotonic)
    result: Result | None = None

    def seconds(self) -> float:
        """Since the measurement began."""
        return time.monotonic() - self.began

    def found(self) -> Result:
        """Once the block is left."""
        assert self.result is not None
        return self.result


def first_failure(result: Result) -> str:
    """For people; empty without one."""
    return f" (the first: {result.failures[0].outcome}: {result.failures[0].detail})" if result.failures else ""


def p99_ms(result: Result) -> float:
    """Of the good answers; endless without any."""
    return result.latency.p99.value if result.latency is not None else float("inf")


def brief(result: Result) -> dict[str, Any]:
    """What of a load goes into the results file."""
    latency = result.latency
    return {
        "seconds": round(result.seconds, 2),
        "planned": result.planned,
        "good": result.good,
        "errors": dict(result.errors),
        "offered_per_second": round(result.offered, 1),
        "good_per_second": round(result.throughput.value, 1),
        "p50_ms": round(latency.p50.value, 2) if latency is not None else None,
        "p99_ms": round(latency.p99.value, 2) if latency is not None else None,
        "max_ms": round(latency.max_ms, 1) if latency is not None else None,
        "client_behind_p99_ms": round(result.behind.p99.value, 2) if result.behind is not None else None,
        "failures": [dataclasses.asdict(item) for item in result.failures[:10]],
    }


def say(text: str) -> None:
    """Progress, on standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _tell(step: Step) -> None:
    where = f"{step.where}: " if step.where else ""
    say(f"      {where}{step.what}  {f'FAILED: {step.error}' if step.error else f'{step.seconds:.1f} s'}")
