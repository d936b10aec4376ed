"""The commands of `deploy.toml`: what would be done (plan), what differs (diff), and doing it (apply), on every host."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from marina import plan as plans
from marina import serving
from marina import store as model_store
from marina.client import ModelStatus
from marina.errors import ClientError, ConfigError, MarinaError
from marina.gates import GateFailed
from marina.home import find_home
from marina.plan import PLAN_FILE, Desired, Difference, Host, ModelPlan
from marina.processes import interruptible
from marina.reach import Interface, Reached, reach
from marina.rollout import Rollout, Step, Trial
from marina.screen import Screen
from marina.serving import Serving

INCOMING = "incoming"
"""Folder below the model store of another host, where archives arrive; `apply` verifies them before they are served."""
_ELSEWHERE_SECONDS = 1800.0
_WAITS = (2.0, 5.0, 10.0, 30.0)
"""Seconds after one failed repair to the next one."""
_MOST_HOSTS = 64
"""Asked at once."""
_FAILURES = (MarinaError, OSError, subprocess.SubprocessError)
"""Of one host or model; the others go on."""
_NOT_AGAIN = "{key} failed a gate and is not tried again until the file or its archive changes; {default} is served"
_LOOK_SECONDS = 0.2
"""Between two looks of --watch at the clock and at hosts that have answered."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
PlanFile = Annotated[Path, typer.Argument(metavar="[FILE]", help="What is to be served; - reads standard input.")]
HostName = Annotated[str | None, typer.Option("--host", help="This host of the file alone.")]
Here = Annotated[bool, typer.Option("--here", hidden=True, help="Called from another host: the host is this one.")]
Left = Annotated[list[str] | None, typer.Option("--left", hidden=True, help="Not to be tried again.")]
Python = Annotated[str, typer.Option("--python", help="The interpreter that verifies archives.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (plan, diff, apply):
        app.command()(command)
    app.command(name="receive", hidden=True)(receive)


def plan(
    file: PlanFile = Path(PLAN_FILE),
    host: HostName = None,
    here: Here = False,
    left: Left = None,
    as_json: Json = False,
) -> None:
    """What `marina apply` would do, host by host, without doing it."""
    screen = Screen(as_json)
    at_hand = partial(_plan_for_sender, left=left or ()) if here else _plan_here
    hosts = _each(screen, _read(file, host, here), "plan", at_hand)
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
    hosts = _each(screen, _read(file, host, here), "diff", _diff_here)
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
    left: Left = None,
    as_json: Json = False,
) -> None:
    """Have every host serve exactly what the file says. A second time it changes nothing.

    A new default version is tried like `marina deploy` does; what only differs on the servers is brought back at once.
    A model that is not in the file is retired, unless its archive is in the store, from where `marina serve` serves it.
    """
    screen = Screen(as_json)
    with interruptible():
        if watch:
            _watch(screen, file, host, here, every, python)
        desired = _read(file, host, here)
        try:
            hosts = _apply(screen, desired, python, left=left or ())
        finally:
            if here:
                _clear_incoming(desired)
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
    strangers: list[str] = field(default_factory=list)
    """Models to be retired: neither the file nor the store has them."""
    left: list[str] = field(default_factory=list)
    """What differs and is left as it is, in words."""
    meant: dict[str, ModelPlan] = field(default_factory=dict)
    """Of each model: the file's, or what is known while its new default is not tried again."""


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
    command: str,
    at_hand: Callable[[str, Desired], dict[str, Any]],
    *,
    left: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Do it for every host, at once for those elsewhere; one that fails does not stop the others."""

    def one(name: str) -> dict[str, Any]:
        elsewhere = _elsewhere(desired, name)
        try:
            found = at_hand(name, desired) if elsewhere is None else _ask(elsewhere, name, desired, command, left)
        except _FAILURES as error:
            found = _failure(error)
        if "error" in found:
            screen.note(f"{name or 'here'}: {found['error']}")
        return found

    names = tuple(desired.hosts) or ("",)
    with ThreadPoolExecutor(_MOST_HOSTS) as pool:
        asked = {name: pool.submit(one, name) for name in names if _elsewhere(desired, name) is not None}
        # Here in the main thread: it is the one that Ctrl-C interrupts.
        done = {name: one(name) for name in names if name not in asked}
        return {name: done[name] if name in done else asked[name].result() for name in names}


def _failure(error: Exception) -> dict[str, Any]:
    if not isinstance(error, MarinaError):
        place = getattr(error, "filename", None)
        words = f"{place}: {error.strerror}" if place and isinstance(error, OSError) else str(error)
        error = ConfigError(words, remedy="correct that, and give the command again")
    return {"error": str(error), "remedy": error.remedy, "exit_code": error.exit_code}


def _elsewhere(desired: Desired, name: str) -> tuple[str, ...] | None:
    return desired.hosts[name].elsewhere if name else None


def _ask(
    program: Sequence[str], name: str, desired: Desired, command: str, left: Collection[str] = ()
) -> dict[str, Any]:
    """Let the Marina of another host do it. Archives travel only when something is to be changed."""
    first = "plan" if command == "apply" else command
    planned = _ask_with(program, name, desired, first, _archives_there(desired, name), left)
    holds = planned.pop("holds", {})
    if command != "apply" or not planned.get("actions"):
        return planned

    def send(key: str, archive: Path) -> Path | None:
        if key in holds and not archive.exists():
            return None
        data = _read_archive(archive)
        digest = hashlib.sha256(data).hexdigest()
        if holds.get(key) == digest:
            return None
        return Path(_call(program, ("receive", archive.name, digest), data, name)["archive"])

    return _ask_with(program, name, desired, command, _archives_there(desired, name, send), left)


def _ask_with(
    program: Sequence[str],
    name: str,
    desired: Desired,
    command: str,
    models: Mapping[str, ModelPlan],
    left: Collection[str],
) -> dict[str, Any]:
    text = desired.model_copy(update={"models": models, "hosts": {name: desired.hosts[name]}}).model_dump_json()
    options = [option for model in left for option in ("--left", model)]
    answer = _call(program, (command, "-", "--host", name, "--here", "--json", *options), text.encode(), name)
    found = answer.get("hosts", {}).get(name)
    if not isinstance(found, dict):
        raise ClientError(
            f"{name}: {answer.get('error', 'an answer of another kind')}", remedy=str(answer.get("remedy", ""))
        )
    if "error" in found:
        there = ClientError(f"{name}: {found['error']}", remedy=found.get("remedy", ""))
        return {key: found[key] for key in ("refused",) if key in found} | _failure(there)
    return found


def _archives_there(
    desired: Desired, name: str, send: Callable[[str, Path], Path | None] = lambda key, archive: None
) -> Mapping[str, ModelPlan]:
    """The models with archives that lie on the other host, where `send` says."""
    models = {}
    for model, item in desired.on(name).items():
        versions = {
            version: one.model_copy(update={"archive": one.archive and send(f"{model}:{version}", one.archive)})
            for version, one in item.versions.items()
        }
        models[model] = item.model_copy(update={"versions": versions})
    return models


def _read_archive(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the archive {path} cannot be read: {error.strerror}", remedy="correct `archive` in the file, or pack it"
        ) from error


def _clear_incoming(desired: Desired) -> None:
    """What was sent is in the store by now, or of no use."""
    folder = find_home().store / INCOMING
    for item in desired.models.values():
        for one in item.versions.values():
            if one.archive is not None and one.archive.parent == folder:
                one.archive.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


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
    for line in _left(hosts):
        screen.note(line)
    screen.result({"changed": changed, "hosts": dict(hosts)})
    if not changed and not failed:
        screen.say(nothing)
    for name, found in failed.items():
        error = MarinaError(f"{name or 'here'}: {found['error']}", remedy=found["remedy"])
        screen.explain(error)
    if failed:
        raise typer.Exit(next(iter(failed.values())).get("exit_code", ClientError.exit_code))


def _left(hosts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"{f'{name}: ' if name else ''}{line}" for name, found in hosts.items() for line in found.get("left", ())]


# ----------------------------------------------------------------------------------------------------------- this host


def _plan_here(name: str, desired: Desired) -> dict[str, Any]:
    planned = _planned(name, desired)
    return _found("actions", planned.actions, planned)


def _plan_for_sender(name: str, desired: Desired, left: Collection[str]) -> dict[str, Any]:
    """With the SHA-256 of every archive here, by NAME:VERSION: these need not be sent."""
    planned = _planned(name, desired, left=left)
    index = model_store.read_index(planned.reached.store)["archives"]
    holds = {
        f"{entry['name']}:{entry['version']}": entry["sha256"]
        for file_name, entry in index.items()
        if (planned.reached.store / file_name).is_file()
    }
    return {**_found("actions", planned.actions, planned), "holds": holds}


def _diff_here(name: str, desired: Desired) -> dict[str, Any]:
    planned = _planned(name, desired)
    return _found("differences", [dataclasses.asdict(item) for item in planned.differences], planned)


def _found(key: str, values: list[Any], planned: _Planned) -> dict[str, Any]:
    return {key: values} | ({"left": planned.left} if planned.left else {})


def _planned(name: str, desired: Desired, needs: Interface | None = None, *, left: Collection[str] = ()) -> _Planned:
    host = _with_variables(desired.hosts.get(name, Host()))
    reached = reach(
        host.target, url=host.url, inference_url=host.inference_url, supervisor_url=host.supervisor_url,
        store=host.store, gateway_folder=host.gateway_folder, gateway_log=host.gateway_log, needs=needs,
    )  # fmt: skip
    seen = [replica.status() for replica in reached.replicas]
    planned = _Planned(reached, seen, serving.read(reached.store))
    for model, item in desired.on(name).items():
        known = planned.known.models.get(model) if planned.known is not None else None
        if model in left and known is not None and known.default != item.default:
            planned.left.append(_NOT_AGAIN.format(key=f"{model}:{item.default}", default=known.default))
            item = plans.as_known(known)
        planned.meant[model] = item
        _plan_model(planned, model, item)
    _plan_strangers(planned, desired.on(name))
    return planned


def _with_variables(host: Host) -> Host:
    """A host without an address has those of MARINA_MANAGEMENT_URL and MARINA_URL, as for every other command."""
    if host.url or host.target == "compose":
        return host
    found = {"url": os.environ.get("MARINA_MANAGEMENT_URL"), "inference_url": os.environ.get("MARINA_URL")}
    given = {"inference_url": host.inference_url} if host.inference_url else {}
    return host.model_copy(update={key: value or None for key, value in found.items()} | given)


def _plan_strangers(planned: _Planned, meant: Collection[str]) -> None:
    index = model_store.read_index(planned.reached.store)["archives"]
    at_home = {entry["name"] for entry in index.values()} | set(planned.known.models if planned.known else ())
    rows = [
        row
        for replica, status in zip(planned.reached.replicas, planned.seen, strict=True)
        for row in plans.not_in_file(replica.name, meant, at_home, status)
    ]
    planned.differences += rows
    planned.strangers = sorted({row.model for row in rows})
    planned.actions += [_words(row) for row in rows]
    served = {item.name for status in planned.seen for item in status if not item.name.endswith(serving.TRIAL_SUFFIX)}
    for name in sorted(served - {*meant, *planned.strangers}):
        planned.left.append(
            f"{name} is served and not in the file; its archive is in the store, and it is left as it is"
        )


def _words(row: Difference) -> str:
    return f"{row.replica}: {row.model}: {row.what}: {row.found} -> {row.wanted}"


def _plan_model(planned: _Planned, name: str, item: ModelPlan) -> None:
    batching = model_store.batching(planned.reached.store, name)
    rows = [
        row
        for replica, status in zip(planned.reached.replicas, planned.seen, strict=True)
        for row in plans.differences(replica.name, name, item, status, batching)
    ]
    tried = plans.is_new_default(name, item, planned.known, planned.seen[0])
    held = planned.known.models.get(name) if planned.known is not None else None
    planned.differences += rows
    stale = [row for row in rows if row.what.endswith(" batch")]
    if {row.what for row in stale} == {f"{version} batch" for version in item.versions}:
        planned.left += [
            f"{_words(row)}: left, since no other version could answer while it is registered again; restart that server"
            for row in stale
        ]
        rows = [row for row in rows if row not in stale]
    if not rows and held == plans.target(item, held):
        return
    planned.models[name] = tried
    if tried:
        planned.actions.append(f"deploy {name}:{item.default}, tried beside {held.default if held else 'none'}")
        rows = [row for row in rows if row.what not in ("default", f"{item.default} workers")]
    planned.actions += [_words(row) for row in rows]
    if not rows and not tried:
        planned.actions.append(f"{name}: {serving.SERVING_FILE} says what is served")


def _apply(
    screen: Screen, desired: Desired, python: str, *, patient: bool = False, left: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Each model on its own, those without a trial first. With `patient`, a host on which another rollout is at work is left
    alone. Of the models in `left` no new default is tried; those whose new default failed a gate are named as `refused`."""

    def at_hand(name: str, wanted: Desired) -> dict[str, Any]:
        planned = _planned(name, wanted, "inference", left=left)
        if patient and serving.in_progress(planned.reached.store):
            return {"actions": []}
        rollout = _rollout(screen, planned.reached, wanted, python)
        if rollout.recover():
            planned = _planned(name, wanted, "inference", left=left)
        errors: dict[str, Exception] = {}
        for model in sorted(planned.models, key=lambda model: planned.models[model]):
            with _kept(errors, model):
                _apply_model(rollout, planned.reached, model, planned.meant[model], tried=planned.models[model])
        for model in planned.strangers:
            with _kept(errors, model):
                rollout.remove(model)
        if not errors:
            return _found("actions", planned.actions, planned)
        first, *others = errors.values()
        for error in others:
            screen.note(f"{name or 'here'}: {error}")
        refused = [model for model, error in errors.items() if isinstance(error, GateFailed)]
        return _failure(first) | ({"refused": refused} if refused else {})

    return _each(screen, desired, "apply", at_hand, left=left)


@contextlib.contextmanager
def _kept(errors: dict[str, Exception], model: str) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        errors[model] = error


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
    """Look, repair, look again, at each host in its own time. What fails is told and tried again, later each time."""
    if str(file) == "-":
        raise ConfigError("--watch reads the file again and again", remedy="give it as a file")
    screen.say(f"watching {file}; Ctrl-C ends it")
    watched: dict[str, _Watched] = {}
    with ThreadPoolExecutor(_MOST_HOSTS) as pool:
        while True:
            try:
                desired = _read(file, host, here)
            except MarinaError as error:  # the file is being written, for example
                screen.note(str(error))
                time.sleep(max(every, _WAITS[0]))
                continue
            for name in desired.hosts or ("",):
                one = desired.model_copy(update={"hosts": {name: desired.hosts[name]}}) if name else desired
                host_seen = watched.setdefault(name, _Watched())
                found = host_seen.look(
                    partial(_repair, screen, one, python, host_seen),
                    pool if _elsewhere(desired, name) is not None else None,
                    every,
                )
                _tell(screen, name, found, host_seen)
            time.sleep(min(every, _LOOK_SECONDS))


@dataclass(slots=True)
class _Watched:
    """One host, as --watch has it."""

    due: float = 0.0
    """When to look again, by time.monotonic()."""
    failures: int = 0
    """In a row."""
    told: set[str] = field(default_factory=set)
    """What was said to be left as it is."""
    running: Future[dict[str, dict[str, Any]]] | None = None
    state: Mapping[str, str] = field(default_factory=dict)
    """What the file and the archives say of each model, as of the repair begun last."""
    refused: dict[str, str] = field(default_factory=dict)
    """Model -> that state, with which its new default failed a gate."""

    def not_again(self, desired: Desired) -> list[str]:
        """The models whose new default failed a gate, and of which the file and the archive still say the same."""
        said = desired.model_dump_json()
        self.state = {model: said + _archive_state(item) for model, item in desired.models.items()}
        return [model for model, state in self.refused.items() if self.state.get(model) == state]

    def look(
        self, apply: Callable[[], dict[str, dict[str, Any]]], pool: ThreadPoolExecutor | None, every: float
    ) -> Mapping[str, Any]:
        """Begin a repair when it is due; what the one begun last has found, once. Without a `pool`, here and now."""
        if self.running is None:
            if time.monotonic() < self.due:
                return {}
            self.running = Future() if pool is None else pool.submit(apply)
            if pool is None:
                self.running.set_result(apply())
        if not self.running.done():
            return {}
        (found,) = self.running.result().values()
        self.running = None
        self.refused |= {model: self.state[model] for model in found.get("refused", ()) if model in self.state}
        self.failures = self.failures + 1 if "error" in found else 0
        self.due = time.monotonic() + (_WAITS[min(self.failures, len(_WAITS)) - 1] if self.failures else every)
        return found


def _archive_state(item: ModelPlan) -> str:
    """Another one when the archive of the model's default is another one."""
    archive = item.versions[item.default].archive
    found = archive.stat() if archive is not None and archive.exists() else None
    return f"{found.st_mtime_ns} {found.st_size} {found.st_ino}" if found is not None else ""


def _repair(screen: Screen, desired: Desired, python: str, watched: _Watched) -> dict[str, dict[str, Any]]:
    return _apply(screen, desired, python, patient=True, left=watched.not_again(desired))


def _tell(screen: Screen, name: str, found: Mapping[str, Any], watched: _Watched) -> None:
    for action in found.get("actions", ()):
        screen.say(f"{f'{name}: ' if name else ''}repaired: {action}")
    if found:
        left = {*_left({name: found})}
        for line in sorted(left - watched.told):
            screen.note(line)
        watched.told = left
