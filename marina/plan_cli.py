"""The commands of `deploy.toml`: what would be done (plan), what differs (diff), and doing it (apply), on every host."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from marina import plan as plans
from marina import serving
from marina import store as model_store
from marina.client import ModelStatus
from marina.errors import ClientError, ConfigError, MarinaError
from marina.home import find_home
from marina.plan import PLAN_FILE, Desired, Difference, Host, ModelPlan
from marina.reach import Reached, reach
from marina.rollout import Rollout, Step, Trial
from marina.screen import Screen
from marina.serving import Serving

INCOMING = "incoming"
"""Folder below the model store of another host, where archives arrive; `apply` verifies them before they are served."""
_ELSEWHERE_SECONDS = 1800.0
_WAITS = (2.0, 5.0, 10.0, 30.0)
"""Seconds after one failed repair to the next one."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
PlanFile = Annotated[Path, typer.Argument(metavar="[FILE]", help="What is to be served; - reads standard input.")]
HostName = Annotated[str | None, typer.Option("--host", help="This host of the file alone.")]
Here = Annotated[bool, typer.Option("--here", hidden=True, help="Called from another host: the host is this one.")]
Python = Annotated[str, typer.Option("--python", help="The interpreter that verifies archives.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (plan, diff, apply):
        app.command()(command)
    app.command(name="receive", hidden=True)(receive)


def plan(file: PlanFile = Path(PLAN_FILE), host: HostName = None, here: Here = False, as_json: Json = False) -> None:
    """What `marina apply` would do, host by host, without doing it."""
    screen = Screen(as_json)
    hosts = _each(screen, _read(file, host, here), _Call("plan"), lambda name, desired: _planned(name, desired).actions)
    screen.table(
        ("host", "action"), [(name, action) for name, found in hosts.items() for action in found.get("actions", ())]
    )
    _end(screen, hosts, "actions", "nothing is to be done")


def diff(
    file: PlanFile = Path(PLAN_FILE),
    host: HostName = None,
    here: Here = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="End with 1 when anything differs, as git diff.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What is served otherwise than the file says."""
    screen = Screen(as_json)
    hosts = _each(
        screen,
        _read(file, host, here),
        _Call("diff"),
        lambda name, desired: [dataclasses.asdict(item) for item in _planned(name, desired).differences],
        key="differences",
    )
    rows = [(name, item) for name, found in hosts.items() for item in found.get("differences", ())]
    screen.table(
        ("host", "replica", "model", "what", "wanted", "found"),
        [(name, item["replica"], item["model"], item["what"], item["wanted"], item["found"]) for name, item in rows],
    )
    _end(screen, hosts, "differences", "nothing differs")
    if exit_code and rows:
        raise typer.Exit(1)


def apply(
    file: PlanFile = Path(PLAN_FILE),
    host: HostName = None,
    here: Here = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on: repair whatever differs, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks of --watch.")] = 2.0,
    python: Python = sys.executable,
    as_json: Json = False,
) -> None:
    """Have every host serve exactly what the file says. A second time it changes nothing.

    A new default version is tried like `marina deploy` does; what only differs on the servers is brought back at once.
    """
    screen = Screen(as_json)
    if watch:
        _watch(screen, file, host, here, every, python)
    hosts = _apply(screen, _read(file, host, here), python)
    _end(screen, hosts, "actions", "nothing to change")


def receive(
    name: Annotated[str, typer.Argument(help="File name of an archive that follows on standard input.")],
    sha256: Annotated[str, typer.Argument(help="Its SHA-256.")],
) -> None:
    """How an archive gets to another host. JSON only."""
    folder = find_home().store / INCOMING
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / Path(name).name
    partial = target.with_name(f".{target.name}")
    digest = hashlib.sha256()
    with partial.open("wb") as stream:
        while chunk := sys.stdin.buffer.read(1 << 20):
            digest.update(chunk)
            stream.write(chunk)
    if digest.hexdigest() != sha256:
        partial.unlink()
        raise ClientError(f"{name} arrived damaged", remedy="try again")
    partial.replace(target)
    Screen(as_json=True).result({"archive": str(target)})


# ---------------------------------------------------------------------------------------------------------- every host


@dataclass(frozen=True, slots=True)
class _Call:
    """How the same command is called on another host."""

    command: str
    options: tuple[str, ...] = ()


@dataclass(slots=True)
class _Planned:
    """One host compared with the file."""

    reached: Reached
    seen: Sequence[Sequence[ModelStatus]]
    known: Serving | None
    differences: list[Difference] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    models: dict[str, bool] = field(default_factory=dict)
    """What is to be changed, and whether with a trial."""


def _read(file: Path, host: str | None, here: bool) -> Desired:
    piped = str(file) == "-"
    desired = plans.parse(sys.stdin.read(), "standard input", find_home().store) if piped else plans.read(file)
    if host is not None:
        if host not in desired.hosts:
            raise ConfigError(
                f"{file} has no host '{host}'", remedy=f"hosts: {', '.join(desired.hosts) or 'none are named'}"
            )
        chosen = desired.hosts[host]
        chosen = chosen.model_copy(update={"ssh": None, "program": None}) if here else chosen
        desired = desired.model_copy(update={"hosts": {host: chosen}})
    return desired


def _each(
    screen: Screen,
    desired: Desired,
    call: _Call,
    at_hand: Callable[[str, Desired], Sequence[Any]],
    *,
    key: str = "actions",
) -> dict[str, dict[str, Any]]:
    """Do it for every host; one that fails does not stop the others."""
    found: dict[str, dict[str, Any]] = {}
    for name in desired.hosts or {"": Host()}:
        elsewhere = desired.hosts[name].elsewhere if name else None
        try:
            found[name] = (
                {key: list(at_hand(name, desired))} if elsewhere is None else _ask(elsewhere, name, desired, call)
            )
        except MarinaError as error:
            screen.note(f"{name or 'here'}: {error}")
            found[name] = {"error": str(error), "remedy": error.remedy, "exit_code": error.exit_code}
    return found


def _ask(program: Sequence[str], name: str, desired: Desired, call: _Call) -> dict[str, Any]:
    """Let the Marina of another host do it."""
    models = _archives_there(program, name, desired, call)
    text = desired.model_copy(update={"models": models, "hosts": {name: desired.hosts[name]}}).model_dump_json()
    answer = _call(program, (call.command, "-", "--host", name, "--here", "--json", *call.options), text.encode(), name)
    found = answer.get("hosts", {}).get(name)
    if not isinstance(found, dict):
        raise ClientError(
            f"{name}: {answer.get('error', 'an answer of another kind')}", remedy=str(answer.get("remedy", ""))
        )
    if "error" in found:
        raise ClientError(f"{name}: {found['error']}", remedy=found.get("remedy", ""))
    return found


def _archives_there(program: Sequence[str], name: str, desired: Desired, call: _Call) -> Mapping[str, ModelPlan]:
    """The models with archives that lie on the other host; sent when it is to serve them."""
    models = {}
    for model, item in desired.on(name).items():
        versions = {}
        for version, one in item.versions.items():
            archive = one.archive
            if archive is not None and call.command == "apply":
                data = archive.read_bytes()
                sent = _call(program, ("receive", archive.name, hashlib.sha256(data).hexdigest()), data, name)
                archive = Path(sent["archive"])
            versions[version] = one.model_copy(update={"archive": archive})
        models[model] = item.model_copy(update={"versions": versions})
    return models


def _call(program: Sequence[str], arguments: Sequence[str], given: bytes, name: str) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [*program, *arguments], input=given, capture_output=True, timeout=_ELSEWHERE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClientError(f"{name}: {program[0]}: {error}", remedy="can this host be reached?") from error
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        words = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no answer"])[-1]
        raise ClientError(f"{name}: {words}", remedy="is Marina installed there, and on the path?") from None
    return dict(answer)


def _end(screen: Screen, hosts: Mapping[str, Mapping[str, Any]], key: str, nothing: str) -> None:
    failed = {name: found for name, found in hosts.items() if "error" in found}
    changed = any(found.get(key) for found in hosts.values())
    screen.result({"changed": changed, "hosts": dict(hosts)})
    if not changed and not failed:
        screen.say(nothing)
    for name, found in failed.items():
        error = MarinaError(f"{name or 'here'}: {found['error']}", remedy=found["remedy"])
        screen.explain(error)
    if failed:
        raise typer.Exit(next(iter(failed.values())).get("exit_code", ClientError.exit_code))


# ----------------------------------------------------------------------------------------------------------- this host


def _planned(name: str, desired: Desired) -> _Planned:
    host = desired.hosts.get(name, Host())
    reached = reach(
        host.target, url=host.url, inference_url=host.inference_url, supervisor_url=host.supervisor_url,
        store=host.store, gateway_folder=host.gateway_folder, gateway_log=host.gateway_log,
    )  # fmt: skip
    seen = [replica.status() for replica in reached.replicas]
    planned = _Planned(reached, seen, serving.read(reached.store))
    for model, item in desired.on(name).items():
        _plan_model(planned, model, item)
    return planned


def _plan_model(planned: _Planned, name: str, item: ModelPlan) -> None:
    rows = [
        row
        for replica, status in zip(planned.reached.replicas, planned.seen, strict=True)
        for row in plans.differences(replica.name, name, item, status)
    ]
    tried = plans.is_new_default(name, item, planned.known, planned.seen[0])
    held = planned.known.models.get(name) if planned.known is not None else None
    planned.differences += rows
    if not rows and held == plans.target(item, held):
        return
    planned.models[name] = tried
    if tried:
        planned.actions.append(f"deploy {name}:{item.default}, tried beside {held.default if held else 'none'}")
        rows = [row for row in rows if row.what not in ("default", f"{item.default} workers")]
    planned.actions += [f"{row.replica}: {name}: {row.what}: {row.found} -> {row.wanted}" for row in rows]
    if not rows and not tried:
        planned.actions.append(f"{name}: {serving.SERVING_FILE} says what is served")


def _apply(screen: Screen, desired: Desired, python: str, *, patient: bool = False) -> dict[str, dict[str, Any]]:
    """With `patient`, a host on which another rollout is at work is left alone."""

    def at_hand(name: str, wanted: Desired) -> Sequence[str]:
        planned = _planned(name, wanted)
        if patient and serving.in_progress(planned.reached.store):
            return ()
        rollout = _rollout(screen, planned.reached, wanted, python)
        if rollout.recover():
            planned = _planned(name, wanted)
        for model, tried in planned.models.items():
            _apply_model(rollout, planned.reached, model, wanted.models[model], tried=tried)
        return planned.actions

    return _each(screen, desired, _Call("apply"), at_hand)


def _rollout(screen: Screen, reached: Reached, desired: Desired, python: str) -> Rollout:
    def tell(step: Step) -> None:
        where = f"{step.where}: " if step.where else ""
        screen.say(f"{where}{step.what}  {f'FAILED: {step.error}' if step.error else f'{step.seconds:.1f} s'}")

    trial = Trial(gates=desired.gates, stages=desired.canary)
    return Rollout(reached.replicas, reached.store, python=python, report=tell, front=reached.front, trial=trial)


def _apply_model(rollout: Rollout, reached: Reached, name: str, item: ModelPlan, *, tried: bool) -> None:
    new = item.default if tried else ""
    for version, one in item.versions.items():
        if version != new and one.archive is not None and not _in_store(reached.store, f"{name}:{version}"):
            rollout.add(one.archive)
    if tried:
        archive = item.versions[new].archive or model_store.select(reached.store, [f"{name}:{new}"])[0].path
        rollout.deploy(archive, workers=item.versions[new].workers, keep=tuple(item.versions))
    known = serving.read(reached.store)
    rollout.bring(name, plans.target(item, known.models.get(name) if known is not None else None))


def _in_store(store: Path, key: str) -> bool:
    return any(item.key == key for item in model_store.archives(store))


def _watch(screen: Screen, file: Path, host: str | None, here: bool, every: float, python: str) -> None:
    """Look, repair, look again. What fails is told and tried again, later each time."""
    if str(file) == "-":
        raise ConfigError("--watch reads the file again and again", remedy="give it as a file")
    screen.say(f"watching {file}; Ctrl-C ends it")
    failures = 0
    while True:
        try:
            hosts = _apply(screen, _read(file, host, here), python, patient=True)
        except MarinaError as error:  # the file is being written, for example
            screen.note(str(error))
            hosts = {"": {"error": str(error)}}
        for name, found in hosts.items():
            for action in found.get("actions", ()):
                screen.say(f"{f'{name}: ' if name else ''}repaired: {action}")
        failed = any("error" in found for found in hosts.values())
        failures = failures + 1 if failed else 0
        time.sleep(_WAITS[min(failures, len(_WAITS)) - 1] if failed else every)
