"""Carry out the plan: one measurement after the other, each kept at once, and none of them able to stop the rest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import answers, echoes, environments, figures, growth, load, machine, measure, schedule, systems
from benchmarks.errors import BenchmarkError, NotAvailable
from benchmarks.measure import Plan
from benchmarks.record import Record
from benchmarks.schedule import CONNECTIONS, Profile, Task
from benchmarks.systems import PLAIN, Layout, Place, Setup
from benchmarks.tree import Tree
from handlerlib.spec import WEIGHTS_FILE

Say = Callable[[str], None]

EQUAL = 0.01
"""Largest difference of a probability between programs that compute the same: decoders and resizers may round one of
255 grey levels differently, and sums in another order."""
_EQUAL_LOSSY = 0.03
"""The same for a rung of lower precision, whose kernels differ with batch size and threads; at most this much of the
tolerance that its engine has against the golden samples."""
_MODEL_SECONDS = 1800.0
_ANSWER_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Bench:
    """All that one run measures with."""

    place: Place
    profile: Profile
    photos: tuple[bytes, ...]
    photo_folder: Path
    grey: int
    """Photos that stock TorchServe cannot answer."""
    generator: load.Generator
    fastest: str
    """The rung that peers get and whose layout is tuned."""
    expected: Mapping[str, Sequence[answers.Answer]]
    """Rung -> answers computed in a process without a server."""
    tolerances: Mapping[str, float]
    """Rung -> largest difference of a probability from those."""
    say: Say

    @property
    def rungs(self) -> list[str]:
        return list(self.place.models)


def carry_out(bench: Bench, tasks: Sequence[Task], record: Record) -> None:
    """Everything in `tasks` that `record` does not hold yet. A measurement that fails is recorded with its reason."""
    left = sum(schedule.seconds_of(task, bench.profile) for task in tasks if not record.done(task.key))
    for number, task in enumerate(tasks, 1):
        if record.done(task.key):
            continue
        minutes = left / 60
        bench.say(f"{number}/{len(tasks)} {_title(task)}, about {minutes:.0f} min left")
        left -= schedule.seconds_of(task, bench.profile)
        if _given_up(task, record):
            record.finish(task.key)
            continue
        try:
            _STEPS[task.kind](bench, task, record)
        except Exception as error:  # noqa: BLE001 - recorded; no system may stop the others
            _give_up(task, record, error)
            bench.say(f"  not measured: {str(error).splitlines()[0][:200]}")
        record.finish(task.key)


def install(cache: Path, tasks: Sequence[Task], record: Record, say: Say) -> None:
    """Make the peers' environments before any clock runs; those that cannot be made take no part."""
    names = dict.fromkeys(task.setup.system for task in tasks if task.setup is not None)
    for name in names:
        if name == "marina":
            continue
        say(f"environment of {systems.TITLES[name]}")
        try:
            environments.python_of(cache, name)
        except NotAvailable as error:
            say(f"  takes no part: {error}")
            for task in tasks:
                if task.setup is not None and task.setup.system == name:
                    record.value["unavailable"][task.setup.key] = str(error)


def program(module: str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, seconds: float) -> Any:
    """Run `python -m MODULE` of ours in a process tree of its own and read the JSON that it prints."""
    log = folder / f"{module}.out"
    errors = folder / f"{module}.err"
    inner = f'exec "$@" 2>"{errors}"'
    command = ["sh", "-c", inner, "sh", sys.executable, "-m", module, *arguments]
    with Tree(command, environment=environment, folder=systems.ROOT, log=log, seconds=seconds) as tree:
        deadline = time.monotonic() + seconds
        while not tree.ended() and time.monotonic() < deadline:
            time.sleep(0.05)
    said = log.read_text(encoding="utf-8", errors="replace")
    try:
        return json.loads(said)
    except json.JSONDecodeError as error:
        last = errors.read_text(errors="replace").strip().splitlines()[-1:] or ["it was stopped, or said nothing"]
        raise NotAvailable(f"{module} {arguments[0]} failed: {last[0]}", remedy=f"see {errors}") from error


def provide_models(
    artifact: Path, rungs: Sequence[str], cache: Path, scratch: Path, device: str, root: Path | None
) -> dict[str, dict[str, Any]]:
    """One artifact per rung: `{"folder": ...}` or `{"reason": ...}`."""
    environment = systems.clean_environment(PYTHONPATH=systems.python_path())
    arguments = [str(artifact), str(cache), device, str(root or ""), *rungs]
    found: dict[str, dict[str, Any]] = program("benchmarks.models", arguments, environment, scratch, _MODEL_SECONDS)
    return found


def expected_answers(place: Place, photos: Path) -> dict[str, list[dict[str, float]]]:
    """Rung -> each photo's answer, computed without a server."""
    found = {}
    for rung, folder in place.models.items():
        arguments = ["answers", str(folder), str(photos), "--device", place.device]
        environment = _inprocess_environment(machine.cores())
        found[rung] = program("benchmarks.inprocess", arguments, environment, place.scratch, _ANSWER_SECONDS)
    return found


def tolerances(built: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Rung -> how far a server's probabilities may be from the same rung's without a server."""
    return {rung: max(EQUAL, min(_EQUAL_LOSSY, item.get("tolerance", 0.0))) for rung, item in built.items()}


def against_plain(
    expected: Mapping[str, Sequence[answers.Answer]], built: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """How the rungs of lower precision answer the photos, beside the plain weights. For the reader: no photo is of a kind
    that the model was trained on, and what a rung may lose is judged on the test images."""
    found = {}
    for rung, theirs in expected.items():
        if rung != PLAIN:
            verdict = answers.compare(expected[PLAIN], theirs, float(built[rung].get("tolerance", EQUAL)))
            found[rung] = {**dataclasses.asdict(verdict), "equal": verdict.equal}
    return found


def layout_of(setup: Setup, record: Record, device: str) -> Layout:
    """What the sweep found for this system; the default layout without one. Other rungs take the tuned one's."""
    found = record.value["layouts"].get(_tuned_name(setup))
    return Layout(**found) if found else schedule.default_layout(machine.cores(), device)


def _sweep(bench: Bench, task: Task, record: Record) -> None:
    assert task.setup is not None and task.layout is not None
    _visit(bench, task, record, task.layout, bench.profile.sweep_seconds)
    name = _tuned_name(task.setup)
    tried = [
        visit
        for visit in record.value["visits"]
        if visit["phase"] == "sweep" and visit["setup"] == task.setup.key and _trusted(visit)
    ]
    if tried:
        record.value["layouts"][name] = max(tried, key=score)["layout"]


def score(visit: Mapping[str, Any]) -> float:
    """Of a layout in a sweep: the product of its throughputs, so that each number of connections counts the same."""
    product = 1.0
    for row in visit["rows"]:
        product *= row["requests_per_second"]
    return product


def _final(bench: Bench, task: Task, record: Record) -> None:
    assert task.setup is not None
    reference = task.setup.form in ("documented", "shipped", "one-thread")
    seconds = bench.profile.reference_seconds if reference else bench.profile.burst_seconds
    _visit(bench, task, record, layout_of(task.setup, record, bench.place.device), seconds)


def _visit(bench: Bench, task: Task, record: Record, layout: Layout, seconds: float) -> None:
    setup = task.setup
    assert setup is not None
    log = bench.place.scratch / f"{task.key.replace('/', '-').replace('|', '-').replace(' ', '')}.log"
    launch = systems.launch(setup, layout, bench.place)
    refusals = bench.grey if setup.system == "torchserve" else 0

    def check(got: Sequence[answers.Answer | None]) -> answers.Verdict:
        return answers.compare(bench.expected[setup.rung], got, bench.tolerances[setup.rung], refusals)

    plan = Plan(CONNECTIONS, seconds, bench.profile.warm_up_seconds, warm_up_connections=8)
    found = measure.visit(launch, bench.photos, plan, bench.generator, log, check)
    record.value["versions"] |= {
        f"{setup.system}:{name}": version
        for name, version in launch.packages.items()
        if name.lower().replace("_", "-") in _NAMED
    }
    verdict = found.verdict
    record.value["visits"].append(
        {
            "setup": setup.key,
            "title": setup.title,
            "phase": task.kind,
            "round": task.round,
            "layout": dataclasses.asdict(layout) if setup.form in ("marina", "optimised") else None,
            "ready_seconds": round(found.ready_seconds, 3),
            "ready_pss_mib": round(found.ready_pss_mib, 1),
            "answers": verdict and {**dataclasses.asdict(verdict), "equal": verdict.equal},
            "rows": [_rounded(dataclasses.asdict(row)) for row in found.rows],
        }
    )
    if verdict is not None and not verdict.equal:
        bench.say(f"  other answers than expected: {verdict}")


def _limit(bench: Bench, task: Task, record: Record) -> None:
    seconds, cores, device = bench.profile.limit_seconds, machine.cores(), bench.place.device
    layout = schedule.default_layout(cores, device)

    def ask(what: str, threads: int, *shape: object) -> dict[str, float]:
        given = [
            what,
            bench.place.models[task.rung],
            bench.photo_folder,
            "--threads",
            threads,
            *shape,
            "--device",
            device,
        ]
        environment = _inprocess_environment(threads)
        found: dict[str, float] = program(
            "benchmarks.inprocess", [*map(str, given)], environment, bench.place.scratch, _ANSWER_SECONDS
        )
        return found

    shape = ("--workers", layout.workers, "--batch", layout.batch, "--seconds", seconds)
    many = ask("limit", layout.threads, *shape)
    alone = ask("lone", cores, "--seconds", seconds / 2)
    measured = {
        "images_per_second": many["images_per_second"],
        "cpu_ms_per_image": many["cpu_ms_per_image"],
        "lone_p50_ms": alone["p50_ms"],
        "lone_mean_ms": alone["mean_ms"],
    }
    record.value["limits"].append(
        {"rung": task.rung, "round": task.round, **dataclasses.asdict(layout), **_rounded(measured)}
    )


def _echo(bench: Bench, task: Task, record: Record) -> None:
    rows = echoes.measure_marina(bench.generator, bench.profile.burst_seconds)
    record.value["echo"] += [_rounded(row) | {"round": task.round} for row in rows]


def _text(bench: Bench, task: Task, record: Record) -> None:
    artifact = text_artifact()
    if artifact is None:
        raise NotAvailable(
            "there is no text model `agnews` in artifacts/",
            remedy="train it: marina train agnews --set data.root=PATH/test.csv",
        )
    place = dataclasses.replace(bench.place, models={PLAIN: artifact})
    # As it is shipped, which is one worker and batches up to 64, as echo has: the row compares the two.
    layout = systems.shipped_layout(artifact, machine.cores())
    launch = systems.launch(Setup("marina", "marina", PLAIN), layout, place)
    bodies = sorted((artifact / "golden").iterdir())
    plan = Plan((1, 64), bench.profile.burst_seconds, echoes.WARM_UP_SECONDS)
    launch = dataclasses.replace(launch, encode=systems.text, parse=systems.parse_any)
    log = bench.place.scratch / "text.log"
    found = measure.visit(launch, [body.read_bytes() for body in bodies], plan, bench.generator, log)
    record.value["text"] += [
        _rounded(dataclasses.asdict(row)) | {"layout": dataclasses.asdict(layout)} for row in found.rows
    ]


def _growth(bench: Bench, task: Task, record: Record) -> None:
    record.value["growth"] = growth.curves(bench.place, bench.fastest, bench.generator, bench.profile.growth_seconds)


def text_artifact() -> Path | None:
    """The newest text model, once there is one."""
    found = sorted(
        (systems.ROOT / "artifacts" / "agnews").glob("[0-9]*/model_spec.json"),
        key=lambda path: [int(part) for part in path.parent.name.split(".") if part.isdigit()],
    )
    return found[-1].parent if found else None


def publish(record: Record, *, complete: bool) -> None:
    """Add the figures to the record and save it."""
    found, reasons = figures.figures(record.value)
    record.value |= {"figures": found, "reasons": reasons, "partial": not complete}
    record.save()


def _inprocess_environment(threads: int) -> dict[str, str]:
    return systems.clean_environment(PYTHONPATH=systems.python_path(), **systems.worker_environment(threads))


def _tuned_name(setup: Setup) -> str:
    return f"{setup.system}/{setup.form}"


def _trusted(visit: Mapping[str, Any]) -> bool:
    return bool(visit["answers"] and visit["answers"]["equal"])


def _given_up(task: Task, record: Record) -> bool:
    """One try per system: what did not start once does not hold up every later round."""
    return task.setup is not None and task.setup.key in record.value["unavailable"]


def _give_up(task: Task, record: Record, error: Exception) -> None:
    reason = str(error)[-600:]
    if task.setup is not None:
        measured = any(visit["setup"] == task.setup.key for visit in record.value["visits"])
        if not measured:
            record.value["unavailable"][task.setup.key] = reason
            return
    record.value.setdefault("failed", {})[task.key] = reason


def _title(task: Task) -> str:
    what = task.setup.title if task.setup is not None else task.rung
    return " ".join(part for part in (task.kind, what, f"({task.layout})" if task.layout else "") if part)


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


_NAMED = frozenset(
    ("litserve", "bentoml", "ray", "mlserver", "fastapi", "uvicorn", "uvloop", "nvidia-pytriton", "torchserve", "java")
)
_STEPS: Mapping[schedule.Kind, Callable[[Bench, Task, Record], None]] = {
    "sweep": _sweep,
    "limit": _limit,
    "visit": _final,
    "echo": _echo,
    "text": _text,
    "growth": _growth,
}


def weights_digest(artifact: Path) -> str:
    """Which model it is, whatever version it is called."""
    return hashlib.sha256((artifact / WEIGHTS_FILE).read_bytes()).hexdigest()


def private_scratch(cache: Path) -> Path:
    """A new folder for one run's files; its path is short enough for what servers put below it."""
    folder = cache / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise BenchmarkError(f"{folder} cannot be made: {error}", remedy="choose another --cache") from error
    return folder
