"""The commands that change what is served, and the one that shows it: deploy, rollback, retire, scale, recover, drain,
status."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from marina import lifeline, plan_cli, remote, serving
from marina import store as model_store
from marina.canary import Stages
from marina.client import ModelStatus
from marina.errors import ConfigError, MarinaError
from marina.gates import Gates
from marina.home import find_home
from marina.journal import Journal
from marina.processes import interruptible
from marina.reach import Reached, reach
from marina.remote import Target
from marina.replica import LocalReplica, Replica
from marina.rollout import Outcome, Rollout, Step, Trial
from marina.screen import Screen
from marina.settings import OTHER_VARIABLES, ServeSettings
from marina.shadow import read_recorded

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
Retire = Annotated[
    bool, typer.Option("--retire", help="Do not keep the replaced version loaded: less memory, no quick rollback.")
]
GatewayFolder = Annotated[
    Path | None, typer.Option("--gateway-folder", help="Folder that a gateway of this machine reads its clients from.")
]
GatewayLog = Annotated[Path | None, typer.Option("--gateway-log", help="Access log of that gateway.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (deploy, rollback, retire, scale, recover, drain, status):
        app.command()(command)
    app.command(hidden=True)(replica)
    plan_cli.register(app)


def deploy(
    mar: Annotated[str, typer.Argument(help="An archive: a file, NAME or NAME:VERSION of model_store/.")],
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="As the replaced version by default.")] = None,
    retire: Retire = False,
    shadow: Annotated[
        list[Path] | None,
        typer.Option(
            "--shadow", help="Recorded inputs for the comparison: a folder of files, or .jsonl with b64/file."
        ),
    ] = None,
    sample_seconds: Annotated[
        float, typer.Option(min=0, help="How long live inputs are gathered for the comparison; 0: none.")
    ] = 3.0,
    canary: Annotated[
        str, typer.Option("--canary", help="Shares of the requests through the gateway, in per cent; or none.")
    ] = "1,5,25,100",
    canary_seconds: Annotated[float, typer.Option(min=0.1, help="Each share lasts at least so long.")] = 5.0,
    canary_requests: Annotated[int, typer.Option(min=1, help="And until so many were answered,")] = 20,
    canary_longest: Annotated[float, typer.Option(min=0.1, help="but no longer than so many seconds.")] = 30.0,
    max_error_rate: Annotated[float, typer.Option(min=0, max=1, help="Gate: share of failed requests.")] = 0.01,
    max_p99_ratio: Annotated[float, typer.Option(min=1, help="Gate: p99 latency over the old version's.")] = 2.0,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Gate: share of inputs with the old version's label; 0: none.")
    ] = 0.8,
    target: TargetOption = "auto",
    url: ManagementUrl = None,
    inference_url: InferenceUrl = None,
    supervisor_url: SupervisorUrl = None,
    gateway_folder: GatewayFolder = None,
    gateway_log: GatewayLog = None,
    store: Store = None,
    python: Annotated[str, typer.Option("--python", help="The interpreter that verifies it.")] = sys.executable,
    as_json: Json = False,
) -> None:
    """Verify an archive, load it beside the old version, prove it, compare it, give it a growing share, switch to it.

    A gate that fails reverts everything and is named. The old version stays loaded for `marina rollback`.
    """
    gates = Gates(max_error_rate=max_error_rate, max_p99_ratio=max_p99_ratio, min_agreement=min_agreement)
    trial = Trial(
        gates=gates,
        recorded=read_recorded(shadow or ()),
        sample_seconds=sample_seconds,
        stages=_stages(canary, canary_seconds, canary_requests, canary_longest),
    )
    reached = reach(
        target, url=url, inference_url=inference_url, supervisor_url=supervisor_url, store=store,
        gateway_folder=gateway_folder, gateway_log=gateway_log, needs="inference",
    )  # fmt: skip
    with _rolling(reached, as_json, python, trial) as rollout:
        path = Path(mar)
        if path.suffix != ".mar" and not path.is_file():
            path = model_store.select(reached.store, [mar])[0].path
        _done(rollout, as_json, rollout.deploy(path, workers=workers, retire=retire))


def rollback(
    name: Annotated[str, typer.Argument(help="Model name.")],
    retire: Retire = False,
    target: TargetOption = "auto",
    url: ManagementUrl = None,
    inference_url: InferenceUrl = None,
    supervisor_url: SupervisorUrl = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Go back to the version that was the default before: at once while it is loaded. A second rollback comes back."""
    reached = reach(
        target, url=url, inference_url=inference_url, supervisor_url=supervisor_url, store=store, needs="inference"
    )
    with _rolling(reached, as_json) as rollout:
        _done(rollout, as_json, rollout.rollback(name, retire=retire))


def recover(
    as_it_is: Annotated[
        bool, typer.Option("--as-it-is", help="Leave the servers as they are and take that for what is meant.")
    ] = False,
    target: TargetOption = "auto",
    url: ManagementUrl = None,
    inference_url: InferenceUrl = None,
    supervisor_url: SupervisorUrl = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Finish or take back a rollout that was killed. Every command that changes something does so first."""
    screen = Screen(as_json)
    reached = reach(
        target, url=url, inference_url=inference_url, supervisor_url=supervisor_url, store=store, needs="inference"
    )
    with _rolling(reached, as_json) as rollout:
        done = rollout.recover(as_it_is=as_it_is)
        screen.result({"recovered": done, "steps": [dataclasses.asdict(step) for step in rollout.steps]})
        screen.say(done or "nothing to recover: no rollout was killed")


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
    reached = reach(target, url=url, inference_url=inference_url, store=store)
    with _rolling(reached, as_json) as rollout:
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
    reached = reach(target, url=url, inference_url=inference_url, store=store)
    with _rolling(reached, as_json) as rollout:
        _done(rollout, as_json, rollout.scale(name, workers, version))


def drain(
    name: Annotated[
        str | None,
        typer.Option("--replica", help="Which one, as `marina status` names it; needed when there are more."),
    ] = None,
    target: TargetOption = "auto",
    url: ManagementUrl = None,
    supervisor_url: SupervisorUrl = None,
    as_json: Json = False,
) -> None:
    """Have one server answer what it has accepted, and stop: not ready at once, no request cut off."""
    screen = Screen(as_json)
    found = _one_of(reach(target, url=url, supervisor_url=supervisor_url, needs="supervisor").replicas, name)
    found.drain()
    screen.say(f"{found.name} drains and stops")
    screen.result({"draining": [found.name]})


def status(
    target: TargetOption = "auto",
    url: ManagementUrl = None,
    supervisor_url: SupervisorUrl = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Which models and versions are served, with their workers and queues."""
    screen, reached = Screen(as_json), reach(target, url=url, supervisor_url=supervisor_url, store=store)
    rows = [(found.name, model) for found in reached.replicas for model in found.status()]
    meant = serving.read(reached.store)
    previous = {} if meant is None else {name: model.previous for name, model in meant.models.items() if model.previous}
    begun = None if serving.in_progress(reached.store) else Journal(reached.store).unfinished()
    screen.result(
        {"models": [_model_fields(name, model) for name, model in rows], "unfinished": begun.words if begun else ""}
    )
    screen.table(
        ("replica", "model", "version", "default", "ready", "workers", "queued", "batch"),
        [(name, *_cells(model)) for name, model in rows],
    )
    for name, model in rows:
        if model.autoscale is not None:
            found = model.autoscale
            screen.say(f"{name}: {model.name} {model.version} has {found['min']} to {found['max']}: {found['reason']}")
    for name, before in previous.items():
        screen.say(f"marina rollback {name} goes back to {before.version}")
    if begun is not None:
        screen.note(
            f"a {begun.words} was killed: marina recover settles it, as every command that changes something does"
        )


def replica(
    action: Annotated[str, typer.Argument()], arguments: Annotated[list[str] | None, typer.Argument()] = None
) -> None:
    """One action on the server of this very machine or container; how rollouts reach into containers. JSON only."""
    given = lifeline.follow()
    screen = Screen(as_json=True)
    settings = ServeSettings.load({"config": find_home().config}, os.environ, other_variables=OTHER_VARIABLES)
    here = LocalReplica(
        store=find_home().store,
        inference_url=settings.url("inference"),
        management_url=settings.url("management"),
        supervisor_url=settings.url("supervisor"),
    )
    try:
        screen.result(remote.run_action(here, action, arguments or [], given))
    except MarinaError as error:
        screen.failure(error)
        raise typer.Exit(error.exit_code) from None


def _one_of(replicas: Sequence[Replica], name: str | None) -> Replica:
    names = ", ".join(found.name for found in replicas)
    if name is None and len(replicas) > 1:
        raise ConfigError(
            f"there are {len(replicas)} replicas: {names}",
            remedy="give --replica NAME; `marina down` stops all of them",
        )
    for found in replicas:
        if name in (None, found.name):
            return found
    raise ConfigError(f"there is no replica '{name}'", remedy=f"give one of {names}")


def _stages(percents: str, seconds: float, requests: int, longest: float) -> Stages | None:
    if percents == "none":
        return None
    try:
        shares = tuple(float(part) for part in percents.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share <= 100 for share in shares) or list(shares) != sorted(set(shares)):
        raise ConfigError(
            f"--canary {percents}: growing shares in per cent are expected", remedy="write e.g. 1,5,25,100, or none"
        )
    return Stages(percents=shares, seconds=seconds, requests=requests, longest_seconds=max(longest, seconds))


@contextmanager
def _rolling(
    reached: Reached, as_json: bool, python: str = sys.executable, trial: Trial | None = None
) -> Iterator[Rollout]:
    """A rollout that tells its steps; SIGTERM and a lost terminal revert like Ctrl-C."""
    screen = Screen(as_json)

    def tell(step: Step) -> None:
        where = f"{step.where}: " if step.where else ""
        state = f"FAILED: {step.error}" if step.error else f"{step.seconds:.1f} s"
        screen.say(f"{where}{step.what}  {state}")
        if step.found:
            screen.say(f"    {step.found}")

    rollout = Rollout(reached.replicas, reached.store, python=python, report=tell, front=reached.front, trial=trial)
    with interruptible():
        yield rollout


def _done(rollout: Rollout, as_json: bool, outcome: Outcome) -> None:
    screen = Screen(as_json)
    steps = [dataclasses.asdict(step) for step in rollout.steps]
    gates = [dataclasses.asdict(verdict) for verdict in rollout.verdicts]
    screen.result(dataclasses.asdict(outcome) | {"steps": steps, "gates": gates})
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
