"""The commands that change what is served, and the one that shows it: deploy, rollback, retire, scale, drain, status."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from marina import remote, serving
from marina import store as model_store
from marina.client import ModelStatus
from marina.errors import MarinaError
from marina.home import find_home
from marina.remote import ContainerReplica, Target
from marina.replica import LocalReplica, Replica
from marina.rollout import Outcome, Rollout, Step
from marina.screen import Screen
from marina.settings import OTHER_VARIABLES, ServeSettings

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
TargetOption = Annotated[
    Target, typer.Option("--target", help="auto: the compose stack of this folder when it runs, else the local server.")
]
ManagementUrl = Annotated[
    str | None, typer.Option("--url", envvar="MARINA_MANAGEMENT_URL", help="Management address of a local server.")
]
InferenceUrl = Annotated[
    str | None, typer.Option("--inference-url", envvar="MARINA_URL", help="Inference address of a local server.")
]
SupervisorUrl = Annotated[str | None, typer.Option("--supervisor-url", help="Supervisor address of a local server.")]
Store = Annotated[Path | None, typer.Option("--store", help="Another model store.")]
Keep = Annotated[bool, typer.Option("--keep", help="Keep the version that is replaced loaded.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (deploy, rollback, retire, scale, drain, status):
        app.command()(command)
    app.command(hidden=True)(replica)


def deploy(
    mar: Annotated[str, typer.Argument(help="An archive: a file, NAME or NAME:VERSION of model_store/.")],
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="As the replaced version by default.")] = None,
    keep: Keep = False,
    target: TargetOption = "auto",
    url: ManagementUrl = None,
    inference_url: InferenceUrl = None,
    supervisor_url: SupervisorUrl = None,
    store: Store = None,
    python: Annotated[str, typer.Option("--python", help="The interpreter that verifies it.")] = sys.executable,
    as_json: Json = False,
) -> None:
    """Verify an archive, load it beside the old version, prove it, switch to it, retire the old one. Reverts on failure."""
    reached = _reach(target, url, inference_url, supervisor_url, store)
    with _rolling(reached, as_json, python) as rollout:
        path = Path(mar)
        if path.suffix != ".mar" and not path.exists():
            path = model_store.select(reached.store, [mar])[0].path
        _done(rollout, as_json, rollout.deploy(path, workers=workers, keep=keep))


def rollback(
    name: Annotated[str, typer.Argument(help="Model name.")],
    keep: Keep = False,
    target: TargetOption = "auto",
    url: ManagementUrl = None,
    inference_url: InferenceUrl = None,
    supervisor_url: SupervisorUrl = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Go back to the version that was the default before. A second rollback comes back."""
    with _rolling(_reach(target, url, inference_url, supervisor_url, store), as_json) as rollout:
        _done(rollout, as_json, rollout.rollback(name, keep=keep))


def retire(
    version: Annotated[str, typer.Argument(metavar="NAME:VERSION", help="What to unregister; not the default.")],
    target: TargetOption = "auto",
    url: ManagementUrl = None,
    inference_url: InferenceUrl = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Unregister a version that is not the default, once it has answered everything."""
    name, separator, number = version.partition(":")
    if not separator or not number:
        raise typer.BadParameter("write it as NAME:VERSION, e.g. digits:1.0")
    with _rolling(_reach(target, url, inference_url, None, store), as_json) as rollout:
        _done(rollout, as_json, rollout.retire(name, number))


def scale(
    name: Annotated[str, typer.Argument(help="Model name.")],
    workers: Annotated[int, typer.Argument(min=1, help="Number of workers, per replica.")],
    version: Annotated[str | None, typer.Option("--version", help="Model version (its default one otherwise).")] = None,
    target: TargetOption = "auto",
    url: ManagementUrl = None,
    inference_url: InferenceUrl = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Set the number of a model's workers and wait until they are ready. Workers end only when they have nothing in hand."""
    with _rolling(_reach(target, url, inference_url, None, store), as_json) as rollout:
        _done(rollout, as_json, rollout.scale(name, workers, version))


def drain(
    target: TargetOption = "auto",
    url: ManagementUrl = None,
    supervisor_url: SupervisorUrl = None,
    as_json: Json = False,
) -> None:
    """Have the server answer what it has accepted, and stop: not ready at once, no request cut off."""
    screen, reached = Screen(as_json), _reach(target, url, None, supervisor_url, None)
    for found in reached.replicas:
        found.drain()
        screen.say(f"{found.name} drains and stops")
    screen.result({"draining": [found.name for found in reached.replicas]})


def status(
    target: TargetOption = "auto",
    url: ManagementUrl = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Which models and versions are served, with their workers and queues."""
    screen, reached = Screen(as_json), _reach(target, url, None, None, store)
    rows = [(found.name, model) for found in reached.replicas for model in found.status()]
    meant = serving.read(reached.store)
    previous = {} if meant is None else {name: model.previous for name, model in meant.models.items() if model.previous}
    screen.result({"models": [_model_fields(name, model) for name, model in rows]})
    screen.table(
        ("replica", "model", "version", "default", "ready", "workers", "queued", "batch"),
        [(name, *_cells(model)) for name, model in rows],
    )
    for name, before in previous.items():
        screen.say(f"marina rollback {name} goes back to {before.version}")


def replica(
    action: Annotated[str, typer.Argument()], arguments: Annotated[list[str] | None, typer.Argument()] = None
) -> None:
    """One action on the server of this very machine or container; how rollouts reach into containers. JSON only."""
    screen = Screen(as_json=True)
    settings = ServeSettings.load({"config": find_home().config}, os.environ, other_variables=OTHER_VARIABLES)
    here = LocalReplica(
        store=find_home().store,
        inference_url=settings.url("inference"),
        management_url=settings.url("management"),
        supervisor_url=settings.url("supervisor"),
    )
    try:
        screen.result(remote.run_action(here, action, arguments or []))
    except MarinaError as error:
        screen.failure(error)
        raise typer.Exit(error.exit_code) from None


@dataclasses.dataclass(frozen=True, slots=True)
class _Reached:
    replicas: Sequence[Replica]
    store: Path


def _reach(
    target: Target, url: str | None, inference_url: str | None, supervisor_url: str | None, store: Path | None
) -> _Reached:
    """An address that was given means that server, whatever else runs."""
    home = find_home()
    folder = store or home.store
    settings = ServeSettings.load({"config": home.config}, os.environ, other_variables=OTHER_VARIABLES)
    management_url = url or settings.url("management")
    local = LocalReplica(
        store=folder,
        inference_url=inference_url or settings.url("inference"),
        management_url=management_url,
        supervisor_url=supervisor_url or settings.url("supervisor"),
    )
    chosen: Target = "local" if target == "auto" and (url or supervisor_url) else target
    found = remote.find_replicas(chosen, local, management_url=management_url, project=home.root)
    mounted = next((item.store for item in found if store is None and isinstance(item, ContainerReplica)), folder)
    return _Reached(found, mounted)


@contextmanager
def _rolling(reached: _Reached, as_json: bool, python: str = sys.executable) -> Iterator[Rollout]:
    """A rollout that tells its steps; SIGTERM and a lost terminal revert like Ctrl-C."""
    screen = Screen(as_json)

    def tell(step: Step) -> None:
        where = f"{step.where}: " if step.where else ""
        state = f"FAILED: {step.error}" if step.error else f"{step.seconds:.1f} s"
        screen.say(f"{where}{step.what}  {state}")

    rollout = Rollout(reached.replicas, reached.store, python=python, report=tell)
    with _interruptible():
        yield rollout


@contextmanager
def _interruptible() -> Iterator[None]:
    def interrupt(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _done(rollout: Rollout, as_json: bool, outcome: Outcome) -> None:
    screen = Screen(as_json)
    steps = [dataclasses.asdict(step) for step in rollout.steps]
    screen.result(dataclasses.asdict(outcome) | {"steps": steps})
    versions = ", ".join(f"{version} ({count} workers)" for version, count in outcome.versions.items())
    screen.say(f"{outcome.name}: default {outcome.default}; served: {versions}")
    if outcome.previous:
        screen.say(f"back to {outcome.previous}: marina rollback {outcome.name}")


def _model_fields(name: str, model: ModelStatus) -> dict[str, Any]:
    return {"replica": name} | dataclasses.asdict(model) | {"ready_workers": model.ready_workers}


def _cells(model: ModelStatus) -> tuple[object, ...]:
    return (
        model.name,
        model.version,
        "yes" if model.default else "",
        model.ready_workers,
        len(model.workers),
        model.pending,
        model.batch_size,
    )
