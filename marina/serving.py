"""`model_store/serving.json`: what is meant to be served, so that a restart comes back in the state of the last rollout.

Per model: the versions with their workers, the default one, and the default before it, for a rollback. Commands on the
host write it, one rollout at a time; the supervisor only reads it and follows its changes.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from marina import store as model_store
from marina.archive import NAME_PATTERN, VERSION_PATTERN
from marina.autoscale import Autoscale
from marina.client import ModelStatus
from marina.errors import ArchiveError, ClientError, StoreError
from marina.journal import Begun, Journal, sync_folder
from marina.server import ServedModel

SERVING_FILE = "serving.json"
LOCK_FILE = ".rollout.lock"
TRIAL_SUFFIX = "--tune"
"""Models whose names end so are registered for the time of a measurement (marina/tune.py) and never meant to stay."""
_SCALING_SECONDS = 15.0
"""How long a rollout waits for a server that is changing a number of workers by itself."""

Name = Annotated[str, StringConstraints(pattern=f"^{NAME_PATTERN.pattern}$", max_length=200)]
Version = Annotated[str, StringConstraints(pattern=f"^{VERSION_PATTERN.pattern}$", max_length=100)]
Workers = Annotated[int, Field(ge=1, le=1000, strict=True)]


class NotServed(ClientError):
    """A command names a model or a version that is not served, or asks for something the served state forbids."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Previous(_Frozen):
    """What a rollback goes back to."""

    version: Version
    workers: Workers


class ModelServing(_Frozen):
    """One model: the versions to serve, and which of them answers requests without a version."""

    default: Version
    versions: dict[Version, Workers]
    """Version -> workers."""
    previous: Previous | None = None
    """The default before this one; its archive is in the store, whether it is still served or not."""
    autoscale: Autoscale | None = None
    """Bounds between which each server changes the number of workers by itself; None: `versions` says how many."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.default not in self.versions:
            raise ValueError(f"the default {self.default} is not among the versions {', '.join(self.versions)}")
        if self.previous is not None and self.previous.version == self.default:
            raise ValueError(f"the previous version {self.default} is the default itself")
        return self


class Serving(_Frozen):
    """All models. Every change gives a new value; one that the rules forbid raises NotServed and changes nothing."""

    schema_version: Literal[1] = 1
    models: dict[Name, ModelServing] = {}

    def model(self, name: str) -> ModelServing:
        """Raises NotServed."""
        found = self.models.get(name)
        if found is None:
            served = ", ".join(self.models) or "none"
            raise NotServed(f"model '{name}' is not served; served: {served}", remedy="deploy it: marina deploy MAR")
        return found

    def with_version(self, name: str, version: str, workers: int) -> Serving:
        """Serve `version` with so many workers; it is the default only when it is the model's first."""
        old = self.models.get(name)
        if old is None:
            return self._with(name, ModelServing(default=version, versions={version: workers}))
        return self._with(name, _changed(old, versions={**old.versions, version: workers}))

    def with_default(self, name: str, version: str) -> Serving:
        """Send requests without a version to `version`; the old default becomes the previous one."""
        old = self._having(name, version)
        if version == old.default:
            return self
        previous = Previous(version=old.default, workers=old.versions[old.default])
        return self._with(name, _changed(old, default=version, previous=previous))

    def without(self, name: str, version: str) -> Serving:
        """No longer serve a version that is not the default. A rollback to it stays possible."""
        old = self._having(name, version)
        if version == old.default:
            raise NotServed(
                f"{name} {version} is the default version and answers all requests without one",
                remedy=f"deploy another version first, or go back: marina rollback {name}",
            )
        kept = {key: workers for key, workers in old.versions.items() if key != version}
        return self._with(name, _changed(old, versions=kept))

    def _having(self, name: str, version: str) -> ModelServing:
        found = self.model(name)
        if version not in found.versions:
            raise NotServed(
                f"{name} {version} is not served; served: {', '.join(found.versions)}",
                remedy="`marina status` lists what is served",
            )
        return found

    def _with(self, name: str, model: ModelServing) -> Serving:
        return Serving(models={**self.models, name: model})


def _changed(old: ModelServing, **values: object) -> ModelServing:
    """A validated copy; pydantic's own copy would not check the rules."""
    return ModelServing(**{**{field: getattr(old, field) for field in ModelServing.model_fields}, **values})


def adopted(known: Serving | None, seen: Sequence[ModelStatus]) -> Serving:
    """The file's content brought in line with what a server was seen to serve, which wins.

    Models that this server does not serve stay as the file has them, and trials of the tuner stay out; previous versions
    are the file's, and so is a number of workers that are all ready beside an entry that the watchdog has replaced.
    """
    models = dict(known.models) if known is not None else {}
    for name in {status.name for status in seen if not status.name.endswith(TRIAL_SUFFIX)}:
        found = {status.version: status for status in seen if status.name == name and (status.workers or status.asleep)}
        default = next((version for version, status in found.items() if status.default), None)
        if default is None:
            continue
        before = models.get(name)
        previous = before.previous if before is not None else None
        meant = before.versions if before is not None else {}
        models[name] = ModelServing(
            default=default,
            versions={
                version: status.ready_workers
                if status.ready_workers == meant.get(version)
                else len(status.workers) or meant.get(version, 1)  # the latter when it is asleep
                for version, status in found.items()
            },
            previous=previous if previous is not None and previous.version != default else None,
            autoscale=before.autoscale if before is not None else None,
        )
    return Serving(models=models)


def read(store: Path) -> Serving | None:
    """What the store's file says; None when there is no such file. Raises StoreError when it is damaged."""
    path = store / SERVING_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} cannot be read: {error}", remedy="check its permissions") from error
    try:
        return Serving.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StoreError(
            f"{path} is damaged: {where}: {first['msg']}" if where else f"{path} is damaged: {first['msg']}",
            remedy="correct it, or delete it to serve the newest version of each archive",
        ) from error


def write(store: Path, serving: Serving) -> None:
    """Replace the file: whoever reads it, whenever this process or the machine dies, sees the old or the new state.

    Raises StoreError when it cannot be written.
    """
    values = serving.model_dump(mode="json")
    for model in values["models"].values():
        if model["autoscale"] is None:
            del model["autoscale"]
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    try:
        _replace(store, text)
    except OSError as error:
        raise StoreError(
            f"{store / SERVING_FILE} cannot be written: {error.strerror}", remedy="make room on its disk, or allow it"
        ) from error


def _replace(store: Path, text: str) -> None:
    partial = store / f".{SERVING_FILE}.partial"  # the only writer holds the rollout lock
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.chmod(0o644)  # read by the server's own user in its container
    partial.replace(store / SERVING_FILE)
    sync_folder(store)


@contextmanager
def rollout_lock(store: Path) -> Iterator[None]:
    """One rollout at a time per store. Raises NotServed when another one holds it; a killed one does not."""
    store.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(store / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        ends = time.monotonic() + _SCALING_SECONDS
        while not _locked(descriptor, fcntl.LOCK_EX):
            # Shared: a server that is about to change a number of workers by itself, which is soon done.
            if not _locked(descriptor, fcntl.LOCK_SH) or time.monotonic() > ends:
                raise NotServed(
                    f"another rollout is at work on {store}", remedy="wait until it has ended, then look: marina status"
                )
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def scaling(store: Path) -> Iterator[bool]:
    """While the block lasts no rollout begins; False when one is at work. Needs no right to write."""
    try:
        descriptor = os.open(store / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield True  # nobody has ever rolled anything out here
        return
    try:
        yield _locked(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def in_progress(store: Path) -> bool:
    """Whether a rollout holds the lock at this moment. Needs no right to write."""
    try:
        descriptor = os.open(store / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def state_of(value: Mapping[str, Any] | None) -> ModelServing | None:
    """A model's state as a journal has it. Raises StoreError."""
    if value is None:
        return None
    try:
        return ModelServing.model_validate(value)
    except ValidationError as error:
        raise StoreError(
            f"the journal of rollouts holds no state of a model: {error.errors()[0]['msg']}",
            remedy="look at what is served (marina status), then remove rollouts.jsonl",
        ) from error


def settled(serving: Serving | None, begun: Begun) -> Serving:
    """What the file has to say once an interrupted rollout was finished or taken back."""
    state = state_of(begun.after if begun.committed else begun.before)
    models = {name: model for name, model in (serving or Serving()).models.items() if name != begun.name}
    return Serving(models=models | ({begun.name: state} if state is not None else {}))


def to_serve(store: Path, serving: Serving) -> list[ServedModel]:
    """What the supervisor needs to know of each version. Raises StoreError when an archive is missing or was changed."""
    wanted = [f"{name}:{version}" for name, model in serving.models.items() for version in model.versions]
    if not wanted:
        return []
    found = model_store.to_serve(model_store.select(store, wanted))
    return [_as_meant(item, serving.models[item.name]) for item in found]


def _as_meant(item: ServedModel, model: ModelServing) -> ServedModel:
    workers = model.versions[item.version]
    most = item.config.get("maxWorkers", workers)
    config = {**item.config, "minWorkers": workers, "maxWorkers": max(workers, most)}
    default = item.version == model.default
    return dataclasses.replace(item, default=default, config=config, autoscale=model.autoscale)


class Following:
    """What a running supervisor should expect: what it was started with, until a rollout writes the file; then that.

    Call it as often as you like: the file is read again only when it was replaced. While it cannot be read, the last
    state it gave stays.
    """

    def __init__(self, store: Path, started_with: Sequence[ServedModel]) -> None:
        self._store = store
        self._models: Sequence[ServedModel] = tuple(started_with)
        self._seen = self._stamp()

    def __call__(self) -> Sequence[ServedModel]:
        stamp = self._stamp()
        if stamp != self._seen and stamp is not None:
            try:
                serving = read(self._store)
                self._models = tuple(to_serve(self._store, serving)) if serving is not None else self._models
            except (ArchiveError, OSError):
                return self._models  # looked at again the next time
            self._seen = stamp
        return self._models

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = (self._store / SERVING_FILE).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


def at_start(store: Path) -> list[ServedModel]:
    """What `marina serve` without names serves: what rollouts left, and the newest version of every other name.

    A rollout that was killed counts as finished or taken back (`marina.journal`); nothing is written, since the store may
    be mounted read-only: the next command on it settles the files. Raises StoreError when there is nothing, or when an
    archive is missing or was changed.
    """
    serving = read(store)
    begun = Journal(store).unfinished()
    unproved = None
    if begun is not None and not in_progress(store):
        serving = settled(serving, begun)
        unproved = begun.published if not begun.committed else None
    known = to_serve(store, serving) if serving is not None else []
    names = {model.name for model in known}
    items = [item for item in model_store.archives(store) if item.path.name != unproved]
    newest = {item.name: item for item in items if item.name not in names}
    if not known and not newest:
        model_store.select(store, [])  # says so when the store is empty
        raise StoreError(
            f"the only archive in {store} is {unproved}, which a rollout left unproved when it was killed",
            remedy=f"serve it by its name, then: marina deploy {store / str(unproved)}",
        )
    return known + model_store.to_serve(list(newest.values()))
