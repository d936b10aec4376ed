"""Rollouts: a new version takes over without a lost request, and back. Every step is told as it happens; a failed or
interrupted one is reverted, in the opposite order.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from handlerlib.errors import MarinaError
from marina import serving
from marina import store as model_store
from marina import verify as verification
from marina.archive import Archive, sha256_of
from marina.errors import ArchiveError, StoreError
from marina.replica import Replica
from marina.serving import NotServed, Serving


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One thing done, for people and for --json."""

    what: str
    where: str
    """The replica, or empty."""
    seconds: float
    error: str = ""
    """Why it failed; empty when it did not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The served state of one model after a rollout."""

    name: str
    default: str
    previous: str | None
    versions: dict[str, int]
    """Version -> workers."""


class Rollout:
    """Rollouts on the replicas of one model store."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        store: Path,
        *,
        python: str,
        report: Callable[[Step], None] = lambda step: None,
    ) -> None:
        """`python` is the interpreter that verifies archives by loading them."""
        if not replicas:
            raise NotServed("there is no server to roll out to", remedy="start one: marina serve, or make up")
        self.steps: list[Step] = []
        """Everything done so far."""
        self._replicas = tuple(replicas)
        self._store = store
        self._python = python
        self._report = report

    def deploy(self, archive: Path, *, workers: int | None = None, keep: bool = False) -> Outcome:
        """Verify, put into the store, load, prove, make it the default, and retire the version it replaces.

        `workers` defaults to what the replaced version has, or the archive's own number. With `keep`, the replaced
        version stays loaded. Raises ArchiveError when the archive is refused; then nothing was touched.
        """
        with serving.rollout_lock(self._store):
            verified = self._verify(archive)
            state = self._current()
            old = state.models.get(verified.name)
            with self._reverting(f"{verified.name} is served as before") as undo:
                packed = self._publish(verified, undo)
                count = workers or (old.versions[old.default] if old else self._own_workers(packed))
                state = self._switch(state, packed, count, undo)
            if old is not None and old.default != packed.version and not keep:
                state = self._retire(state, packed.name, old.default)
            return _outcome(state, packed.name)

    def rollback(self, name: str, *, keep: bool = False) -> Outcome:
        """Make the previous default the default again; a second rollback comes back here. Raises NotServed without one."""
        with serving.rollout_lock(self._store):
            state = self._current()
            model = state.model(name)
            if model.previous is None:
                raise NotServed(
                    f"{name} {model.default} has no version before it to go back to",
                    remedy="deploy the version you want: marina deploy MAR",
                )
            (packed,) = model_store.select(self._store, [f"{name}:{model.previous.version}"])
            with self._reverting(f"{name} {model.default} is served as before") as undo:
                state = self._switch(state, packed, model.previous.workers, undo)
            if not keep:
                state = self._retire(state, name, model.default)
            return _outcome(state, name)

    def retire(self, name: str, version: str) -> Outcome:
        """Unregister a version that is not the default, after its last request. Raises NotServed for the default."""
        with serving.rollout_lock(self._store):
            return _outcome(self._retire(self._current(), name, version), name)

    def scale(self, name: str, workers: int, version: str | None = None) -> Outcome:
        """Set the number of workers of a version (the default one) on every replica."""
        with serving.rollout_lock(self._store):
            state = self._current()
            model = state.model(name)
            chosen = version or model.default
            if chosen not in model.versions:
                raise NotServed(f"{name} {chosen} is not served", remedy="`marina status` lists what is served")
            key, before = f"{name}:{chosen}", model.versions[chosen]
            after = state.with_version(name, chosen, workers)
            with self._reverting(f"{name} {chosen} has {before} workers as before") as undo:
                if workers < before:
                    self._write(after, state, undo)
                for replica in self._replicas:
                    undo.callback(self._undo, f"scale {key} to {before}", replica, partial(replica.scale, key, before))
                    with self._step(f"scale {key} to {workers}", replica):
                        replica.scale(key, workers)
                if workers >= before:
                    self._write(after, state, undo)
            return _outcome(after, name)

    # ---- the parts of a rollout

    def _verify(self, path: Path) -> Archive:
        with self._step(f"verify {path.name}"):
            report = verification.verify(path, python=self._python)
            if not report.passed:
                first = report.findings[0]
                raise ArchiveError(f"{path} is refused: {first.where}: {first.message}", remedy=first.remedy)
            return verification.identify(path, report)

    def _publish(self, verified: Archive, undo: contextlib.ExitStack) -> Archive:
        """The archive under its own file name in the store. Refused when that version is there with other bytes."""
        target = self._store / f"{verified.name}-{verified.version}.mar"
        for item in model_store.archives(self._store):
            if item.key == verified.key and (item.sha256 != verified.sha256 or item.path.name != target.name):
                raise _other_bytes(item.path, verified)
        if target.exists() and sha256_of(target) != verified.sha256:
            raise _other_bytes(target, verified)
        packed = Archive(target, verified.name, verified.version, verified.sha256, verified.size)
        with self._step(f"publish {target.name}"):
            if not target.exists():
                undo.callback(self._undo, f"remove {target.name}", None, lambda: target.unlink(missing_ok=True))
                _copy(verified.path, target)
            model_store.publish(self._store, packed)
        return packed

    def _own_workers(self, packed: Archive) -> int:
        (model,) = model_store.to_serve([packed])
        return model.workers

    def _switch(self, state: Serving, packed: Archive, workers: int, undo: contextlib.ExitStack) -> Serving:
        """Load and prove it everywhere, then make it the default everywhere."""
        key, name = packed.key, packed.name
        old = state.models.get(name)
        present = old is not None and packed.version in old.versions
        for replica in self._replicas:
            if not present:
                undo.callback(self._undo, f"unregister {key}", replica, partial(replica.retire, key))
            with self._step(f"load {key}, {workers} worker{'s' if workers != 1 else ''}", replica):
                replica.register(key, workers)
            with self._step(f"golden samples of {key} over HTTP", replica):
                replica.prove(key)
        loaded = state.with_version(name, packed.version, workers)
        self._write(loaded, state, undo)
        switched = loaded.with_default(name, packed.version)
        if switched != loaded:
            assert old is not None
            back = f"{name}:{old.default}"
            for replica in self._replicas:
                undo.callback(self._undo, f"default back to {back}", replica, partial(replica.set_default, back))
                with self._step(f"default is {key}", replica):
                    replica.set_default(key)
            self._write(switched, loaded, undo)
        return switched

    def _retire(self, state: Serving, name: str, version: str) -> Serving:
        """Not reverted when it fails: what it takes away is no longer asked for, and can be retired again."""
        after = state.without(name, version)
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

    def _write(self, after: Serving, before: Serving, undo: contextlib.ExitStack) -> None:
        undo.callback(
            self._undo, f"write {serving.SERVING_FILE} back", None, lambda: serving.write(self._store, before)
        )
        serving.write(self._store, after)

    # ---- telling and reverting

    @contextlib.contextmanager
    def _step(self, what: str, replica: Replica | None = None) -> Iterator[None]:
        started = time.monotonic()
        error = ""
        try:
            yield
        except BaseException as raised:
            error = str(raised) or type(raised).__name__
            raise
        finally:
            where = replica.name if replica is not None else ""
            step = Step(what=what, where=where, seconds=round(time.monotonic() - started, 3), error=error)
            self.steps.append(step)
            self._report(step)

    def _undo(self, what: str, replica: Replica | None, action: Callable[[], None]) -> None:
        """One way back. That it fails does not stop the others; the failed step says what is left."""
        with contextlib.suppress(MarinaError, OSError), self._step(f"revert: {what}", replica):
            action()

    @contextlib.contextmanager
    def _reverting(self, reverted: str) -> Iterator[contextlib.ExitStack]:
        """Keep what the block did, or, when it fails or is interrupted, take it back and say so."""
        undo = contextlib.ExitStack()
        try:
            yield undo
        except BaseException as error:
            done = len(self.steps)
            with _undisturbed():
                undo.close()
            failed = [step for step in self.steps[done:] if step.error]
            left = "; ".join(f"{step.what} {step.where}: {step.error}" for step in failed)
            state = f"could not be reverted: {left}" if failed else f"reverted, {reverted}"
            if isinstance(error, MarinaError):
                _amend(error, state)
            elif isinstance(error, KeyboardInterrupt):
                self._report(Step(what=f"interrupted; {state}", where="", seconds=0.0))
            raise
        else:
            undo.pop_all()


def _amend(error: MarinaError, state: str) -> None:
    error.args = (f"{error} ({state})", *error.args[1:])


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C must not leave a revert half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
