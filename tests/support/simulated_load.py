"""Workers, a queue and a clock without waiting: what `marina.autoscale` decides meets load in simulated time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from marina import autoscale
from marina.autoscale import Autoscale, Observation
from marina.autoscale_loop import LEAST_SECONDS, LOOK_SECONDS, WINDOW_SECONDS

STEP = 0.05
"""Seconds of one step: as often as the autoscaler samples."""


@dataclass
class Moment:
    """One look."""

    at: float
    workers: int
    wait: float
    """Seconds that a request that arrives now will wait."""


@dataclass
class Simulated:
    """One version: each worker answers one request after `service` seconds, a new one is ready after `loading`."""

    policy: Autoscale
    rate: Callable[[float], float]
    """Requests per second at a time."""
    workers: int = 1
    service: float = 0.1
    loading: float = 3.0
    room: int | None = None
    """Workers that there is memory for in all."""
    seed: int = 0
    moments: list[Moment] = field(default_factory=list)
    ready: int = 0
    now: float = 0.0
    queue: float = 0.0
    arrived: int = 0

    def run(self, seconds: float) -> list[Moment]:
        """Go on for so long; every look so far."""
        self.ready = self.ready or self.workers
        chance, state = random.Random(self.seed), autoscale.State()
        arrivals: deque[float] = deque()
        shares: deque[tuple[float, float]] = deque()
        seen: deque[tuple[float, int, int]] = deque()
        busy_until = [0.0] * self.ready
        coming: list[float] = []
        since, next_look = self.now, self.now
        next_arrival = self.now
        busy_now = False
        end = self.now + seconds
        while self.now < end:
            self.now += STEP
            while next_arrival <= self.now:
                rate = self.rate(next_arrival)
                if rate > 0:
                    arrivals.append(next_arrival)
                    self.arrived += 1
                next_arrival += chance.expovariate(rate) if rate > 0 else STEP
            loaded = [at for at in coming if at <= self.now]
            if loaded:
                coming = [at for at in coming if at > self.now]
                busy_until += loaded
                since = self.now
                shares.clear()
                seen.clear()
            busy_until.sort()
            for index, until in enumerate(busy_until):
                free = max(until, self.now - STEP)
                while arrivals and free <= self.now:
                    free = max(free, arrivals.popleft()) + self.service
                    busy_until[index] = free
            self.ready = len(busy_until)
            busy = sum(until > self.now for until in busy_until)
            busy_now = busy_now or busy > 0
            if self.ready:
                shares.append((self.now, busy / self.ready))
            if self.now < next_look:
                continue
            next_look = self.now + LOOK_SECONDS
            seen.append((self.now, len(arrivals), self.arrived))
            for window in (shares, seen):
                while window and window[0][0] < self.now - WINDOW_SECONDS:
                    window.popleft()
            listed = self.ready + len(coming)
            known = self.now - since >= LEAST_SECONDS and self.ready > 0
            state, decision = autoscale.decide(
                self.policy,
                state,
                Observation(
                    at=self.now, workers=listed, ready=self.ready,
                    utilisation=sum(share for _, share in shares) / len(shares) if known and shares else None,
                    wait=autoscale.queue_wait(seen) if known and len(seen) > 1 else None,
                    clears_in=autoscale.clears_in(seen), pending=len(arrivals), busy=busy_now,
                    room=None if self.room is None else self.room - listed,
                ),
            )  # fmt: skip
            busy_now = False
            if decision.workers > listed:
                coming += [self.now + self.loading] * (decision.workers - listed)
            elif decision.workers < listed:
                busy_until = busy_until[: decision.workers]
                since = self.now
                shares.clear()
                seen.clear()
            self.workers = decision.workers
            capacity = max(self.ready, 1) / self.service
            self.moments.append(Moment(self.now, decision.workers, len(arrivals) / capacity))
        return self.moments
