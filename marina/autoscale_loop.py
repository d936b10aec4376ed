"""The supervisor's autoscaler: looks at every model version that has bounds, asks marina/autoscale.py for a number of
workers, and sets it.

What it goes by: how busy workers are comes from the records that each keeps in shared memory (marina/quarantine.py), read
20 times a second; how long requests wait from the length of the queue and the rate at which they arrive (Little's law,
L = lambda W, J. D. C. Little, Operations Research 9, 1961). So it needs nothing from the workers' side, and costs a file's
first bytes per worker.

What it keeps to: no worker ends with work in hand (`marina.parking`); none is added that there is no memory for
(marina/autoscale_memory.py); nothing is changed while a rollout or the watchdog changes something; while workers are added
the server stays ready. A version that sleeps holds its requests in TorchServe's queue
(`marina.frontend_patch.HOLDING`), where the first one is seen within a tenth of a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import requests

from marina import autoscale, autoscale_memory
from marina.autoscale import Autoscale, Decision, Observation
from marina.autoscale_memory import Cost
from marina.client import NO_RETRIES, ManagementClient, ModelStatus, Timeout
from marina.errors import ClientError, TimedOut
from marina.logs import ServerLog
from marina.parking import Parking
from marina.processes import end_left_over
from marina.quarantine import FOLDER, PROGRESS
from marina.settings import ServeSettings
from marina.watch import Expected, Scaling, accepted_by_version

Key = tuple[str, str]
"""(model, version)"""

SAMPLE_SECONDS = 0.05
LOOK_SECONDS = 0.5
ASLEEP_SECONDS = 0.1
"""Between two looks while a version sleeps: its next request waits so long at most before a worker is started."""
WINDOW_SECONDS = 5.0
"""What a decision goes by."""
LEAST_SECONDS = 2.0
"""Seen since the number of workers changed, before the next decision."""
WAKE_SECONDS = 120.0
"""Without a ready worker for so long after it was woken, the server is not ready."""
PARK_SECONDS = 2.0
"""For workers to come free before they are taken away; else at another time."""
COST_SECONDS = 30.0
"""Between two measurements of what a worker takes: reading it stops the worker for some milliseconds."""
_REFUSED_SECONDS = 5.0
"""After one that failed, until the same is tried again."""


class Scaled(Expected, Protocol):
    """A model version to scale."""

    @property
    def default(self) -> bool: ...
    @property
    def autoscale(self) -> Autoscale | None: ...


@dataclass(slots=True)
class _Version:
    """What is known of one version."""

    policy: Autoscale
    state: autoscale.State = field(default_factory=autoscale.State)
    target: int = 0
    """Workers that it is meant to have now; the watchdog sees to them."""
    status: ModelStatus | None = None
    asleep: Parking | None = None
    """Holds what the workers held when they were taken away: requests of ours that wait in the queue since then."""
    woken_at: float | None = None
    """While no worker is ready yet."""
    since: float = 0.0
    """When the number of ready workers last changed."""
    shares: deque[tuple[float, float]] = field(default_factory=deque)
    """(when, share of the ready workers that were busy)"""
    queue: deque[tuple[float, int, int]] = field(default_factory=deque)
    """(when, requests waiting, requests accepted so far)"""
    done: dict[int, int] = field(default_factory=dict)
    """Process id -> batches finished."""
    busy: bool = False
    """Seen at work since the last look."""
    cost: Cost | None = None
    cost_at: float = 0.0
    reason: str = "nothing decided yet"
    limit: str = ""
    seen: Observation | None = None
    told: bool = False
    """Whether the present want of memory has been logged."""
    next_try: float = 0.0
    changes: Counter[str] = field(default_factory=Counter)


class Autoscaler:
    """Scales the versions of one server, in a thread of its own."""

    def __init__(
        self,
        temp: Path,
        settings: ServeSettings,
        models: Callable[[], Sequence[Scaled]],
        log: ServerLog,
        *,
        may_sleep: bool,
        changing: threading.Lock,
        alone: Callable[[], AbstractContextManager[bool]],
    ) -> None:
        """`may_sleep`: TorchServe is patched to hold requests; `changing` is held by whoever changes workers in this
        process; `alone` keeps rollouts away for a moment, and says False when one is at work."""
        self._records = temp / FOLDER
        self._url = settings.url("management")
        self._metrics_url = settings.url("metrics")
        self._budget = settings.autoscale_memory_mb * 2**20
        self._models = models
        self._log = log
        self._may_sleep = may_sleep
        self._changing = changing
        self._alone = alone
        self._management = ManagementClient(self._url, timeout=Timeout(connect=1.0, read=5.0), retries=NO_RETRIES)
        self._versions: dict[Key, _Version] = {}
        self._cannot_park: set[Key] = set()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Keep scaling until `stop`."""
        self._thread = threading.Thread(target=self._keep_looking, name="marina-autoscale", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Nothing is changed after this."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        for version in list(self._versions.values()):
            if version.asleep is not None:
                version.asleep.__exit__()
        self._management.close()

    def numbers(self) -> dict[Key, tuple[int, int]]:
        """Of each version that has been looked at: the workers that it is meant to have now, and how many of them must be
        ready for the server to be."""
        looked_at = [(key, known) for key, known in list(self._versions.items()) if known.status is not None]
        return {key: (known.target, _required(known)) for key, known in looked_at}

    def own_requests(self) -> int:
        """Requests in TorchServe's queues that no client waits for: see `_Version.asleep`."""
        return sum(known.asleep.unanswered() for known in list(self._versions.values()) if known.asleep is not None)

    def scaling(self) -> list[Scaling]:
        """How each version stands."""
        return [
            Scaling(
                name=name,
                version=version,
                min=known.policy.min,
                max=known.policy.max,
                wanted=known.target,
                reason=known.reason,
                utilisation=known.seen.utilisation if known.seen is not None else None,
                wait=known.seen.wait if known.seen is not None else None,
                limit=known.limit,
                host_bytes=known.cost.host if known.cost is not None else 0,
                gpu_bytes=known.cost.gpu if known.cost is not None else 0,
                changes=tuple(known.changes.items()),
            )
            for (name, version), known in list(self._versions.items())
        ]

    # ---- the rounds

    def _keep_looking(self) -> None:
        next_look = 0.0
        while not self._stopped.wait(SAMPLE_SECONDS if self._versions else LOOK_SECONDS):
            try:
                now = time.monotonic()
                self._sample(now)
                if now >= next_look:
                    self.look(now)
                    asleep = any(version.asleep is not None for version in self._versions.values())
                    next_look = now + (ASLEEP_SECONDS if asleep else LOOK_SECONDS)
            except Exception as error:  # noqa: BLE001 - without it nothing would wake a sleeping model
                self._log.note(f"the autoscaler stumbled: {type(error).__name__}: {error}", level="ERROR")
                next_look = time.monotonic() + LOOK_SECONDS

    def look(self, now: float) -> None:
        """One round over all versions that have bounds."""
        models = {(item.name, item.version): item for item in self._models() if item.autoscale is not None}
        for key in [key for key in self._versions if key not in models]:
            self._forget(key)
        accepted: dict[tuple[str, str], int] | None = None
        for key, model in models.items():
            assert model.autoscale is not None
            policy = model.autoscale if model.default else model.autoscale.kept_awake()
            if key not in self._versions and policy.min == 0 and not self._may_sleep:
                self._log.note(
                    f"autoscale: {key[0]} {key[1]} keeps a worker: TorchServe is not patched to hold requests",
                    level="WARN",
                )
            known = self._versions.setdefault(key, _Version(policy))
            known.policy = policy
            with contextlib.suppress(ClientError):
                status = self._management.describe(*key)
                if accepted is None and status.workers:
                    accepted = self._accepted()
                self._look_at(key, known, model, status, accepted or {}, now)

    def _look_at(
        self,
        key: Key,
        known: _Version,
        model: Scaled,
        status: ModelStatus,
        accepted: dict[tuple[str, str], int],
        now: float,
    ) -> None:
        self._take_over(known, status, now)
        names = (key, (key[0], "default")) if model.default else (key,)
        pending = max(0, status.pending - (known.asleep.unanswered() if known.asleep is not None else 0))
        known.queue.append((now, pending, sum(accepted.get(name, 0) for name in names)))
        seen = self._observed(key, known, status, pending, now)
        known.seen = seen
        if known.cost is None:  # while there is a worker to measure: one that sleeps shows nothing
            self._measure(known, status, now)
        if now < known.next_try:
            return
        memory = ""
        _, decision = autoscale.decide(known.policy, known.state, seen)
        if decision.action in ("up", "wake"):
            room, memory = self._room(known, now)
            seen = dataclasses.replace(seen, room=room)
        state, decision = autoscale.decide(known.policy, known.state, seen)
        known.reason, known.limit = decision.reason, decision.limit
        self._tell_limit(key, known, decision, memory)
        if decision.action == "hold":
            known.state = state
        elif self._changed(key, known, status, decision):
            known.state = state
            known.changes[decision.action] += 1
        else:
            known.next_try = now + (0.0 if status.asleep else _REFUSED_SECONDS)

    def _take_over(self, known: _Version, status: ModelStatus, now: float) -> None:
        """What the server has; a number that somebody else has set is meant."""
        before = known.status
        known.status = status
        if before is None or before.ready_workers != status.ready_workers:
            known.since = now
            known.shares.clear()
            known.queue.clear()
        settled = status.ready_workers == len(status.workers)
        if before is None or (settled and len(before.workers) == len(status.workers) != known.target):
            known.target = len(status.workers)
        if status.ready_workers:
            known.woken_at = None
        if status.workers and known.asleep is not None:  # woken by somebody else: a rollout
            known.asleep.__exit__()
            known.asleep = None

    # ---- looking

    def _sample(self, now: float) -> None:
        for known in self._versions.values():
            if known.status is None or not known.status.workers:
                continue
            found = [self._record(worker.pid) for worker in known.status.workers if worker.ready]
            records = {record[0]: record[1:] for record in found if record is not None}
            if not records:
                continue
            busy = sum(began > 0 for began, _ in records.values())
            done = {pid: count for pid, (_, count) in records.items()}
            known.busy = known.busy or busy > 0 or done != {pid: known.done.get(pid) for pid in done}
            known.done = done
            known.shares.append((now, busy / len(found)))
            while known.shares[0][0] < now - WINDOW_SECONDS:
                known.shares.popleft()

    def _record(self, pid: int) -> tuple[int, int, int] | None:
        """(process id, when its batch began or 0, batches done); None when it keeps no record."""
        with contextlib.suppress(OSError, struct.error):
            with (self._records / f"worker-{pid}").open("rb") as stream:
                began, _, _, done = PROGRESS.unpack(stream.read(PROGRESS.size))
            return pid, began, done
        return None

    def _observed(self, key: Key, known: _Version, status: ModelStatus, pending: int, now: float) -> Observation:
        while known.queue[0][0] < now - WINDOW_SECONDS:
            known.queue.popleft()
        busy, known.busy = known.busy, False
        long_enough = now - known.since >= LEAST_SECONDS
        utilisation = wait = None
        if long_enough and known.shares:
            utilisation = sum(share for _, share in known.shares) / len(known.shares)
        if long_enough and len(known.queue) > 1 and status.ready_workers:
            wait = autoscale.queue_wait(known.queue)
        return Observation(
            at=now,
            workers=len(status.workers),
            ready=status.ready_workers,
            utilisation=utilisation,
            wait=wait,
            clears_in=autoscale.clears_in(known.queue),
            pending=pending,
            busy=busy,
            may_sleep=self._may_sleep and key not in self._cannot_park,
        )

    def _accepted(self) -> dict[tuple[str, str], int]:
        try:
            return accepted_by_version(self._metrics_url)
        except (requests.RequestException, ValueError):
            return {}

    # ---- memory

    def _room(self, known: _Version, now: float) -> tuple[int | None, str]:
        """Further workers of this version that there is memory for, None while nothing is known of one; and the figures
        in words."""
        statuses: dict[Key, ModelStatus] = {}
        for model in self._models():
            with contextlib.suppress(ClientError):
                statuses[model.name, model.version] = self._management.describe(model.name, model.version)
        workers = [worker for status in statuses.values() for worker in status.workers if worker.ready]
        for other, version in self._versions.items():
            if other in statuses:
                self._measure(version, statuses[other], now)
        if known.cost is None:
            return None, ""
        under_way = [
            (len(statuses[other].workers) - statuses[other].ready_workers, version.cost)
            for other, version in self._versions.items()
            if other in statuses and version.cost is not None
        ]
        loading = Cost(
            host=sum(count * cost.host for count, cost in under_way),
            gpu=sum(count * cost.gpu for count, cost in under_way),
        )
        free = autoscale_memory.free(
            budget=self._budget, workers=[worker.pid for worker in workers], on_gpu=known.cost.gpu > 0
        )
        words = f"a worker takes {known.cost}; {free}"
        if loading != autoscale_memory.NOTHING:
            words += f", {loading} of it for workers that load"
        return free.room(known.cost, loading=loading), words

    def _measure(self, version: _Version, status: ModelStatus, now: float) -> None:
        if version.cost is not None and now - version.cost_at < COST_SECONDS:
            return
        ready = [worker for worker in status.workers if worker.ready]
        if not ready:
            return
        gpu_workers = self._gpu_workers() if any(worker.gpu for worker in ready) else 0
        found = autoscale_memory.cost([worker.pid for worker in ready], gpu_workers=gpu_workers)
        if found is not None:
            version.cost, version.cost_at = found, now

    def _gpu_workers(self) -> int:
        """Ready ones of all versions."""
        found = 0
        for model in self._models():
            with contextlib.suppress(ClientError):
                workers = self._management.describe(model.name, model.version).workers
                found += sum(worker.ready and worker.gpu for worker in workers)
        return found

    def _tell_limit(self, key: Key, known: _Version, decision: Decision, memory: str) -> None:
        """Once, until it is over."""
        if decision.limit != "memory":
            known.told = False
            return
        known.reason = f"{decision.reason}; no memory for more: {memory}"
        if not known.told:
            known.told = True
            known.changes["refused"] += 1
            self._log.note(
                f"autoscale: {key[0]} {key[1]}: no more than {decision.workers} workers: {known.reason}", level="WARN"
            )

    # ---- acting

    def _changed(self, key: Key, known: _Version, status: ModelStatus, decision: Decision) -> bool:
        """Carry a decision out; False when that was not possible now."""
        with contextlib.ExitStack() as held:
            if not self._changing.acquire(timeout=0.0 if decision.action != "wake" else 5.0):
                return False
            held.callback(self._changing.release)
            # What sleeps is woken whatever a rollout does: its requests wait.
            if not held.enter_context(self._alone()) and not status.asleep:
                return False
            try:
                done = self._carry_out(key, known, status, decision)
            except ClientError as error:
                self._log.note(f"autoscale: {key[0]} {key[1]}: {decision.action} failed: {error}", level="WARN")
                return False
        if done:
            self._log.note(
                f"autoscale: {key[0]} {key[1]}: {decision.action}: {len(status.workers)} -> {decision.workers} workers: "
                f"{decision.reason}",
                level="WARN",
            )
        return done

    def _carry_out(self, key: Key, known: _Version, status: ModelStatus, decision: Decision) -> bool:
        if decision.action in ("up", "wake"):
            known.target = decision.workers
            if decision.action == "wake":
                known.woken_at = time.monotonic()
            if known.asleep is not None:
                known.asleep.__exit__()
                known.asleep = None
            self._management.grow(key[0], decision.workers, key[1])
            return True
        return self._shrunk(key, known, decision.workers)

    def _shrunk(self, key: Key, known: _Version, workers: int) -> bool:
        """Take workers away once they have nothing in hand."""
        status = self._management.describe(*key)
        surplus = [worker.pid for worker in status.workers[workers:]]
        if not workers:
            self._measure(known, status, time.monotonic())
        with contextlib.ExitStack() as held:
            parking = held.enter_context(Parking(self._url, *key))
            try:
                if not parking.supported(within=PARK_SECONDS):
                    self._tell_kept(key)
                    return False
                parking.park(surplus, within=PARK_SECONDS)
            except TimedOut:
                return False
            before, known.target = known.target, workers
            try:
                if workers:
                    self._management.scale(key[0], workers, key[1], wait=False)
                elif self._management.describe(*key).pending:
                    known.target = before
                    return False
                else:
                    self._management.sleep(*key)
                    known.asleep = parking
                    held.pop_all()
            except ClientError:
                known.target = before
                raise
            end_left_over(surplus)
        return True

    def _tell_kept(self, key: Key) -> None:
        """Once."""
        if key not in self._cannot_park:
            self._cannot_park.add(key)
            self._log.note(
                f"autoscale: {key[0]} {key[1]} is never scaled down: its handler cannot say when it is idle",
                level="WARN",
            )

    def _forget(self, key: Key) -> None:
        known = self._versions.pop(key)
        if known.asleep is not None:
            known.asleep.__exit__()


def _required(known: _Version) -> int:
    """Workers without which the server is not ready: those of the lower bound, and none while the first one is on its way
    after sleep."""
    waking = known.woken_at is not None and time.monotonic() - known.woken_at < WAKE_SECONDS
    return 0 if waking else min(known.policy.awake, known.target)
