"""Rollouts: a new version takes over without a lost request, and back. Every step is told as it happens and is on disk
before it happens; a failed, interrupted or killed rollout is taken back, or finished when the new version was the
default everywhere already.

    verify -> publish -> load -> golden samples -> shadow -> canary -> default -> drain the old version, and keep it

With several replicas, all of them hold and have proved a version before the first one switches to it, and an old version
is taken away only when all have switched. `serving.json` never promises what is not there: it learns of a version after
that is ready everywhere, and forgets it before it goes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handlerlib.errors import MarinaError
from marina import canary, serving
from marina import store as model_store
from marina import verify as verification
from marina.archive import Archive, sha256_of
from marina.autoscale import Autoscale
from marina.canary import Canary, Front, Stages
from marina.client import ModelStatus
from marina.errors import ArchiveError, ClientError, StoreError
from marina.gates import Gates, Verdict, judge, require
from marina.journal import Begun, Journal
from marina.replica import Replica
from marina.serving import ModelServing, NotServed, Serving


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One thing done, for people and for --json."""

    what: str
    where: str
    """The replica, or empty."""
    seconds: float
    error: str = ""
    """Why it failed; empty when it did not."""
    found: str = ""
    """What it showed, when it is a look and not an action."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The served state of one model after a rollout."""

    name: str
    default: str
    previous: str | None
    versions: dict[str, int]
    """Version -> workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """How a new version is tried before it takes over."""

    gates: Gates = field(default_factory=Gates)
    recorded: Sequence[bytes] = ()
    """Inputs for the shadow, beside the golden samples."""
    sample_seconds: float = 3.0
    """How long at most live inputs are gathered for the shadow; 0: none."""
    stages: Stages | None = field(default_factory=Stages)
    """None: no canary."""


class Rollout:
    """Rollouts on the replicas of one model store."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        store: Path,
        *,
        python: str,
        report: Callable[[Step], None] = lambda step: None,
        front: Front | None = None,
        trial: Trial | None = None,
    ) -> None:
        """`python` is the interpreter that verifies archives by loading them; `front` the gateway, where there is one."""
        if not replicas:
            raise NotServed("there is no server to roll out to", remedy="start one: marina serve, or make up")
        self.steps: list[Step] = []
        """Everything done so far."""
        self.verdicts: list[Verdict] = []
        """Of the gates so far."""
        self._replicas = tuple(replicas)
        self._store = store
        self._python = python
        self._report = report
        self._front = front
        self._trial = trial or Trial()
        self._journal = Journal(store)
        self._settling = False

    def deploy(
        self, archive: Path, *, workers: int | None = None, retire: bool = False, keep: Collection[str] = ()
    ) -> Outcome:
        """Verify, put into the store, load, prove, try beside the old version, make it the default.

        The version it replaces is drained and stays loaded for a quick rollback, unless `retire`; the one before that,
        which was kept until now, is retired, unless it is among `keep`. `workers` defaults to what the replaced version
        has, or the archive's own number. Raises ArchiveError when the archive is refused, before anything was touched,
        and GateFailed when it is worse than the old version, after everything is as it was.
        """
        with self._alone():
            verified = self._verify(archive)
            state = self._current()
            old = state.models.get(verified.name)
            created = self._not_there_yet(verified)
            count = workers or (old.versions[old.default] if old else self._own_workers(verified))
            loaded = state.with_version(verified.name, verified.version, count)
            after = loaded.with_default(verified.name, verified.version)
            with self._journaled("deploy", verified.name, state, after, published=created):
                self._publish(verified)
                self._switch(verified.name, verified.version, state, loaded, after)
            if old is not None and old.default != verified.version:
                self._retire_older(verified.name, after, old, retire=retire, keep=keep)
            return _outcome(self._written(), verified.name)

    def rollback(self, name: str, *, retire: bool = False) -> Outcome:
        """Make the previous default the default again; a second rollback comes back here. Raises NotServed without one.

        Quick when that version is still loaded. With `retire` the version that is left is not kept.
        """
        with self._alone():
            state = self._current()
            model = state.model(name)
            if model.previous is None:
                raise NotServed(
                    f"{name} {model.default} has no version before it to go back to",
                    remedy="deploy the version you want: marina deploy MAR",
                )
            target = model.previous.version
            model_store.select(self._store, [f"{name}:{target}"])
            loaded = state.with_version(name, target, model.versions.get(target, model.previous.workers))
            after = loaded.with_default(name, target)
            with self._journaled("rollback", name, state, after):
                self._switch(name, target, state, loaded, after, tried=True)
            if retire:
                self._retire(after, name, model.default)
            return _outcome(self._written(), name)

    def retire(self, name: str, version: str) -> Outcome:
        """Unregister a version that is not the default, after its last request. Raises NotServed for the default."""
        with self._alone():
            self._retire(self._current(), name, version)
            return _outcome(self._written(), name)

    def scale(self, name: str, workers: int, version: str | None = None) -> Outcome:
        """Set the number of workers of a version (the default one) on every replica."""
        with self._alone():
            state = self._current()
            model = state.model(name)
            chosen = version or model.default
            if chosen not in model.versions:
                raise NotServed(f"{name} {chosen} is not served", remedy="`marina status` lists what is served")
            if model.autoscale is not None and model.autoscale.clamped(workers) != workers:
                raise NotServed(
                    f"{name} is scaled by itself between {model.autoscale.min} and {model.autoscale.max} workers",
                    remedy=f"choose a number of at least {model.autoscale.awake} within them, "
                    "or give it other bounds: [models.NAME.autoscale] of deploy.toml, then marina apply",
                )
            key = f"{name}:{chosen}"
            after = state.with_version(name, chosen, workers)
            with self._journaled("scale", name, state, after):
                if workers < model.versions[chosen]:
                    serving.write(self._store, after)
                for replica in self._replicas:
                    with self._step(f"scale {key} to {workers}", replica):
                        replica.scale(key, workers)
                self._journal.commit()
                serving.write(self._store, after)
            return _outcome(after, name)

    def bring(self, name: str, target: ModelServing) -> Outcome:
        """Have every replica serve exactly this of a model, whatever it serves now: what is missing is loaded first, then
        the default is set, then what is too much is retired. No trial: it is for versions that were accepted before.

        A version that was registered with another batch than its archive's is registered again, as long as another one
        of the target can answer meanwhile.
        """
        with self._alone():
            known = self._known()
            after = Serving(models={**known.models, name: target})
            model_store.select(self._store, [f"{name}:{version}" for version in target.versions])
            with self._journaled("apply", name, known, after):
                self._set_stale_aside(known, name, target)
                for replica in self._replicas:
                    self._bring_up(replica, name, target, prove=True)
                # What is about to go is not expected any more: else each replica would be out of service until it is over.
                serving.write(self._store, after)
                for replica in self._replicas:
                    self._take_down(replica, name, target, None)
                self._journal.commit()
            return _outcome(after, name)

    def remove(self, name: str) -> bool:
        """Retire a model that no rollout has left there, after its last request; whether there was one to retire."""
        with self._alone():
            if name in self._known().models:
                return False
            for replica in self._replicas:
                self._take_down(replica, name, None, None)
            return True

    def add(self, archive: Path) -> Archive:
        """Verify an archive and put it into the store, without serving it. Raises ArchiveError."""
        with self._alone():
            verified = self._verify(archive)
            self._not_there_yet(verified)
            self._publish(verified)
            return verified

    def recover(self, *, as_it_is: bool = False) -> str:
        """Settle a rollout that was killed, and say what was done; empty when there was none.

        With `as_it_is` the servers are left as they are and only `serving.json` is brought in line with them.
        """
        with serving.rollout_lock(self._store):
            begun = self._journal.unfinished()
            if begun is None:
                return ""
            if as_it_is:
                self._journal.go_on(begun)
                self._end_canary(begun.name, begun.splits)
                serving.write(self._store, self._current())
                self._journal.end("accepted")
                return f"{begun.words}: left as it is"
            return self._recover(begun)

    # ---- the parts of a rollout

    def _verify(self, path: Path) -> Archive:
        with self._step(f"verify {path.name}"):
            report = verification.verify(path, python=self._python)
            if not report.passed:
                first = report.findings[0]
                raise ArchiveError(f"{path} is refused: {first.where}: {first.message}", remedy=first.remedy)
            return verification.identify(path, report)

    def _not_there_yet(self, verified: Archive) -> str | None:
        """The name under which the store will get this archive; None when it is there. Refused when that version is
        there with other bytes."""
        target = self._store / _file_name(verified)
        for item in model_store.archives(self._store):
            if item.key == verified.key and (item.sha256 != verified.sha256 or item.path.name != target.name):
                raise _other_bytes(item.path, verified)
        if not target.exists():
            return target.name
        if sha256_of(target) != verified.sha256:
            raise _other_bytes(target, verified)
        return None

    def _publish(self, verified: Archive) -> None:
        target = self._store / _file_name(verified)
        with self._step(f"publish {target.name}"):
            if not target.exists():
                _copy(verified.path, target)
            packed = Archive(target, verified.name, verified.version, verified.sha256, verified.size)
            model_store.publish(self._store, packed)

    def _own_workers(self, verified: Archive) -> int:
        (model,) = model_store.to_serve([verified])
        return model.workers

    def _switch(
        self, name: str, version: str, before: Serving, loaded: Serving, after: Serving, *, tried: bool = False
    ) -> None:
        """Load and prove it everywhere, try it unless it was `tried` before, then make it the default everywhere."""
        key, workers = f"{name}:{version}", loaded.models[name].versions[version]
        for replica in self._replicas:
            with self._step(f"load {key}, {workers} worker{'s' if workers != 1 else ''}", replica):
                replica.register(key, workers)
            with self._step(f"golden samples of {key} over HTTP", replica):
                replica.prove(key)
        serving.write(self._store, loaded)
        old = before.models.get(name)
        if old is not None and old.default != version:
            if not tried:
                self._shadow(name, old.default, version)
                self._canary(name, version)
            for replica in self._replicas:
                with self._step(f"default is {key}", replica):
                    replica.set_default(key)
        self._journal.commit()
        serving.write(self._store, after)
        self._end_canary(name)
        if old is not None and old.default != version:
            self._drain(f"{name}:{old.default}")

    def _shadow(self, name: str, old: str, version: str) -> None:
        """One replica is enough: all of them run the same bytes, and each has answered its golden samples."""
        replica, trial = self._replicas[0], self._trial
        with self._step(f"shadow of {name}:{old} on {name}:{version}", replica) as step:
            seen = replica.shadow(name, old, version, trial.recorded, trial.sample_seconds)
            verdicts = judge(trial.gates, "shadow", seen.old, seen.new, (seen.alike, seen.compared))
            inputs = f"{seen.golden} golden, {seen.recorded} recorded, {seen.live} live inputs"
            step.found = "; ".join([inputs, *(f"{item.gate}: {item.text}" for item in verdicts)])
            self._require(name, version, verdicts)

    def _canary(self, name: str, version: str) -> None:
        stages = self._trial.stages
        if stages is None:
            return
        if self._front is None:
            with self._step("no canary: no gateway stands in front of this server, so the default is switched at once"):
                return
        with Canary(self._front, name, version, gates=self._trial.gates, stages=stages) as running:
            for percent in stages.percents:
                with self._step(f"canary: {percent:g} % of requests to {name}:{version}") as step:
                    verdicts = running.stage(percent)
                    step.found = "; ".join(f"{item.gate}: {item.text}" for item in verdicts)
                    self._require(name, version, verdicts)

    def _require(self, name: str, version: str, verdicts: Sequence[Verdict]) -> None:
        self.verdicts += verdicts
        require(name, version, verdicts)

    def _end_canary(self, name: str, splits: str | None = None, *, retiring: bool = False) -> None:
        """Returns when no request follows it any more, and, with `retiring`, none that did waits in the gateway: the version
        is about to go. `splits` is the file of a gateway that only the journal knows."""
        front = self._front
        path = front.splits if front is not None else splits
        if path is not None and canary.clear_split(Path(path), name):
            waiting = (front.queue_seconds if front is not None else canary.QUEUE_SECONDS) if retiring else 0.0
            time.sleep(canary.SETTLE_SECONDS + waiting)

    def _drain(self, key: str) -> None:
        """The replaced version answers what it was asked before; it stays loaded, so nothing can be lost."""
        for replica in self._replicas:
            with self._step(f"drain {key}, and keep it", replica) as step:
                if not replica.drained(key):
                    step.found = "it is still asked for by its number"

    def _retire_older(
        self, name: str, state: Serving, before: ModelServing, *, retire: bool, keep: Collection[str]
    ) -> None:
        """After a deploy: the version that was kept for a rollback until now, and with `retire` the one just replaced."""
        kept = before.previous.version if before.previous is not None else ""
        if kept in state.models[name].versions and kept not in {state.models[name].default, *keep}:
            # Told as a step when somebody asks for it by its number: then it serves on.
            with contextlib.suppress(ClientError):
                state = self._retire(state, name, kept)
        if retire:
            self._retire(state, name, before.default)

    def _retire(self, state: Serving, name: str, version: str) -> Serving:
        after = state.without(name, version)
        with self._journaled("retire", name, state, after):
            serving.write(self._store, after)
            for replica in self._replicas:
                with self._step(f"retire {name}:{version} when it has nothing left to do", replica):
                    replica.retire(f"{name}:{version}")
        return after

    # ---- state

    def _current(self) -> Serving:
        """The file, brought in line with what the first replica serves."""
        with self._step("look at what is served"):
            seen = [replica.status() for replica in self._replicas]
        return serving.adopted(serving.read(self._store), seen[0])

    def _written(self) -> Serving:
        return serving.read(self._store) or Serving()

    def _known(self) -> Serving:
        """The file; before there is one, what is served now counts as meant."""
        return serving.read(self._store) or serving.adopted(None, self._replicas[0].status())

    def _set_stale_aside(self, known: Serving, name: str, target: ModelServing) -> None:
        """TorchServe changes a batch only by registering again: have the other versions answer, and retire those."""
        meant = model_store.batching(self._store, name)
        stale = {
            replica.name: {item.version for item in replica.status() if item.name == name and is_stale(item, meant)}
            for replica in self._replicas
        }
        left = {
            version: workers
            for version, workers in target.versions.items()
            if not any(version in found for found in stale.values())
        }
        if len(left) == len(target.versions) or not left:
            return
        default = target.default if target.default in left else max(left, key=model_store.version_key)
        meanwhile = ModelServing(default=default, versions=left, autoscale=target.autoscale)
        for replica in self._replicas:
            self._bring_up(replica, name, meanwhile, prove=True)
        serving.write(self._store, Serving(models={**known.models, name: meanwhile}))
        for replica in self._replicas:
            self._take_down(replica, name, meanwhile, stale[replica.name])

    def _bring_up(self, replica: Replica, name: str, target: ModelServing, *, prove: bool = False) -> None:
        """One replica to have what the target state of a model has."""
        found = {item.version: item for item in replica.status() if item.name == name}
        for version, workers in target.versions.items():
            have = found.get(version)
            if not has_workers(have, workers, target.autoscale):
                with self._step(f"{name}:{version} with {workers} worker{'s' if workers != 1 else ''}", replica):
                    replica.register(f"{name}:{version}", workers)
            if have is None and prove:
                with self._step(f"golden samples of {name}:{version} over HTTP", replica):
                    replica.prove(f"{name}:{version}")
        if not _is_default(found.get(target.default)):
            with self._step(f"default is {name}:{target.default}", replica):
                replica.set_default(f"{name}:{target.default}")

    def _take_down(
        self, replica: Replica, name: str, target: ModelServing | None, ours: Collection[str] | None
    ) -> None:
        """What a replica has beyond the target state of a model. Only `ours` goes; None: all of it."""
        wanted = target.versions if target is not None else {}
        extra = [item for item in replica.status() if item.name == name and item.version not in wanted]
        # TorchServe lets the default go only as the last one.
        for item in sorted(extra, key=lambda item: bool(item.default)):
            if ours is None or item.version in ours:
                with self._step(f"retire {name}:{item.version}", replica):
                    replica.retire(f"{name}:{item.version}")

    # ---- the journal: forwards, back, and after a kill

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The only rollout on this store, after what a killed one has left."""
        with serving.rollout_lock(self._store):
            begun = self._journal.unfinished()
            if begun is not None:
                self._recover(begun)
            yield

    def _recover(self, begun: Begun) -> str:
        """Take it back, or finish it. Raises the first error when a replica cannot be brought there."""
        self._journal.go_on(begun)
        way = "is finished" if begun.committed else "is taken back"
        self._tell(Step(what=f"a killed {begun.words} {way}", where="", seconds=0.0))
        with _undisturbed():
            failed = self._settle(begun)
        if failed:
            raise ClientError(
                f"a killed {begun.words} could not be settled: {'; '.join(failed)}",
                remedy="correct that and run the command again, or accept what is served now: marina recover --as-it-is",
            )
        return f"{begun.words} {way}"

    def _settle(self, begun: Begun) -> list[str]:
        """Every replica, the gateway, the file and the store to the state before or after; returns what failed.

        Each is tried, whatever happens to the others. The journal ends only when none failed.
        """
        self._settling = True
        try:
            return self._settle_each(begun)
        finally:
            self._settling = False

    def _settle_each(self, begun: Begun) -> list[str]:
        done = len(self.steps)
        before, after = serving.state_of(begun.before), serving.state_of(begun.after)
        target = after if begun.committed else before
        prefix = "finish" if begun.committed else "revert"
        ours = {version for state in (before, after) if state is not None for version in state.versions}
        with contextlib.suppress(MarinaError, OSError), self._step(f"{prefix}: canary of {begun.name}"):
            self._end_canary(begun.name, begun.splits, retiring=not begun.committed)
        if target is None or not begun.committed:
            # What is about to go is not expected any more.
            self._write_settled(begun, prefix)
        for replica in self._replicas:
            with contextlib.suppress(MarinaError, OSError), self._step(f"{prefix}: {begun.name}", replica):
                if target is not None:
                    self._bring_up(replica, begun.name, target)
                self._take_down(replica, begun.name, target, ours)
        if begun.committed:
            self._write_settled(begun, prefix)
        failed = [f"{step.what} {step.where}: {step.error}" for step in self.steps[done:] if step.error]
        if not failed and begun.published and not begun.committed:
            with contextlib.suppress(MarinaError, OSError), self._step(f"{prefix}: remove {begun.published}"):
                model_store.forget(self._store, begun.published)
        if not failed:
            try:
                self._journal.end("done" if begun.committed else "reverted")
            except StoreError as error:
                failed.append(str(error))
        return failed

    def _write_settled(self, begun: Begun, prefix: str) -> None:
        with contextlib.suppress(MarinaError, OSError), self._step(f"{prefix}: {serving.SERVING_FILE}"):
            serving.write(self._store, serving.settled(self._known(), begun))

    @contextlib.contextmanager
    def _journaled(
        self, action: str, name: str, before: Serving, after: Serving, *, published: str | None = None
    ) -> Iterator[None]:
        """Keep what the block did, or, when it fails or is interrupted, settle it at once and say so."""
        begun = self._journal.begin(
            action,
            name,
            before=_dumped(before, name),
            after=_dumped(after, name),
            published=published,
            splits=str(self._front.splits.absolute()) if self._front is not None else None,
        )
        try:
            yield
        except BaseException as error:
            self._fail(begun, error)
            raise
        else:
            self._journal.end("done")

    def _fail(self, begun: Begun, error: BaseException) -> None:
        with _undisturbed():
            now = self._journal.unfinished() or begun
            failed = self._settle(now)
        before = serving.state_of(begun.before)
        as_before = f"{begun.name} {before.default} is served as before" if before else f"{begun.name} is not served"
        if failed:
            state = f"could not be {'finished' if now.committed else 'reverted'}: {'; '.join(failed)}"
        else:
            state = f"{begun.name} serves its new state" if now.committed else f"reverted, {as_before}"
        if isinstance(error, MarinaError):
            error.args = (f"{error} ({state})", *error.args[1:])
        elif isinstance(error, KeyboardInterrupt):
            self._tell(Step(what=f"interrupted; {state}", where="", seconds=0.0))

    # ---- telling

    @contextlib.contextmanager
    def _step(self, what: str, replica: Replica | None = None) -> Iterator[_Running]:
        running = _Running()
        where = replica.name if replica is not None else ""
        started = time.monotonic()
        error = ""
        try:
            self._note_start(what, where)
            yield running
        except BaseException as raised:
            error = str(raised) or type(raised).__name__
            raise
        finally:
            seconds = round(time.monotonic() - started, 3)
            step = Step(what=what, where=where, seconds=seconds, error=error, found=running.found)
            self.steps.append(step)
            self._tell(step)
            with contextlib.suppress(StoreError):  # it would hide what failed; the next step's start says the same
                self._journal.done(what, where, seconds, error)

    def _note_start(self, what: str, where: str) -> None:
        """The way back does not depend on a record of it: on a full disk the servers go back all the same."""
        try:
            self._journal.start(what, where)
        except StoreError:
            if not self._settling:
                raise

    def _tell(self, step: Step) -> None:
        """A closed pipe or a lost terminal, which rich makes a SystemExit, ends no rollout."""
        with contextlib.suppress(OSError, SystemExit):
            self._report(step)


@dataclass(slots=True)
class _Running:
    """A step under way."""

    found: str = ""


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C, or what the shell and the kernel both send for a lost terminal, must not leave a revert half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def has_workers(status: ModelStatus | None, wanted: int, autoscale: Autoscale | None = None) -> bool:
    """Whether a version has its workers: all that are listed, or all that are ready beside an entry that the watchdog has
    replaced. Workers that load or are down for a moment count. An autoscaled version may have any number within its
    bounds, and none when it is asleep."""
    if status is None:
        return False
    if autoscale is not None:
        return status.asleep if not status.workers else autoscale.awake <= len(status.workers) <= autoscale.max
    return wanted in (len(status.workers), status.ready_workers)


def batching_of(status: ModelStatus) -> tuple[int, int]:
    """Batch size and longest wait for a batch in ms, as served."""
    return status.batch_size, status.max_batch_delay_ms


def is_stale(status: ModelStatus, meant: Mapping[str, tuple[int, int]]) -> bool:
    """Whether a version is served with another batch than its archive's; see `store.batching`."""
    return meant.get(status.version, batching_of(status)) != batching_of(status)


def _is_default(status: ModelStatus | None) -> bool:
    return status is not None and bool(status.default)


def _dumped(state: Serving, name: str) -> dict[str, Any] | None:
    model = state.models.get(name)
    return None if model is None else model.model_dump(mode="json")


def _file_name(packed: Archive) -> str:
    return f"{packed.name}-{packed.version}.mar"


def _other_bytes(path: Path, verified: Archive) -> StoreError:
    return StoreError(
        f"{path} is already {verified.name} {verified.version} with other bytes than {verified.path}; "
        "two different archives of one version cannot be told apart",
        remedy="give the new one a new version: train or export with --set version=...",
    )


def _copy(source: Path, target: Path) -> None:
    copied = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copyfile(source, copied)
        copied.chmod(0o644)  # read by the server's user in its container
        copied.replace(target)
    except OSError as error:
        raise StoreError(
            f"{source} cannot be copied to {target.parent}: {error.strerror}", remedy="make room there, or allow it"
        ) from error
    finally:
        copied.unlink(missing_ok=True)


def _outcome(state: Serving, name: str) -> Outcome:
    model = state.model(name)
    return Outcome(
        name=name,
        default=model.default,
        previous=model.previous.version if model.previous else None,
        versions=dict(model.versions),
    )
