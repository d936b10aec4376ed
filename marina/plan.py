"""`deploy.toml`: what is to be served, on one host or on several, and what differs from it.

[models.digits]
default = "2.0"                        # answers requests without a version
versions = { "1.0" = 1, "2.0" = 2 }    # workers per replica; "2.0" = { workers = 2, archive = "dist/digits-2.0.mar" }

[models.digits.autoscale]              # then the numbers above are those to begin with; see marina/autoscale.py
min = 0                                # workers of each version, per replica; 0: none after idle_seconds without work
max = 4

[limits]
workers = 8                            # of all models together, per replica

[gates]                                # for a new default version: see marina deploy --help
min_agreement = 0.9

[hosts.gpu1]                           # without any host: the stack of this folder, or the server of this machine
ssh = "ops@gpu1"                       # Marina runs there too, with a store and a journal of its own
models = ["digits"]                    # all of them when not given
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from handlerlib.spec import closest
from marina.autoscale import Autoscale
from marina.canary import Stages
from marina.client import ModelStatus
from marina.errors import ConfigError
from marina.gates import Gates
from marina.remote import Target
from marina.rollout import batching_of, has_workers, is_stale
from marina.serving import TRIAL_SUFFIX, ModelServing, Name, Previous, Serving, Version, Workers

PLAN_FILE = "deploy.toml"
_SSH = ("ssh", "-oBatchMode=yes", "-oConnectTimeout=5", "-oServerAliveInterval=5", "-oServerAliveCountMax=3")
"""A host that does not answer, or stops to, is an error within seconds."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VersionPlan(_Frozen):
    """One version of a model."""

    workers: Workers
    """On every replica."""
    archive: Path | None = None
    """From where it gets into the model store; not needed when it is there. Relative to the file."""


def _from_workers(value: Any) -> Any:
    return {"workers": value} if isinstance(value, int) and not isinstance(value, bool) else value


class ModelPlan(_Frozen):
    """One model. Versions that are not named are retired."""

    default: Version
    versions: dict[Version, Annotated[VersionPlan, BeforeValidator(_from_workers)]] = Field(min_length=1)
    autoscale: Autoscale | None = None
    """Bounds between which each server changes the number of workers by itself."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.default not in self.versions:
            raise ValueError(f"the default {self.default} is not among the versions {', '.join(self.versions)}")
        for version, plan in self.versions.items():
            if self.autoscale is not None and self.autoscale.clamped(plan.workers) != plan.workers:
                bounds = f"{self.autoscale.min} to {self.autoscale.max}"
                raise ValueError(f"version {version} begins with {plan.workers} workers, autoscale allows {bounds}")
        return self

    @property
    def most_workers(self) -> int:
        """Of all versions together."""
        return sum(self.autoscale.max if self.autoscale else plan.workers for plan in self.versions.values())


class Limits(_Frozen):
    """What all models together may take."""

    workers: Workers | None = None
    """Per replica."""


class Host(_Frozen):
    """One machine. With `ssh` or `program` Marina is called there; else from here."""

    ssh: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@:\[\]-]*$")
    """For the ssh program, e.g. ops@gpu1; Marina is `marina` on that user's path."""
    program: tuple[str, ...] | None = None
    """Marina's program and its first arguments, in place of ssh."""
    target: Target = "auto"
    url: str | None = None
    inference_url: str | None = None
    supervisor_url: str | None = None
    store: Path | None = None
    gateway_folder: Path | None = None
    gateway_log: Path | None = None
    models: tuple[Name, ...] | None = None
    """Which of the models; None: all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ssh and self.program:
            raise ValueError("give either ssh, as user@host, or program")
        return self

    @property
    def elsewhere(self) -> tuple[str, ...] | None:
        """How Marina is called there; None: it is this process."""
        return (*_SSH, self.ssh, "marina") if self.ssh else self.program


class Desired(_Frozen):
    """The whole file."""

    models: dict[Name, ModelPlan] = {}
    limits: Limits = Limits()
    gates: Gates = Gates()
    canary: Stages = Stages()
    hosts: dict[str, Host] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.models:
            if name.endswith(TRIAL_SUFFIX):
                raise ValueError(f"models.{name}: names that end in {TRIAL_SUFFIX} belong to `marina tune`")
        for name, host in self.hosts.items():
            for model in host.models or ():
                if model not in self.models:
                    raise ValueError(f"host {name} names the model '{model}', which is not in the file")
        for name in self.hosts or ("",):
            wanted = sum(model.most_workers for model in self.on(name).values())
            if self.limits.workers is not None and wanted > self.limits.workers:
                where = f"{name}: " if name else ""
                most = " at most" if any(model.autoscale for model in self.on(name).values()) else ""
                raise ValueError(
                    f"{where}{wanted} workers are wanted{most} per replica, limits.workers is {self.limits.workers}"
                )
        return self

    def on(self, host: str) -> Mapping[str, ModelPlan]:
        """The models of one host."""
        chosen = self.hosts[host].models if host in self.hosts else None
        return self.models if chosen is None else {name: self.models[name] for name in chosen}


def read(path: Path) -> Desired:
    """Raises ConfigError naming the first thing wrong, and the nearest known key for an unknown one."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path), path.parent)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}",
            remedy="write one; README.md shows how: Scale with the load",
        ) from error


def parse(text: str, where: str, folder: Path) -> Desired:
    """The text of a deploy.toml, or the same as JSON; archives are relative to `folder`."""
    try:
        values = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
        found = Desired.model_validate(values)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{where}: {error}", remedy="correct the file") from error
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(error)}", remedy=_hint(error)) from error
    return found.model_copy(update={"models": {name: _beside(model, folder) for name, model in found.models.items()}})


def _beside(model: ModelPlan, folder: Path) -> ModelPlan:
    versions = {
        version: plan if plan.archive is None else plan.model_copy(update={"archive": folder / plan.archive})
        for version, plan in model.versions.items()
    }
    return model.model_copy(update={"versions": versions})


def _first_problem(error: ValidationError) -> str:
    first = _first(error)
    where = ".".join(str(part) for part in first["loc"])
    text = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def _first(error: ValidationError) -> Mapping[str, Any]:
    """An unknown key before the one that is missing in its place."""
    found = error.errors()
    return next((item for item in found if item["type"] == "extra_forbidden"), found[0])


def _hint(error: ValidationError) -> str:
    first = _first(error)
    if first["type"] != "extra_forbidden":
        return "correct it"
    tables: Mapping[tuple[str, int], type[BaseModel]] = {
        ("models", 3): ModelPlan, ("models", 5): VersionPlan, ("hosts", 3): Host,
        ("models", 4): Autoscale, ("limits", 2): Limits, ("gates", 2): Gates, ("canary", 2): Stages,
    }  # fmt: skip
    known = tables.get((str(first["loc"][0]), len(first["loc"])), Desired).model_fields
    near = closest(str(first["loc"][-1]), known)
    return near.removeprefix(", ") if near else f"known keys: {', '.join(known)}"


# ---------------------------------------------------------------------------------------------------------- differences


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One thing that is not as it is meant."""

    replica: str
    model: str
    what: str
    """`default`, `VERSION workers`, `VERSION batch`, or `model` for one that is not in the file."""
    wanted: str
    found: str


def differences(
    replica: str,
    name: str,
    plan: ModelPlan,
    seen: Sequence[ModelStatus],
    batching: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> list[Difference]:
    """Between what is meant of a model and what one replica serves; `batching` is what the archives ask for
    (`store.batching`)."""
    found = {status.version: status for status in seen if status.name == name}
    default = next((version for version, status in found.items() if status.default), "none")
    rows = []
    if default != plan.default:
        rows.append(("default", plan.default, default))
    for version in dict.fromkeys((*plan.versions, *found)):
        wanted = plan.versions[version].workers if version in plan.versions else 0
        status = found.get(version)
        if status is None or (version not in plan.versions) or not has_workers(status, wanted, plan.autoscale):
            bounds = f"{plan.autoscale.min} to {plan.autoscale.max}" if plan.autoscale else str(wanted)
            rows.append(
                (
                    f"{version} workers",
                    bounds if version in plan.versions else "not served",
                    _count(status is not None, _seen(status)),
                )
            )
        if status is not None and version in plan.versions and is_stale(status, batching):
            rows.append((f"{version} batch", _batch(batching[version]), _batch(batching_of(status))))
    return [
        Difference(replica=replica, model=name, what=what, wanted=wanted, found=seen) for what, wanted, seen in rows
    ]


def not_in_file(
    replica: str, meant: Collection[str], at_home: Collection[str], seen: Sequence[ModelStatus]
) -> list[Difference]:
    """Models that neither the file names nor `marina serve` would serve by itself: `at_home` are those that rollouts have
    left and that lie in the store. The tuner's go by themselves."""
    names = {item.name for item in seen if not item.name.endswith(TRIAL_SUFFIX)} - {*meant, *at_home}
    return [
        Difference(replica=replica, model=name, what="model", wanted="not served", found="served")
        for name in sorted(names)
    ]


def _batch(values: tuple[int, int]) -> str:
    return f"{values[0]}, {values[1]} ms"


def _seen(status: ModelStatus | None) -> int:
    return 0 if status is None else len(status.workers)


def _count(present: bool, workers: int) -> str:
    return str(workers) if present else "not served"


def target(plan: ModelPlan, known: ModelServing | None) -> ModelServing:
    """What `serving.json` will say; where a rollback goes stays, or is the default that is left."""
    previous = known.previous if known is not None else None
    if known is not None and known.default != plan.default:
        previous = Previous(version=known.default, workers=known.versions[known.default])
    if previous is not None and previous.version == plan.default:
        previous = None
    versions = {version: item.workers for version, item in plan.versions.items()}
    if plan.autoscale is not None and known is not None:  # the numbers that the servers have come to
        versions |= {
            version: workers
            for version, workers in known.versions.items()
            if version in versions and plan.autoscale.allows(workers)
        }
    return ModelServing(default=plan.default, versions=versions, previous=previous, autoscale=plan.autoscale)


def as_known(known: ModelServing) -> ModelPlan:
    """The plan that leaves a model as it was left; its workers may have gone below what a file may ask for."""
    versions = {version: VersionPlan.model_construct(workers=workers) for version, workers in known.versions.items()}
    return ModelPlan.model_construct(default=known.default, versions=versions, autoscale=known.autoscale)


def is_new_default(name: str, plan: ModelPlan, known: Serving | None, seen: Sequence[ModelStatus]) -> bool:
    """Whether a version that was not accepted before takes over from one that serves: then it is tried like any deploy.

    Not when only the servers have been tampered with, nor on the way back to the version before.
    """
    held = known.models.get(name) if known is not None else None
    if held is None or held.default == plan.default or (held.previous and held.previous.version == plan.default):
        return False
    return any(status.name == name and status.version == held.default for status in seen)
