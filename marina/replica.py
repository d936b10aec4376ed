"""One TorchServe as a rollout sees it: bring a version up, prove it, switch to it, and take one away without losing work.

TorchServe kills where it should drain: a worker that is scaled away or unregistered is killed with what it is doing, and
what waits in the queue of an unregistered version is never answered. So everything here first makes sure that there is
nothing to lose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil
import requests

from marina import shadow
from marina import store as model_store
from marina.client import InferenceClient, ManagementClient, ModelStatus, WorkerStatus
from marina.errors import ArchiveError, ClientError, Refused, TimedOut
from marina.golden import inputs as golden_inputs
from marina.golden import prove
from marina.parking import RUN_THERE, Parking, folder_of
from marina.processes import end_left_over
from marina.server import ServedModel
from marina.serving import NotServed
from marina.shadow import Shadow

DRAIN_SECONDS = 120.0
"""How long requests already accepted may take before a version is taken away from under them."""
_RETIRE_TRIES = 3
_IDLE_LOOKS = 3
_LOOK_SECONDS = 0.1
_LIVE_INPUTS = 32
_KEPT_SECONDS = 5.0
"""How long a version that stays loaded is waited for; whoever asks for it by its number is answered all the same."""
_RESTART_SECONDS = 6.0
"""How long a dead worker may take to be started again by TorchServe before a change of their number goes another way."""
_NOTICE_SECONDS = 2.0
"""By when TorchServe has noticed the end of a worker's process."""
_CAUSE_SECONDS = 3.0
"""A dead worker's last words arrive after TorchServe's answer."""


class Replica(Protocol):
    """What a rollout asks of one server. Every method returns when it is done and may be called again."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def status(self) -> tuple[ModelStatus, ...]:
        """Every version of every model."""
        ...

    def register(self, key: str, workers: int) -> None:
        """Load `NAME:VERSION` of the store, if it is not loaded, and wait until exactly so many workers are READY."""
        ...

    def prove(self, key: str) -> None:
        """Have it answer its golden samples over HTTP."""
        ...

    def set_default(self, key: str) -> None:
        """Send requests without a version to it."""
        ...

    def scale(self, key: str, workers: int) -> None:
        """Set the number of workers and wait until exactly so many are READY; no request is lost on the way down."""
        ...

    def shadow(self, name: str, old: str, new: str, recorded: Sequence[bytes], sample_seconds: float) -> Shadow:
        """Send the same inputs to two versions: golden, recorded, and live ones of the old version."""
        ...

    def drained(self, key: str) -> bool:
        """Wait until nothing waits in its queue; whether that came about."""
        ...

    def retire(self, key: str) -> None:
        """Unregister it once it has nothing left to do."""
        ...

    def drain(self) -> None:
        """Have the whole server answer what it has accepted, and stop."""
        ...


class LocalReplica:
    """A server of this machine, by its addresses; inside a container, the container's own."""

    def __init__(
        self, *, store: Path, inference_url: str, management_url: str, supervisor_url: str, name: str = "local"
    ) -> None:
        self.name = name
        self._store = store
        self._inference_url = inference_url
        self._management_url = management_url
        self._supervisor_url = supervisor_url
        self._management = ManagementClient(management_url)

    def status(self) -> tuple[ModelStatus, ...]:
        found = self._management.status()
        scaling = {(item["name"], item["version"]): item for item in self._scaling()}
        return tuple(
            dataclasses.replace(item, autoscale=scaling.get((item.name, item.version))) if scaling else item
            for item in found
        )

    def _scaling(self) -> list[dict[str, Any]]:
        """Of the versions that the supervisor scales by itself; none without a supervisor."""
        try:
            answer = requests.get(f"{self._supervisor_url}/autoscale", timeout=3)
            return list(answer.json()) if answer.status_code == 200 else []
        except (requests.RequestException, ValueError):
            return []

    def register(self, key: str, workers: int) -> None:
        model = self._model(key)
        found = self._find(key)
        if found is None:
            self._load(model, workers)
        self.scale(key, workers)

    def prove(self, key: str) -> None:
        with InferenceClient(self._inference_url) as client:
            prove(self._model(key), client)

    def set_default(self, key: str) -> None:
        self._management.set_default(*_split(key))

    def scale(self, key: str, workers: int) -> None:
        found = self._require(key)
        ends = time.monotonic() + _RESTART_SECONDS
        while _dead_in_front(found):
            if time.monotonic() > ends:
                self._begin_anew(found, workers)
                return
            time.sleep(_LOOK_SECONDS)
            found = self._require(key)
        surplus = found.workers[workers:]  # TorchServe ends the newest first
        with self._parking(found) as parking:
            if surplus:
                self._settle(found, surplus, parking)
            self._scale_list(found, workers)

    def _begin_anew(self, found: ModelStatus, workers: int) -> None:
        """Rid TorchServe's list of an entry that has no process any more: it only takes entries away from the end, so all
        of them go, each with nothing in hand, and as many as wanted come. What waits in the queue stays there."""
        with self._parking(found) as parking:
            self._settle(found, [worker for worker in found.workers if worker.ready], parking)
            self._scale_list(found, 0)
        self._scale_list(found, workers)

    def _scale_list(self, found: ModelStatus, workers: int) -> None:
        """Set the length of TorchServe's list. What goes must have nothing in hand."""
        ours = [worker.pid for worker in found.workers if folder_of(worker) is not None]
        self._management.scale(found.name, workers, found.version)
        listed = {worker.pid for worker in self._require(f"{found.name}:{found.version}").workers}
        end_left_over([pid for pid in ours if pid not in listed])

    def shadow(self, name: str, old: str, new: str, recorded: Sequence[bytes], sample_seconds: float) -> Shadow:
        golden = golden_inputs([self._model(f"{name}:{version}").archive_file for version in (old, new)])
        workers = self._require(f"{name}:{old}").workers
        temp = next((found for worker in workers if (found := folder_of(worker)) is not None), None)
        live: list[bytes] = []
        if temp is not None and sample_seconds > 0:
            live = shadow.sample(temp, name, old, inputs=_LIVE_INPUTS, seconds=sample_seconds)
        return shadow.compare(self._inference_url, name, old, new, golden=golden, recorded=recorded, live=live)

    def drained(self, key: str) -> bool:
        deadline = time.monotonic() + _KEPT_SECONDS
        while self._require(key).pending:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def retire(self, key: str) -> None:
        try:
            self._retire(key)
        except ClientError:
            # TorchServe itself takes away a version whose workers end while it loads.
            if self._find(key) is not None:
                raise

    def _retire(self, key: str) -> None:
        name, version = _split(key)
        found = self._find(key)
        if found is None:
            return
        if found.asleep:  # it may hold requests by now
            self._management.scale(name, 1, version)
            found = self._require(key)
        workers = len(found.workers)
        for _ in range(_RETIRE_TRIES):
            if not found.workers or self._end_all_workers(found):
                self._management.unregister(name, version)
                return
            found = self._require(key)
        self._scale_list(found, workers)
        raise TimedOut(
            f"{name} {version} is still asked for by its number, and serves on",
            remedy=f"let those clients ask without a version, then: marina retire {key}",
        )

    def _end_all_workers(self, found: ModelStatus) -> bool:
        """Whether all are ended and nothing waits for them; else one works on, for the requests that came in between."""
        key = f"{found.name}:{found.version}"
        self._wait_for_empty_queue(key)
        with self._parking(found) as parking:
            self._settle(found, found.workers, parking)
            # Without workers TorchServe answers 503 at once instead of queueing what unregistering would lose.
            self._scale_list(found, 0)
            if self._require(key).pending <= parking.unanswered():
                return True
        self._scale_list(found, 1)
        return False

    def drain(self) -> None:
        try:
            answer = requests.post(f"{self._supervisor_url}/drain", timeout=5)
        except requests.RequestException as error:
            raise ClientError(
                f"the supervisor at {self._supervisor_url} does not answer: {type(error).__name__}",
                remedy="is `marina serve` running, with its supervisor port?",
            ) from error
        if answer.status_code != 202:
            raise Refused("the supervisor refused to drain", status=answer.status_code, detail=answer.reason or "")

    # ---- looking

    def _model(self, key: str) -> ServedModel:
        (model,) = model_store.to_serve(model_store.select(self._store, [key]))
        return model

    def _find(self, key: str) -> ModelStatus | None:
        name, version = _split(key)
        try:
            return self._management.describe(name, version)
        except Refused as error:
            if error.status == 404:
                return None
            raise

    def _require(self, key: str) -> ModelStatus:
        found = self._find(key)
        if found is None:
            raise NotServed(f"{key.replace(':', ' ')} is not served", remedy="`marina status` lists what is served")
        return found

    # ---- loading

    def _load(self, model: ServedModel, workers: int) -> None:
        values = model.snapshot()
        try:
            self._management.register(
                model.archive_file.name,
                workers=workers,
                batch_size=int(str(values["batchSize"])),
                max_batch_delay_ms=int(str(values["maxBatchDelay"])),
                response_timeout=int(str(values["responseTimeout"])),
                startup_timeout=int(str(values["startupTimeout"])),
            )
        except ClientError as error:
            cause = self._cause(f"{model.name}_{model.version}")
            raise ArchiveError(
                f"{model.name} {model.version} did not load: {cause or error}",
                remedy="check the archive: marina verify MAR; and whether there is memory for it beside the old version",
            ) from error

    def _cause(self, label: str) -> str:
        """The worker's own words, which TorchServe hides and the supervisor has read; empty without a supervisor."""
        deadline = time.monotonic() + _CAUSE_SECONDS
        while time.monotonic() < deadline:
            try:
                found = requests.get(f"{self._supervisor_url}/failures", timeout=5).json()
                cause = str(found.get(label, ""))
            except (requests.RequestException, ValueError, AttributeError):
                return ""
            if cause:
                return cause
            time.sleep(_LOOK_SECONDS)
        return ""

    # ---- nothing to lose

    def _wait_for_empty_queue(self, key: str) -> None:
        deadline = time.monotonic() + DRAIN_SECONDS
        while (found := self._require(key)).pending:
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"{found.name} {found.version} still has {found.pending} requests in its queue "
                    f"after {DRAIN_SECONDS:.0f} s, and serves on",
                    remedy=f"somebody asks for it by its number: stop that, then: marina retire {key}",
                )
            time.sleep(_LOOK_SECONDS)

    def _parking(self, found: ModelStatus) -> Parking:
        return Parking(self._management_url, found.name, found.version)

    def _require_ours(self, found: ModelStatus) -> ModelStatus:
        """The present state. Raises ClientError when a worker that serves is not a process that we can look at: then nobody
        could say whether it has something in hand."""
        key = f"{found.name}:{found.version}"
        deadline = time.monotonic() + _NOTICE_SECONDS
        while _out_of_reach(found):
            if time.monotonic() > deadline:
                raise ClientError(
                    f"the workers of {key} are not processes that this user can reach on this machine", remedy=RUN_THERE
                )
            time.sleep(_LOOK_SECONDS)
            found = self._require(key)
        return found

    def _settle(self, found: ModelStatus, workers: Sequence[WorkerStatus], parking: Parking) -> None:
        """Return when these workers have nothing in hand and take nothing new; see `Parking`. Raises ClientError where
        that cannot be brought about.

        A handler that cannot be parked (not one of Marina's) is given the chance to be idle: exact for a version that
        gets no new requests, and the best that can be had for one that does.
        """
        if not any(worker.ready for worker in found.workers):
            return
        ids = {worker.id for worker in workers}
        present = self._require_ours(found).workers
        pids = [worker.pid for worker in present if worker.id in ids and folder_of(worker) is not None]
        if parking.supported(within=DRAIN_SECONDS):
            parking.park(pids, within=DRAIN_SECONDS)
            return
        deadline = time.monotonic() + min(DRAIN_SECONDS, 10.0)
        looks = 0
        before = _cpu_seconds(pids)
        while looks < _IDLE_LOOKS and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            now = _cpu_seconds(pids)
            idle = now == before and not self._require(f"{found.name}:{found.version}").pending
            looks, before = (looks + 1 if idle else 0), now


def _cpu_seconds(pids: Sequence[int]) -> dict[int, float]:
    """Processor time used so far; a worker that waits for its next request uses none."""
    used = {}
    for pid in pids:
        with contextlib.suppress(psutil.Error, ValueError):
            times = psutil.Process(pid).cpu_times()
            used[pid] = times.user + times.system
    return used


def _out_of_reach(found: ModelStatus) -> bool:
    """Whether a worker that serves is not a process of this machine that we can look at."""
    return any(worker.ready and folder_of(worker) is None for worker in found.workers)


def _dead_in_front(found: ModelStatus) -> bool:
    """Whether an entry without a process has a living one behind it; of what is out of reach nobody can say so."""
    if _out_of_reach(found):
        return False
    alive = [worker.ready or psutil.pid_exists(worker.pid) for worker in found.workers]
    return True in alive and False in alive[: len(alive) - alive[::-1].index(True)]


def _split(key: str) -> tuple[str, str]:
    name, _, version = key.partition(":")
    return name, version
