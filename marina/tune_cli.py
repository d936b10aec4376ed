"""The command that finds a model's settings on the running server: `marina tune`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from handlerlib.errors import MarinaError
from marina import archive, load_payloads, model_config, remote, store, tune_config, tune_report, verify
from marina.archive import Archive
from marina.bench_cli import ask_once, shown_interval
from marina.client import ManagementClient, ModelStatus
from marina.errors import ArchiveError, ClientError
from marina.home import Home, find_home
from marina.loadgen import Scenario
from marina.processes import interruptible
from marina.reach import address_of
from marina.replica import LocalReplica
from marina.screen import Screen, shown
from marina.settings import OTHER_VARIABLES, ServeSettings
from marina.tune import Candidate, Record, Stand, Task, Tuned, default_workers, only_one, tune
from marina.tune_search import Setting, Space, Value

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
DELAYS_MS = (1, 5, 20)
_UNITS = {"ms": 1.0, "s": 1000.0, "us": 0.001, "µs": 0.001, "": 1.0}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="tune")(tune_model)


def tune_model(
    name: Annotated[str, typer.Argument(help="A served model.")],
    p99: Annotated[str, typer.Option("--p99", help="The 99th percentile of latency must not exceed this, e.g. 50ms.")],
    budget: Annotated[float, typer.Option(min=1, help="Seconds that it may take.")] = 600.0,
    probe: Annotated[float, typer.Option(min=0.5, help="Seconds of the longest single measurement.")] = 6.0,
    body: Annotated[
        list[Path] | None, typer.Option("--body", "-b", help="Files, or folders of files; golden samples by default.")
    ] = None,
    workers: Annotated[str | None, typer.Option(help="Numbers to try, e.g. 1,2,4; up to the cores by default.")] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Sizes to try; 1,2,4,...,64 by default.")] = None,
    delays: Annotated[str | None, typer.Option(help="Batch delays in ms to try; 1,5,20 by default.")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also", help="NAME:VERSION of the store that may be served instead, e.g. a smaller model; repeatable."
        ),
    ] = None,
    rungs: Annotated[
        bool,
        typer.Option("--rungs/--no-rungs", help="Try the other versions in the store that have the same weights too."),
    ] = True,
    most_in_flight: Annotated[int, typer.Option(min=1, help="Requests in flight at most.")] = 256,
    pack: Annotated[
        bool, typer.Option("--pack", help="Make a new version with the settings found, pack and verify it.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write/--no-write", help="Write model-config.yaml into the artifact.")
    ] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what was measured before.")] = False,
    url: Annotated[
        str | None, typer.Option("--url", envvar="MARINA_MANAGEMENT_URL", help="Management address of the server.")
    ] = None,
    inference_url: Annotated[
        str | None, typer.Option("--inference-url", envvar="MARINA_URL", help="Inference address of the server.")
    ] = None,
    model_store: Annotated[Path | None, typer.Option("--store", help="Another model store.")] = None,
    as_json: Json = False,
) -> None:
    """Find workers, batch size and delay for the highest throughput within a latency objective, on the running server.

    What is served goes on as it is: a second registration of the archive takes the load, and is gone afterwards. Ctrl-C
    stops; the same command goes on from there.
    """
    screen, home = Screen(as_json), find_home()
    objective = _milliseconds(p99)
    folder = model_store or home.store
    server = _server(home, folder, url, inference_url)
    served = _served(server, name)
    if body:
        load = load_payloads.from_files(body)
    else:
        load = load_payloads.from_archive(_stored(folder, f"{name}:{served.version}").path)
    candidates = tune_config.candidates(folder, f"{name}:{served.version}", also or [], rungs=rungs)
    if load.check is not None:
        candidates = [tune_config.checked(folder, item, load) for item in candidates]
    start = Setting(
        archive=candidates[0].key,
        workers=max(1, len(served.workers)),
        batch_size=served.batch_size,
        delay_ms=max(1, served.max_batch_delay_ms),
    )
    space = _space(candidates, start, workers, batch_sizes, delays, most_in_flight)
    ask_once(Scenario(url=f"{server.inference_url}/predictions/{name}", payloads=load.payloads))
    task = Task(
        name=name,
        candidates=candidates,
        start=start,
        space=space,
        objective_ms=objective,
        budget=budget,
        load=load,
        probe_seconds=probe,
    )
    runs = home.runs / "tune"
    with only_one(runs, name), interruptible():
        record = Record(runs, task, fresh=fresh)
        _introduce(screen, task, record)
        with Stand(server.management_url, server.inference_url, name, screen.note) as stand:
            tuned = tune(task, stand, record, screen.say)
    report = tune_report.fields(task, tuned, record)
    tune_report.write(record.folder, report, task, tuned)
    _show(screen, task, tuned, record)
    best = tuned.outcome.best
    if best is None:
        screen.result(report)
        screen.end_with(_nothing_fits(task, tuned))
    written = _keep(screen, home, folder, best, objective, report, write=write, pack=pack, record=record)
    screen.result(report | written)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Server:
    management_url: str
    inference_url: str


def _server(home: Home, folder: Path, url: str | None, inference_url: str | None) -> _Server:
    settings = ServeSettings.load({"config": home.config}, os.environ, other_variables=OTHER_VARIABLES)
    management = url or settings.url("management")
    inference = address_of("inference", inference_url, url, settings, needed=True)
    local = LocalReplica(
        store=folder,
        inference_url=inference,
        management_url=management,
        supervisor_url=settings.url("supervisor"),
    )
    remote.find_replicas("local", local, management_url=management, project=home.root)
    return _Server(management_url=management, inference_url=inference)


def _served(server: _Server, name: str) -> ModelStatus:
    with ManagementClient(server.management_url) as client:
        found = client.describe(name)
    if not found.ready_workers:
        raise ClientError(f"{name} has no worker that is ready", remedy="look at it: marina status")
    return found


def _stored(folder: Path, key: str) -> Archive:
    (item,) = store.select(folder, [key])
    return item


def _space(
    candidates: Sequence[Candidate],
    start: Setting,
    workers: str | None,
    batch_sizes: str | None,
    delays: str | None,
    most_in_flight: int,
) -> Space:
    """What was asked for, or the usual values and those that are served now."""
    cores = len(os.sched_getaffinity(0))
    return Space(
        archives=tuple(item.key for item in candidates),
        workers=_whole("--workers", workers) or default_workers(cores, start.workers),
        batch_sizes=_whole("--batch-sizes", batch_sizes) or sorted({*BATCH_SIZES, start.batch_size}),
        delays_ms=_whole("--delays", delays) or sorted({*DELAYS_MS, start.delay_ms}),
        most_in_flight=most_in_flight,
    )


def _whole(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise typer.BadParameter(f"'{text}' is not a list of whole numbers from 1, like 1,2,4", param_hint=option)
    return found


def _milliseconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|us|µs|)", text.strip())
    if found is None or not float(found[1]) > 0:
        raise typer.BadParameter(f"'{text}' is not a time like 50ms or 0.2s", param_hint="--p99")
    return float(found[1]) * _UNITS[found[2]]


def _introduce(screen: Screen, task: Task, record: Record) -> None:
    space = task.space
    screen.say(
        f"{task.name}: the most within p99 {task.objective_ms:g} ms; {task.load.source}; workers {_list(space.workers)}, "
        f"batch sizes {_list(space.batch_sizes)}, delays {_list(space.delays_ms)} ms"
    )
    for item in task.candidates[1:]:
        screen.say(f"{item.key} is tried too{': the same weights; --no-rungs leaves it out' if item.offered else ''}")
    screen.say(f"served now: {task.start.text}; threads follow the workers by themselves")
    if record.remembered:
        screen.say(f"{record.remembered} measurements remembered from {shown(record.folder)}; --fresh forgets them")


def _show(screen: Screen, task: Task, tuned: Tuned, record: Record) -> None:
    rows = [_row(value, task) for value in tuned.outcome.values]
    screen.table(
        ("archive", "workers", "batch", "delay ms", "req/s", "in flight", "p50 ms", "p99 ms", "PSS MiB", ""), rows
    )
    measured = len(tuned.outcome.probes)
    screen.say(
        f"{len(tuned.outcome.values)} of {task.space.size} settings, {measured} measurements "
        f"({tuned.remembered} remembered), {tuned.seconds:.0f} s"
    )
    if not tuned.outcome.complete:
        screen.note("the budget ended before the search did; the same command goes on from here")
    best = tuned.outcome.best
    if best is not None and best.probe is not None:
        screen.say(
            f"best: {best.setting.text}: {shown_interval(best.throughput)} req/s, "
            f"p99 {shown_interval(best.probe.p99_ms)} ms with {best.probe.in_flight} in flight{_gain(task, tuned)}"
        )
        if tuned.sustained is not None:
            screen.say(
                f"with requests at random times it holds the objective at {tuned.sustained.rate:.1f}/s "
                f"(p99 {shown_interval(tuned.sustained.p99_ms)} ms)"
            )
        else:
            screen.say("with requests at random times no rate was seen to hold the objective: leave room above it")
    screen.say(f"report {shown(record.folder)}/{tune_report.REPORT_FILE}, plots {tune_report.PLOT_FILE}")


def _row(value: Value, task: Task) -> tuple[object, ...]:
    setting, probe = value.setting, value.probe
    marks = [text for text, wanted in (("served now", task.start),) if setting == wanted]
    if probe is None:
        marks.append("never within the objective")
    elif value.confirmed is not None:
        marks.append("measured again")
    return (
        setting.archive,
        setting.workers,
        setting.batch_size,
        setting.delay_ms,
        shown_interval(value.throughput) if probe is not None else "-",
        probe.in_flight if probe is not None else "-",
        f"{probe.p50_ms:.1f}" if probe is not None else "-",
        shown_interval(probe.p99_ms) if probe is not None else "-",
        f"{probe.pss_mib:.0f}" if probe is not None and probe.pss_mib is not None else "-",
        ", ".join(marks),
    )


def _gain(task: Task, tuned: Tuned) -> str:
    now = next((value for value in tuned.outcome.values if value.setting == task.start), None)
    best = tuned.outcome.best
    if now is None or best is None or now.setting == best.setting or not now.throughput.value:
        return ""
    return f"; {best.throughput.value / now.throughput.value:.2f} times what is served now"


def _nothing_fits(task: Task, tuned: Tuned) -> MarinaError:
    fastest = min((item.p99_ms.value for item in tuned.outcome.probes if not item.failed), default=None)
    if fastest is None:
        return ClientError("no measurement was without failures", remedy="ask it once: marina bench NAME")
    return ClientError(
        f"no setting met p99 {task.objective_ms:g} ms; the lowest p99 seen is {fastest:.1f} ms",
        remedy="a longer --p99, a faster rung (marina optimize), or a smaller model",
    )


def _keep(
    screen: Screen,
    home: Home,
    folder: Path,
    best: Value,
    objective: float,
    report: dict[str, Any],
    *,
    write: bool,
    pack: bool,
    record: Record,
) -> dict[str, Any]:
    """Write the settings where the next `marina pack` finds them, or pack them as a new version at once."""
    name, _, version = best.setting.archive.partition(":")
    source = _stored(folder, best.setting.archive)
    why = (
        f"{best.throughput.value:.1f} req/s within p99 {objective:g} ms on "
        f"{report['measured_on']['cpu']}, {report['measured_on']['cores']} cores"
    )
    text = tune_config.tuned_text(tune_config.config_of(source.path), best.setting, why)
    copy = record.folder / model_config.CONFIG_FILE
    copy.write_text(text, encoding="utf-8")
    artifact = home.artifacts / name / version
    if not write:
        return {"config": str(copy)}
    if not artifact.is_dir():
        screen.note(f"there is no artifact {shown(artifact)}; the settings are in {shown(copy)}")
        return {"config": str(copy)}
    if not pack:
        target = tune_config.write_override(artifact, text)
        screen.say(f"wrote {shown(target)}")
        complete = report["complete"] and (best.setting, objective) in record.sustained
        again = "measures nothing again" if complete else "goes on with the search first"
        screen.say(f"to serve it: the same command with --pack ({again}), then marina deploy")
        return {"config": str(target)}
    taken = tune_config.versions_known(name, home.artifacts, folder)
    made = tune_config.as_new_version(artifact, text, {"objective_p99_ms": objective, "why": why}, taken=taken)
    packed = archive.pack(made, handlers=home.handlers, destination=folder)
    found = verify.verify(packed.path)
    if not found.passed:
        first = found.findings[0]
        raise ArchiveError(f"{shown(packed.path)} is refused: {first.where}: {first.message}", remedy=first.remedy)
    store.publish(folder, packed)
    screen.say(f"packed and verified {shown(packed.path)}; to serve it: marina deploy {packed.key}")
    return {"config": str(made / model_config.CONFIG_FILE), **packed.fields}


def _list(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
