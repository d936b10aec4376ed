"""Tuning on the live server: a second registration of the model's archive, under another name, takes the load.

The version that serves is left alone: it keeps its workers and its settings, and requests to it are answered meanwhile. The
second one, NAME--tune, is registered through the management interface with the batch size and delay to be measured and
scaled to the number of workers, and it is gone when the tuner ends, however it ends.

Threads are not varied: each worker takes the cores that the other workers leave free (handlerlib.cores).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psutil

import marina
from marina import load_server, loadgen
from marina.client import ManagementClient, ModelStatus
from marina.errors import ArchiveError, ClientError, ConfigError, Refused
from marina.load_payloads import Load
from marina.load_stats import Interval
from marina.loadgen import Closed, Open, Result, Scenario
from marina.serving import TRIAL_SUFFIX
from marina.tune_search import Outcome, OutOfTime, Probe, Setting, Space, search

_EXPLORING_SHARE = 0.75
"""Of the budget; the rest is for measuring the best again."""
_SUSTAIN_SECONDS = 30.0
"""Kept for the open loop at the end."""
_ANSWERS = 300
"""A percentile of 99 needs some hundred."""
_SHORTEST_SHARE = 1 / 3
"""Of the longest: a measurement with enough answers ends then."""
_LONGER = 2.0
"""How much longer finalists are measured."""
_SETTLE_SECONDS = 0.5
_MEMORY_SHARE = 0.9
_SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
_RECORD = 2
_CHECKS = 2
"""Raised when what counts as a right answer changes: probes that were judged otherwise are not comparable."""
_CUT_OFF = ('{"probe": ', '{"sustained": ')

Say = Callable[[str], None]


class NoRoom(ArchiveError):
    """There is no memory for so many workers beside those that serve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An archive of the served model store that may be the one to serve."""

    key: str
    """NAME:VERSION."""
    file: str
    """As the management interface takes it."""
    sha256: str
    offered: bool = False
    """Nobody named it: when it does not load it is left out."""
    check: loadgen.Check | None = None
    """How its answers are judged: each form of a model has a tolerance of its own. None: by their status alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is to be found."""

    name: str
    candidates: Sequence[Candidate]
    """The first one is what is served now."""
    start: Setting
    space: Space
    objective_ms: float
    """The 99th percentile must not exceed it."""
    budget: float
    """Seconds, what was remembered not counted."""
    load: Load
    headers: Mapping[str, str] = field(default_factory=dict)
    probe_seconds: float = 6.0
    """Of the longest measurement while searching."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sustained:
    """The chosen settings under requests that arrive at random (Poisson), as those of many clients do."""

    rate: float
    """Per second: the highest share of the closed loop's throughput at which the objective held."""
    p99_ms: Interval
    share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What was found."""

    outcome: Outcome
    sustained: Sustained | None
    """None when no rate that was tried met the objective, or no time was left."""
    remembered: int
    """Measurements taken over from an earlier run."""
    seconds: float


def tune(task: Task, stand: Stand, record: Record, say: Say) -> Tuned:
    """Search, then see what the best settings sustain in an open loop. Ctrl-C passes through; `record` keeps what was
    measured, and the same call goes on from there.
    """
    began = time.monotonic()
    offered = {item.key for item in task.candidates if item.offered}
    too_many: dict[str, int] = {}
    """Archive -> the number of workers from which on it is not tried."""

    def left_out(setting: Setting) -> bool:
        return setting.workers >= too_many.get(setting.archive, setting.workers + 1)

    def spent() -> float:
        return time.monotonic() - began

    def measure(setting: Setting, in_flight: int, turn: int) -> Probe:
        known = record.find(setting, in_flight, turn)
        if known is not None:
            return known
        if left_out(setting):
            return _not_loaded(setting, in_flight, turn)
        allowed = task.budget * _EXPLORING_SHARE if turn == 0 else task.budget - _SUSTAIN_SECONDS
        if spent() + stand.cost(setting) + task.probe_seconds > allowed:
            raise OutOfTime
        try:
            probe = dataclasses.replace(stand.probe(setting, in_flight, turn, task), at=spent())
        except ArchiveError as error:
            alone = setting.workers == task.space.workers[0]
            if setting.archive not in offered and (alone or not isinstance(error, NoRoom)):
                raise
            too_many[setting.archive] = setting.workers if isinstance(error, NoRoom) else 0
            say(f"left out: {error}")
            return _not_loaded(setting, in_flight, turn)
        record.add(probe)
        say(_line(probe, task.objective_ms))
        return probe

    outcome = search(task.space, task.start, measure, task.objective_ms)
    probes = [item for item in outcome.probes if item.seconds > 0]
    measured = {item.setting for item in probes}
    values = [item for item in outcome.values if item.setting in measured]
    outcome = dataclasses.replace(outcome, values=values, probes=probes)
    sustained = None
    if outcome.best is not None:
        best = outcome.best.setting
        if (best, task.objective_ms) in record.sustained:
            sustained = record.sustained[best, task.objective_ms]
        else:
            with contextlib.suppress(OutOfTime, NoRoom):
                sustained = _sustain(task, stand, best, outcome.best.throughput.value, began, say)
                record.add_sustained(best, task.objective_ms, sustained)
    return Tuned(outcome=outcome, sustained=sustained, remembered=record.remembered, seconds=spent())


class Stand:
    """The registration that is measured. Leaving its `with` block takes it away."""

    def __init__(self, management_url: str, inference_url: str, name: str, say: Say) -> None:
        self.name = f"{name}{TRIAL_SUFFIX}"
        self._inference_url = inference_url
        self._management = ManagementClient(management_url)
        self._say = say
        self._now: Setting | None = None
        self._version = ""
        self._warm = False
        self._worker_seconds = 10.0
        self._server = _listener(inference_url)

    def cost(self, setting: Setting) -> float:
        """Seconds that loading it will take, as far as is known."""
        return 0.0 if setting == self._now else self._worker_seconds

    def prepare(self, setting: Setting, candidate: Candidate) -> None:
        """Have exactly this setting loaded and ready. Raises ArchiveError when it does not load, NoRoom when there is no
        memory for so many workers.
        """
        if setting == self._now:
            return
        began = time.monotonic()
        started = setting.workers
        if self._now is not None and dataclasses.replace(self._now, workers=setting.workers) == setting:
            started = max(1, setting.workers - self._now.workers)
            self.require_room(setting, setting.workers - self._now.workers)
        else:
            self.clear()
            self._register(setting, candidate)
            self.require_room(setting, setting.workers - 1)
        self._now = None
        self._management.scale(self.name, setting.workers, self._version)
        self._now = setting
        self._worker_seconds = max(1.0, (time.monotonic() - began) / started * min(started, 2))

    def require_room(self, setting: Setting, more: int) -> None:
        """Raises NoRoom unless memory is left for so many more workers like the one that is loaded: what serves beside
        it must not be killed for a measurement.
        """
        if more > 0 and more * self.worker_bytes() > psutil.virtual_memory().available * _MEMORY_SHARE:
            raise NoRoom(
                f"there is no memory for {setting.workers} workers of {setting.archive} beside those that serve",
                remedy="fewer: --workers",
            )

    def worker_bytes(self) -> int:
        """Memory of the largest worker that is loaded; 0 where the system does not say."""
        pids = [worker.pid for worker in self._status().workers if worker.pid > 0]
        return max(map(_worker_memory, pids), default=0)

    def probe(self, setting: Setting, in_flight: int, turn: int, task: Task) -> Probe:
        """Measure one setting with so many requests in flight."""
        candidate = next(item for item in task.candidates if item.key == setting.archive)
        self.prepare(setting, candidate)
        scale = _LONGER if turn else 1.0
        result = self._run(task, candidate, Closed(connections=in_flight), scale)
        if result.latency is None and not result.planned:
            raise ClientError(f"{self.name} gave no answer at all", remedy="look at the server's log")
        found = result.latency
        return Probe(
            setting=setting,
            in_flight=in_flight,
            turn=turn,
            throughput=result.throughput,
            p50_ms=found.p50.value if found is not None else 0.0,
            p99_ms=found.p99 if found is not None else Interval(0.0, None, None),
            failed=result.failed,
            seconds=result.seconds,
            cpu_ms=result.server.cpu_ms_per_request if result.server is not None else None,
            pss_mib=result.server.pss_mib if result.server is not None else None,
        )

    def open_loop(self, task: Task, setting: Setting, rate: float) -> Result:
        """Requests at random times."""
        candidate = next(item for item in task.candidates if item.key == setting.archive)
        self.prepare(setting, candidate)
        return self._run(task, candidate, Open(rate=rate, arrivals="poisson"), _LONGER)

    def clear(self) -> None:
        """Unregister what we registered, or what a killed run left."""
        self._now = None
        for version in self._registered():
            self._management.unregister(self.name, version)

    def close(self) -> None:
        """As `clear`, with signals held back: an impatient second Ctrl-C must not leave workers behind."""
        held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
        try:
            self.clear()
        finally:
            self._management.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self) -> Stand:
        self.clear()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            self.close()
        except ClientError as left:
            if kind is None:
                raise
            self._say(f"{self.name} may still be registered: {left}")

    def _register(self, setting: Setting, candidate: Candidate) -> None:
        try:
            self._management.register(
                candidate.file,
                workers=1,
                batch_size=setting.batch_size,
                max_batch_delay_ms=setting.delay_ms,
                name=self.name,
            )
        except Refused as error:
            raise ArchiveError(
                f"{candidate.key} did not load a second time: {error}",
                remedy="is there memory for another worker? The server's log has the cause",
            ) from error
        found = self._status()
        self._version = found.version
        if (found.batch_size, found.max_batch_delay_ms) != (setting.batch_size, setting.delay_ms):
            raise ClientError(
                f"the server took batch size {found.batch_size} and delay {found.max_batch_delay_ms} ms instead of "
                f"{setting.batch_size} and {setting.delay_ms}",
                remedy="is it TorchServe 0.12?",
            )

    def _registered(self) -> list[str]:
        try:
            return [item.version for item in self._management.versions(self.name)]
        except Refused as error:
            if error.status == 404:
                return []
            raise

    def _status(self) -> ModelStatus:
        return self._management.describe(self.name)

    def _run(self, task: Task, candidate: Candidate, loop: Closed | Open, scale: float) -> Result:
        scenario = Scenario(
            url=f"{self._inference_url}/predictions/{quote(self.name, safe='')}",
            payloads=task.load.payloads,
            headers=task.headers,
            loop=loop,
            duration=None,
            warm_up=_SETTLE_SECONDS if self._warm else "auto",
            warm_up_limit=20.0,
            timeout=max(10.0, 20 * task.objective_ms / 1e3),
            check=candidate.check,
            server=self._server,
        )
        seen = [0, 0.0]

        def count(progress: loadgen.Progress) -> None:
            if progress.measuring:
                seen[0] += progress.good + progress.failed
                seen[1] += progress.length

        with loadgen.start(scenario, on_progress=count) as load:
            load.wait_measuring()
            longest = task.probe_seconds * scale
            before = loop.connections if isinstance(loop, Closed) else 0  # were on their way when the measurement began
            while (
                seen[1] < longest and not (seen[1] >= _SHORTEST_SHARE * longest and seen[0] >= _ANSWERS * scale)
            ) or (seen[0] <= before and seen[1] < scenario.timeout):
                load.wait_seconds(0.25)
            load.stop()
            self._warm = True
            return load.result()


class Record:
    """Measurements on disk, one JSON object per line, for what is served, these payloads and this machine. Those of other
    archives are known by the archives' digests: a further one in the store leaves the rest remembered.
    """

    def __init__(self, folder: Path, task: Task, *, fresh: bool = False) -> None:
        """In a folder of `folder` named after all that decides what is measured. `fresh` forgets what is there."""
        self.identity = _identity(task)
        self._digests = {item.key: item.sha256 for item in task.candidates}
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]
        self.folder = folder / f"{task.name}-{digest}"
        self.path = self.folder / "probes.jsonl"
        self._known: dict[tuple[Setting, int, int], Probe] = {}
        self.sustained: dict[tuple[Setting, float], Sustained | None] = {}
        """Setting and objective -> what the open loop found; None when no rate held the objective."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            self.path.unlink(missing_ok=True)
        self._read()
        self.remembered = len(self._known)
        if not self.path.exists():
            self._append({"record": _RECORD, **self.identity})

    def find(self, setting: Setting, in_flight: int, turn: int) -> Probe | None:
        """What was measured before."""
        return self._known.get((setting, in_flight, turn))

    def add(self, probe: Probe) -> None:
        """Keep it; it is on disk when this returns."""
        self._known[probe.setting, probe.in_flight, probe.turn] = probe
        self._append({"probe": dataclasses.asdict(probe), "sha256": self._digests[probe.setting.archive]})

    def add_sustained(self, setting: Setting, objective_ms: float, found: Sustained | None) -> None:
        """Keep what the open loop found."""
        self.sustained[setting, objective_ms] = found
        value = dataclasses.asdict(found) if found is not None else None
        of = {"setting": dataclasses.asdict(setting), "objective_ms": objective_ms}
        self._append({"sustained": value, **of, "sha256": self._digests[setting.archive]})

    def _append(self, value: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(value) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self) -> None:
        if not self.path.exists():
            return
        text = self.path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                if line.startswith(_CUT_OFF) and not line.endswith("}"):
                    continue  # the machine stopped while it was written
                raise ConfigError(
                    f"{self.path}, line {number} is damaged: {error}", remedy="forget it: --fresh"
                ) from error
        if text and not text.endswith("\n"):
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write("\n")  # what comes next gets a line of its own

    def _take(self, line: dict[str, Any]) -> None:
        if "probe" in line:
            probe = _probe_from(line["probe"])
            if line["sha256"] == self._digests.get(probe.setting.archive):
                self._known[probe.setting, probe.in_flight, probe.turn] = probe
        elif "sustained" in line:
            setting, value = Setting(**line["setting"]), line["sustained"]
            if line["sha256"] == self._digests.get(setting.archive):
                found = Sustained(**{**value, "p99_ms": Interval(**value["p99_ms"])}) if value is not None else None
                self.sustained[setting, line["objective_ms"]] = found


@contextlib.contextmanager
def only_one(folder: Path, name: str) -> Iterator[None]:
    """One tuner per model. Raises ConfigError while another one runs; a killed one does not count."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(f"another tuner is at work on {name}", remedy="wait until it has ended") from None
    finally:
        os.close(descriptor)


def default_workers(cores: int, now: int) -> list[int]:
    """1, 2, 4 ... up to the cores, the cores themselves, and what is served now."""
    powers = {2**exponent for exponent in range(cores.bit_length()) if 2**exponent <= cores}
    return sorted(powers | {cores, now})


def _sustain(task: Task, stand: Stand, setting: Setting, throughput: float, began: float, say: Say) -> Sustained | None:
    """The largest share of the throughput that the settings answer in time when requests come at random; None when no
    share is. Raises OutOfTime.
    """
    for share in _SHARES:
        if time.monotonic() - began + stand.cost(setting) + task.probe_seconds * _LONGER > task.budget:
            raise OutOfTime
        result = stand.open_loop(task, setting, share * throughput)
        found = result.latency.p99 if result.latency is not None else None
        if found is None:
            continue
        say(f"open loop, {share * throughput:.1f}/s at random: p99 {found.value:.1f} ms, {result.failed} failed")
        if result.failed == 0 and found.value <= task.objective_ms:
            return Sustained(rate=share * throughput, p99_ms=found, share=share)
    return None


def _not_loaded(setting: Setting, in_flight: int, turn: int) -> Probe:
    """What the search takes for hopeless."""
    nothing = Interval(0.0, 0.0, 0.0)
    return Probe(
        setting=setting,
        in_flight=in_flight,
        turn=turn,
        throughput=nothing,
        p50_ms=0.0,
        p99_ms=nothing,
        failed=1,
        seconds=0.0,
    )


def _line(probe: Probe, objective_ms: float) -> str:
    state = f"{probe.failed} FAILED" if probe.failed else "" if probe.within(objective_ms) else "over the objective"
    again = f", round {probe.turn}" if probe.turn else ""
    return (
        f"{probe.setting.text}, {probe.in_flight} in flight{again}: {probe.throughput.value:.1f}/s, "
        f"p99 {probe.p99_ms.value:.1f} ms  {state}"
    ).rstrip()


def _identity(task: Task) -> dict[str, Any]:
    """All that decides what is measured, and nothing that only decides what is looked for."""
    payloads = hashlib.sha256()
    for payload in task.load.payloads:
        payloads.update(hashlib.sha256(payload.body).digest())
    return {
        "name": task.name,
        "checks": _CHECKS,
        "archive": task.candidates[0].sha256,
        "payloads": payloads.hexdigest(),
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / (1 << 30)),
        },
        "marina": marina.__version__,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _probe_from(value: Mapping[str, Any]) -> Probe:
    return Probe(
        **{
            **value,
            "setting": Setting(**value["setting"]),
            "throughput": Interval(**value["throughput"]),
            "p99_ms": Interval(**value["p99_ms"]),
        }
    )


def _listener(inference_url: str) -> int | None:
    parts = urlsplit(inference_url)
    return load_server.find_listener(parts.hostname or "", parts.port or 80)


def _worker_memory(pid: int) -> int:
    """Bytes that another such worker will take; 0 where the system does not say."""
    try:
        found = load_server.memory(load_server.tree_of(psutil.Process(pid)))
    except psutil.Error:
        return 0
    return int((found.uss if found.uss is not None else found.rss) * (1 << 20))
