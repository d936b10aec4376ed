"""How many workers a model version should have: bounds and what was seen in, a number and its reason out. Nothing here
knows a server or a clock; marina/autoscale_loop.py is what looks and acts.

The rule is that of Kubernetes' HorizontalPodAutoscaler
(https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/, "Algorithm details", "Configurable scaling
behavior"), with utilisation and queue wait as its two metrics:

    wanted = ceil(workers x metric / target)        no change while metric / target is within 0.9 to 1.1
    of several metrics the largest number counts
    up       at once, at most to the double or by 4, whichever is more; the next time when those are loaded
    down     to the highest number wanted in the last `down_seconds`

What is not Kubernetes' rule: a queue that is on its way to be empty soon asks for nothing, because its wait says how many
workers there were too few before; and with `min = 0` a version without work for `idle_seconds` gets no workers at all,
until the next request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

TOLERANCE = 0.1
LEAST_STEP = 4
"""Workers that one step up may add, however few there are."""
CLEARING_SECONDS = 10.0
"""A queue that is empty within this time, at its present pace, needs no further workers."""
_ROUNDING = 1e-9
"""0.77 of 0.7 is within the tolerance, although 0.77 / 0.7 is 1.1000000000000003."""

Action = Literal["hold", "up", "down", "sleep", "wake"]
Limit = Literal["", "max", "memory"]


class Autoscale(BaseModel):
    """`[models.NAME.autoscale]` of deploy.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: Annotated[int, Field(ge=0, le=1000, strict=True)]
    """0: no workers, and no memory, without work; the next request waits until one is loaded."""
    max: Annotated[int, Field(ge=1, le=1000, strict=True)]
    utilisation: float = Field(default=0.7, gt=0, le=0.9)
    """Share of the time that workers should be busy."""
    queue_ms: float = Field(default=100.0, gt=0)
    """Milliseconds that a request should wait for a worker at most, on average."""
    down_seconds: float = Field(default=300.0, ge=0)
    """Workers are taken away when fewer were enough for so long. Kubernetes' default."""
    idle_seconds: float = Field(default=300.0, gt=0)
    """With `min = 0`: all of them go after so long without a request."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    @property
    def awake(self) -> int:
        """The fewest workers of a version that has any."""
        return max(self.min, 1)

    def allows(self, workers: int) -> bool:
        """Whether this number is within the bounds."""
        return self.min <= workers <= self.max

    def clamped(self, workers: int) -> int:
        """The nearest number within the bounds of a version that has workers."""
        return min(max(workers, self.awake), self.max)

    def kept_awake(self) -> Autoscale:
        """The same, without sleep: for a version that is kept for a rollback, or is being tried."""
        return self.model_copy(update={"min": self.awake})


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One model version at one moment."""

    at: float
    """Seconds of any steady clock."""
    workers: int
    """In the server's list."""
    ready: int
    """Of them, loaded."""
    utilisation: float | None = None
    """Mean share of the time that ready workers were busy lately, 0 to 1; None: not known."""
    wait: float | None = None
    """Seconds that requests wait for a worker, lately; None: not known."""
    clears_in: float = math.inf
    """Seconds until the queue is empty at its present pace; inf when it does not get shorter."""
    pending: int = 0
    """Requests of clients in the queue."""
    busy: bool = False
    """Whether there was anything to do since the observation before."""
    room: int | None = None
    """Further workers that there is memory for; None: not known, or not asked."""
    may_sleep: bool = True
    """Whether requests would be held meanwhile."""


@dataclass(frozen=True, slots=True)
class State:
    """What earlier observations have left."""

    wanted: tuple[tuple[float, int], ...] = ()
    """(when, workers), numbers falling: what can still be the highest of the window."""
    workers: int = -1
    """After the last decision; another number seen was set by somebody else."""
    busy_at: float = 0.0
    """When there was last anything to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What is to be done now."""

    workers: int
    action: Action
    reason: str
    """With the numbers that led to it."""
    limit: Limit = ""
    """What kept it from being more."""


def wanted(workers: int, metric: float, target: float) -> int:
    """Kubernetes' formula, with its tolerance."""
    ratio = metric / target
    if abs(ratio - 1.0) <= TOLERANCE + _ROUNDING:
        return workers
    return math.ceil(workers * ratio - _ROUNDING)


def decide(policy: Autoscale, state: State, seen: Observation) -> tuple[State, Decision]:
    """The next state and what is to be done.

    A decision that is not carried out is taken again at the next observation.
    """
    state = _caught_up(state, seen)
    if seen.workers == 0:
        decision = _asleep(policy, seen, seen.at - state.busy_at)
    elif seen.workers != policy.clamped(seen.workers):
        decision = _into_bounds(policy, seen)
    elif policy.min == 0 and seen.may_sleep and seen.at - state.busy_at >= policy.idle_seconds:
        decision = Decision(workers=0, action="sleep", reason=f"no request for {seen.at - state.busy_at:.0f} s")
    else:
        state, decision = _scaled(policy, state, seen)
    return replace(state, workers=decision.workers), decision


def queue_wait(queue: Sequence[tuple[float, int, int]]) -> float:
    """Seconds a request waits for a worker, from (when, requests waiting, requests accepted so far), oldest first.

    Little's law, L = lambda W (J. D. C. Little, Operations Research 9, 1961): mean number over rate of arrival.
    """
    (first, _, before), (last, _, after) = queue[0], queue[-1]
    waiting = sum(pending for _, pending, _ in queue) / len(queue)
    return waiting * (last - first) / max(1, after - before)


def clears_in(queue: Sequence[tuple[float, int, int]]) -> float:
    """Seconds until the queue is empty, at its pace since the middle of the window; inf when it does not get shorter."""
    (then, before, _), (now, pending, _) = queue[len(queue) // 2], queue[-1]
    if pending == 0:
        return 0.0
    return pending * (now - then) / (before - pending) if before > pending else math.inf


def _caught_up(state: State, seen: Observation) -> State:
    """What somebody else has set counts as wanted now, so that it lasts for the window at least."""
    if seen.workers != state.workers:
        state = State(((seen.at, seen.workers),), seen.workers, busy_at=seen.at)
    return replace(state, busy_at=seen.at) if seen.busy or seen.pending else state


def _asleep(policy: Autoscale, seen: Observation, idle: float) -> Decision:
    if policy.min == 0 and seen.pending == 0:
        return Decision(workers=0, action="hold", reason=f"asleep: no request for {idle:.0f} s")
    workers, limit = _with_room(0, policy.awake, seen.room)
    waiting = f"{seen.pending} request{'s' if seen.pending != 1 else ''} waiting"
    if seen.pending == 0:
        waiting = f"at least {policy.awake} for a version that does not sleep"
    if workers == 0:
        return Decision(workers=0, action="hold", reason=f"{waiting}, and no memory for a worker", limit=limit)
    return Decision(workers=workers, action="wake", reason=waiting, limit=limit)


def _into_bounds(policy: Autoscale, seen: Observation) -> Decision:
    target = policy.clamped(seen.workers)
    reason = f"{seen.workers} is not within {policy.min} to {policy.max}"
    if target < seen.workers:
        return Decision(workers=target, action="down", reason=reason)
    workers, limit = _with_room(seen.workers, target, seen.room)
    return Decision(workers=workers, action="up" if workers > seen.workers else "hold", reason=reason, limit=limit)


def _scaled(policy: Autoscale, state: State, seen: Observation) -> tuple[State, Decision]:
    asked, reason = _asked(policy, seen)
    if asked is None:
        return state, Decision(workers=seen.workers, action="hold", reason="not enough seen yet")
    step = max(2 * seen.workers, seen.workers + LEAST_STEP)
    limit: Limit = "max" if asked > policy.max else ""
    asked = policy.clamped(min(asked, step))
    state = replace(state, wanted=_window(state.wanted, seen.at - policy.down_seconds, (seen.at, asked)))
    stay = Decision(workers=seen.workers, action="hold", reason=reason, limit=limit)
    if asked > seen.workers:
        if seen.ready < seen.workers:
            loading = f"{reason}; {seen.workers - seen.ready} of {seen.workers} workers are not loaded yet"
            return state, replace(stay, reason=loading)
        workers, short = _with_room(seen.workers, asked, seen.room)
        action: Action = "up" if workers > seen.workers else "hold"
        return state, Decision(workers=workers, action=action, reason=reason, limit=short or limit)
    highest = state.wanted[0][1]
    if highest < seen.workers and seen.ready == seen.workers:
        reason = f"{reason}; at most {highest} wanted for {policy.down_seconds:.0f} s"
        return state, Decision(workers=highest, action="down", reason=reason)
    return state, stay


def _asked(policy: Autoscale, seen: Observation) -> tuple[int | None, str]:
    """The larger one of what both metrics want; None while neither is known. Only utilisation can show that there are
    too many workers."""
    if seen.utilisation is None and seen.wait is None:
        return None, ""
    asked, words = seen.workers, []
    if seen.utilisation is not None:
        asked = wanted(seen.workers, seen.utilisation, policy.utilisation)
        words.append(f"utilisation {seen.utilisation:.2f} of {policy.utilisation:.2f}")
    if seen.wait is not None:
        words.append(f"queue wait {seen.wait * 1e3:.0f} of {policy.queue_ms:.0f} ms")
        if seen.pending and seen.clears_in <= CLEARING_SECONDS:
            words.append(f"the queue is empty in {seen.clears_in:.0f} s")
            asked = max(asked, seen.workers)
        else:
            asked = max(asked, wanted(seen.workers, seen.wait * 1e3, policy.queue_ms))
    return asked, ", ".join(words)


def _with_room(workers: int, asked: int, room: int | None) -> tuple[int, Limit]:
    """As many of those asked for as there is memory for."""
    if room is None or workers + room >= asked:
        return asked, ""
    return workers + max(0, room), "memory"


def _window(
    before: tuple[tuple[float, int], ...], since: float, new: tuple[float, int]
) -> tuple[tuple[float, int], ...]:
    """The recommendations of the window that are higher than all later ones."""
    return (*((at, workers) for at, workers in before if at >= since and workers > new[1]), new)
