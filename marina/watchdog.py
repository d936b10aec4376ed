"""Recycles workers that cannot do their work any more, and says why.

TorchServe starts a dead worker again, but later and later (up to 1,597 s) and at last never; it lets one that hangs do so
for `responseTimeout`, keeps one whose GPU context is lost, and knows no limit of memory. Here each of these is seen within
a second or so and ended: TorchServe starts the process again after one second. Its own waiting is cut short by taking the
dead entry out of its list and adding a new one. For each worker every cause waits longer each time, so that nothing
loops tightly, and a fault that meets several workers ends all of them at once.

    died       the process ended by itself, or was ended by somebody else
    hung       one batch takes far longer than any before, and the process does nothing or its neighbours go on
    stopped    the process was stopped by a signal
    gpu        a CUDA error after which no call of that process can succeed
    memory     more resident memory than the limit; it finishes its batch first (`marina.parking`)
    waiting    TorchServe waits too long before it starts the worker again, or has given up
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil

from marina.client import NO_RETRIES, ManagementClient, ModelStatus, Timeout, WorkerStatus
from marina.errors import ClientError
from marina.logs import ServerLog
from marina.parking import Parking
from marina.quarantine import Quarantine, Record
from marina.settings import ServeSettings
from marina.watch import Expected, Watch

Cause = Literal["died", "hung", "stopped", "gpu", "memory", "waiting"]
Key = tuple[str, str]
"""(model, version)"""

_WHOLE_LIST = ""
"""In the place of one worker's id."""
LOOK_SECONDS = 0.5
_AFTER_END_SECONDS = 0.1
"""By which TorchServe has noticed the end of a worker too."""
GONE_SECONDS = 3.0
"""Without a process for longer, TorchServe waits with its next start, or has given up: its first waits are 1, 1 and 2 s."""
BACKOFF = (0.0, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0)
"""Seconds from one recycling of a worker to its next one for the same cause."""
CALM_SECONDS = 300.0
"""Without a recycling, the next one need not wait."""
_KNOWN_BATCHES = 20
"""Finished batches from which on the longest of them says what is normal."""
_TIMES_LONGEST = 10.0
_IDLE_SECONDS = 2.0
_IDLE_SHARE = 0.05
"""A process that uses less of a core than this while it is at a batch does nothing about it."""
_PARK_SECONDS = 4.0
_TRY_SECONDS = 5.0
"""From one worker of a version that is emptied, or is too busy for it, to the next: meanwhile all are looked at, and
a leak in all of them does not take all away at once."""
_OOM_FILES = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


class Guarded(Expected, Protocol):
    """A model version to watch."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Its model-config.yaml."""
        ...


@dataclass(slots=True)
class _Worker:
    """One entry of TorchServe's list."""

    pid: int = -1
    """The last process that was seen alive."""
    watched: int | None = None
    """pidfd of that process."""
    gone_since: float | None = None
    told: bool = True
    """Whether its end has been told."""
    ended_by_us: bool = False
    stopped: bool = False
    """Seen stopped by a signal at the last look."""
    base: int = 0
    """Resident bytes when it was first seen ready."""
    record: Record | None = None
    moved: float = 0.0
    """When it was last seen to have finished a batch."""
    seen: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """When the present batch began, when it was first seen, and the processor time used until then."""


@dataclass(slots=True)
class _Pace:
    """When one cause may be acted on again."""

    count: int = 0
    last: float = field(default=-CALM_SECONDS)

    def may(self, now: float) -> bool:
        if now - self.last >= CALM_SECONDS:
            self.count = 0
        return now - self.last >= BACKOFF[min(self.count, len(BACKOFF) - 1)]

    def took(self, now: float) -> None:
        self.count, self.last = self.count + 1, now


class Watchdog:
    """Watches the workers of one server, in a thread of its own."""

    def __init__(
        self,
        temp: Path,
        settings: ServeSettings,
        models: Callable[[], Sequence[Guarded]],
        watch: Watch,
        log: ServerLog,
        *,
        changing: threading.Lock | None = None,
    ) -> None:
        """Before java starts: workers look for the quarantine's folder in `temp`, which they share, when they start.
        `changing` is held by whoever changes the number of workers in this process."""
        self._changing = changing or threading.Lock()
        self._temp = temp
        self._quarantine = Quarantine(temp)
        self._url = settings.url("management")
        self._hang_seconds = settings.hang_seconds
        self._memory = settings.worker_memory_mb * 2**20
        self._models = models
        self._watch = watch
        self._log = log
        self._management = ManagementClient(self._url, timeout=Timeout(connect=1.0, read=5.0), retries=NO_RETRIES)
        self._workers: dict[tuple[str, str, str], _Worker] = {}
        self._paces: dict[tuple[Key, str, Cause], _Pace] = {}
        """By the worker's entry in TorchServe's list, which outlives its process; of the whole list: empty."""
        self._emptied_at: dict[Key, float] = {}
        """When a worker of it was emptied last, or could not be."""
        self._grown: set[Key] = set()
        """Versions whose list has an entry too many, because one in the middle of it is dead."""
        self._too_small: set[Key] = set()
        self._poll = select.poll()
        self._by_descriptor: dict[int, _Worker] = {}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._oom_kills = _oom_kills()
        self._words: dict[str, str] = {}
        self._unpublished = ""

    def start(self) -> None:
        """Keep watching until `stop`."""
        self._thread = threading.Thread(target=self._keep_looking, name="marina-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Nothing is recycled after this."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        for descriptor in self._by_descriptor:
            os.close(descriptor)
        self._by_descriptor.clear()
        self._management.close()
        self._quarantine.close()

    def look(self) -> None:
        """One round over all versions."""
        self._quarantine.tidy()
        for pid in self._quarantine.ended_unseen():
            self._blame(pid)
        for model in self._models():
            with contextlib.suppress(ClientError):
                status = self._management.describe(model.name, model.version)
                self._look_at(model, status)
        self._watch.refused = self._quarantine.refused
        self._tell_unpublished()
        if any(worker.gone_since is not None for worker in self._workers.values()):
            # The gateway learns of it at its next question, and asks another replica for what waits here.
            self._watch.look()

    # ---- the rounds

    def _keep_looking(self) -> None:
        next_look = 0.0
        while not self._stopped.is_set():
            try:
                if self._wait(max(0.0, next_look - time.monotonic())):
                    next_look = min(next_look, time.monotonic() + _AFTER_END_SECONDS)
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + LOOK_SECONDS
                    self.look()
            except Exception as error:  # noqa: BLE001 - a watchdog that has died watches nothing
                self._log.note(f"the watchdog stumbled: {type(error).__name__}: {error}", level="ERROR")
                self._stopped.wait(LOOK_SECONDS)

    def _wait(self, seconds: float) -> bool:
        """Until a process ends, or so long; whether one has. What it was at becomes known to the other workers at once."""
        ended = self._poll.poll(min(seconds, LOOK_SECONDS) * 1e3)
        for descriptor, _ in ended:
            self._ended(self._by_descriptor[descriptor])
        return bool(ended)

    def _look_at(self, model: Guarded, status: ModelStatus) -> None:
        key = (model.name, model.version)
        listed = {worker.id for worker in status.workers}
        for name, version, worker_id in [item for item in self._workers if item[:2] == key]:
            if worker_id not in listed:  # scaled down or retired: meant
                self._forget(self._workers.pop((name, version, worker_id)))
        for paced in [item for item in self._paces if item[0] == key and item[1] not in listed | {_WHOLE_LIST}]:
            self._paces.pop(paced)
        now = time.monotonic()
        for listed_worker in status.workers:
            self._look_at_worker(model, listed_worker, now)
        with contextlib.ExitStack() as held:
            if self._may_change(held):  # else at the next look
                self._restart_waiting(key, model, status, now)

    def _look_at_worker(self, model: Guarded, listed: WorkerStatus, now: float) -> None:
        key = (model.name, model.version)
        worker = self._workers.setdefault((*key, listed.id), _Worker())
        if listed.pid > 0 and listed.pid != worker.pid and psutil.pid_exists(listed.pid):
            if worker.watched is not None:
                self._ended(worker)
            self._tell_end(key, listed.id, worker)
            self._began(worker, listed.pid)
        self._tell_end(key, listed.id, worker)
        if worker.watched is None:
            if is_starting(self._temp, listed.id):
                worker.gone_since = None
            else:
                worker.gone_since = worker.gone_since or now
            return
        cause = self._reason(model, listed, worker, now)
        if cause is not None and self._may(key, listed.id, cause[0], now):
            self._recycle(key, listed.id, worker, *cause)

    def _reason(self, model: Guarded, listed: WorkerStatus, worker: _Worker, now: float) -> tuple[Cause, str] | None:
        """Why this living worker is to be recycled, in a word and in words; None when it is not."""
        try:
            process = psutil.Process(worker.pid)
            stopped_before, worker.stopped = worker.stopped, process.status() == psutil.STATUS_STOPPED
            resident = process.memory_info().rss if self._memory and listed.ready else 0
            times = process.cpu_times()
        except psutil.Error:
            return None  # just ended: the next look tells
        if worker.stopped and stopped_before:
            return "stopped", "the process was stopped by a signal (SIGSTOP)"
        before, worker.record = worker.record, self._quarantine.record(worker.pid)
        record = worker.record
        if before is not None and record is not None and record.done != before.done:
            worker.moved = now
        if record is not None and record.broken:
            return "gpu", record.broken
        if record is not None and record.began is not None:
            if worker.seen[0] != record.began:
                worker.seen = (record.began, now, times.user + times.system)
            idle_for, used = now - worker.seen[1], times.user + times.system - worker.seen[2]
            idle = idle_for >= _IDLE_SECONDS and used < _IDLE_SHARE * idle_for
            age = now - record.began
            if age > self._longest_batch(model, record, others=idle or self._others_move(model, worker)):
                inputs = f"{len(record.marks)} input{'s' if len(record.marks) != 1 else ''}"
                longest = f"the longest batch before took {record.longest:.2f} s"
                return "hung", f"no answer for {age:.1f} s to {inputs}; {longest}"
        worker.base = worker.base or resident
        if worker.base > self._memory > 0:
            self._tell_too_small((model.name, model.version), worker.base)
        elif self._memory and resident > self._memory:
            return "memory", f"{resident / 2**20:.0f} MB resident, the limit is {self._memory / 2**20:.0f} MB"
        return None

    def _tell_too_small(self, key: Key, base: int) -> None:
        """Once per version: a worker that needs more than the limit from the start would only be started for ever."""
        if key not in self._too_small:
            self._too_small.add(key)
            self._log.note(
                f"the memory limit of {self._memory / 2**20:.0f} MB is not kept for {key[0]} {key[1]}: "
                f"a worker that has just loaded takes {base / 2**20:.0f} MB",
                level="WARN",
            )

    def _others_move(self, model: Guarded, still: _Worker) -> bool:
        """Whether another worker of this version has finished batches since this one's was first seen: then it is not the
        whole machine that is slow."""
        return any(
            worker is not still and worker.moved > still.seen[1]
            for (name, version, _), worker in self._workers.items()
            if (name, version) == (model.name, model.version)
        )

    def _longest_batch(self, model: Guarded, record: Record, *, others: bool) -> float:
        """Seconds after which a batch hangs: the version's own timeout, or less once enough is known of its batches and it
        is this worker alone that does not go on."""
        timeout = float(model.config.get("responseTimeout", 60))
        if record.done < _KNOWN_BATCHES or not others:
            return timeout
        return min(timeout, max(self._hang_seconds, _TIMES_LONGEST * record.longest))

    # ---- ends

    def _began(self, worker: _Worker, pid: int) -> None:
        self._forget(worker)
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(pid)
            self._poll.register(descriptor, select.POLLIN)
            self._by_descriptor[descriptor] = worker
            worker.pid, worker.watched, worker.gone_since = pid, descriptor, None
            worker.told, worker.ended_by_us, worker.stopped, worker.base, worker.record = True, False, False, 0, None

    def _ended(self, worker: _Worker) -> None:
        worker.gone_since, worker.told = time.monotonic(), worker.ended_by_us
        self._forget(worker)
        self._blame(worker.pid)

    def _blame(self, pid: int) -> None:
        blame = self._quarantine.ended(pid)
        if blame.refused:
            self._log.note(
                f"an input has ended a second worker and is refused with 422 from now on: sha256 {blame.refused}",
                level="WARN",
            )

    def _tell_unpublished(self) -> None:
        """Once, until the lists are written again."""
        before, self._unpublished = self._unpublished, self._quarantine.unpublished
        if self._unpublished and not before:
            self._log.note(
                f"workers do not hear of inputs that ended others, until this is mended: {self._unpublished}",
                level="ERROR",
            )

    def _forget(self, worker: _Worker) -> None:
        if worker.watched is not None:
            self._poll.unregister(worker.watched)
            self._by_descriptor.pop(worker.watched)
            os.close(worker.watched)
            worker.watched = None

    def _tell_end(self, key: Key, worker_id: str, worker: _Worker) -> None:
        """It is still listed, so nobody took it away on purpose."""
        if worker.told:
            return
        worker.told = True
        self._tell(key, worker_id, worker.pid, "died", self._why_died(key))

    def _why_died(self, key: Key) -> str:
        kills = _oom_kills()
        before, self._oom_kills = self._oom_kills, kills
        if kills > before:
            return "the kernel ended it for want of memory"
        label = f"{key[0]}_{key[1]}"
        words = next((item.cause for item in self._log.failures() if item.label == label), "")
        if words and words != self._words.get(label):
            self._words[label] = words
            return words
        return "ended from outside, or crashed in native code: it left no word"

    # ---- recycling

    def _may(self, key: Key, worker_id: str, cause: Cause, now: float) -> bool:
        return self._paces.setdefault((key, worker_id, cause), _Pace()).may(now)

    def _tell(self, key: Key, worker_id: str, pid: int, cause: Cause, why: str) -> None:
        self._log.note(f"worker {worker_id} (pid {pid}) of {key[0]} {key[1]} is recycled: {cause}: {why}", level="WARN")
        self._watch.recycled(*key, cause)

    def _recycle(self, key: Key, worker_id: str, worker: _Worker, cause: Cause, why: str) -> None:
        """End the process; TorchServe starts it again after a second."""
        with contextlib.ExitStack() as held:
            if cause == "memory" and not self._emptied(held, key, worker.pid):
                return  # at the next look: it works, only too large
            self._paces[key, worker_id, cause].took(time.monotonic())
            self._tell(key, worker_id, worker.pid, cause, why)
            worker.ended_by_us = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            ends = time.monotonic() + 2 * LOOK_SECONDS
            while worker.watched is not None and time.monotonic() < ends:
                self._wait(LOOK_SECONDS)  # before the parking lets go

    def _may_change(self, held: contextlib.ExitStack) -> bool:
        """Whether nobody else in this process changes workers; until `held` is left."""
        if not self._changing.acquire(blocking=False):
            return False
        held.callback(self._changing.release)
        return True

    def _emptied(self, held: contextlib.ExitStack, key: Key, pid: int) -> bool:
        """Whether the worker has nothing in hand until `held` is left; one that cannot be parked may be ended as it is."""
        if self._tried_lately(key) or not self._may_change(held):
            return False
        parking = held.enter_context(Parking(self._url, *key))
        try:
            if parking.supported(within=_PARK_SECONDS):
                parking.park([pid], within=_PARK_SECONDS)
        except ClientError:
            return False
        finally:
            self._emptied_at[key] = time.monotonic()
        return True

    def _tried_lately(self, key: Key) -> bool:
        return time.monotonic() - self._emptied_at.get(key, -_TRY_SECONDS) < _TRY_SECONDS

    def _restart_waiting(self, key: Key, model: Guarded, status: ModelStatus, now: float) -> None:
        """Workers without a process for longer than TorchServe's first waits get a new entry in its list."""
        gone = [self._is_gone(key, worker.id, now) for worker in status.workers]
        count, waiting = len(gone), sum(gone)
        if key in self._grown and waiting == 0:
            if status.ready_workers > model.workers:
                self._remove_surplus(key, model, status)
            elif count <= model.workers:
                self._grown.discard(key)
            return
        missing = model.workers - (count - waiting)
        if not waiting or missing <= 0 or not self._may(key, _WHOLE_LIST, "waiting", now):
            return
        self._paces[key, _WHOLE_LIST, "waiting"].took(now)
        for worker, is_gone in zip(status.workers, gone, strict=True):
            if is_gone:
                self._tell(
                    key, worker.id, self._workers[*key, worker.id].pid, "waiting",
                    "TorchServe waits before it starts this one again, or has given up",
                )  # fmt: skip
        # TorchServe takes workers away from the end of its list. What is gone there has nothing to lose.
        at_end = 0
        while at_end < count and gone[count - 1 - at_end]:
            at_end += 1
        if at_end:
            self._management.scale(key[0], count - at_end, key[1], wait=False)
        if waiting > at_end:
            self._grown.add(key)
        self._management.scale(key[0], count - at_end + missing, key[1], wait=False)

    def _is_gone(self, key: Key, worker_id: str, now: float) -> bool:
        worker = self._workers[*key, worker_id]
        return worker.gone_since is not None and now - worker.gone_since > GONE_SECONDS

    def _remove_surplus(self, key: Key, model: Guarded, status: ModelStatus) -> None:
        """An entry that was replaced came back by itself: there is one worker too many, and it goes when it is idle."""
        if self._tried_lately(key):
            return
        surplus = [worker.pid for worker in status.workers[model.workers :]]
        try:
            with Parking(self._url, *key) as parking:
                if parking.supported(within=_PARK_SECONDS):
                    parking.park(surplus, within=_PARK_SECONDS)
                    self._management.scale(key[0], model.workers, key[1], wait=False)
        except ClientError:
            self._emptied_at[key] = time.monotonic()


def is_starting(temp: Path, worker_id: str) -> bool:
    """Whether a process runs for this entry that TorchServe does not know the number of yet.

    By the whole path of its socket in the server's own temp folder: every server of a machine has a worker 9000, and the
    host sees those of its containers.
    """
    socket = str(temp / f".ts.sock.{worker_id}")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if socket in process.cmdline():
                return process.status() != psutil.STATUS_ZOMBIE
    return False


def _oom_kills() -> int:
    """Processes that the kernel has ended for want of memory: in this container where that can be seen, else anywhere."""
    for path in _OOM_FILES:
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0
