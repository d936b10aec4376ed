"""`python -m benchmarks`: Marina beside its peers on this machine, in one run.

Writes `benchmarks/results/DEVICE.json` and, from it, the tables and plots of `benchmarks/README.md`. A quick run stays in
the cache folder: its figures are for looking at only.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import environments, load, machine, photos, report, run, schedule, systems
from benchmarks.errors import BenchmarkError
from benchmarks.photos import Photo
from benchmarks.record import Record
from benchmarks.run import Bench
from benchmarks.systems import PLAIN, TITLES, Place
from handlerlib.errors import MarinaError
from handlerlib.spec import ModelSpec, closest
from marina import store
from marina.errors import ArchiveError
from marina.home import find_home
from marina.screen import Screen

RUNGS = {"cpu": ("openvino-bf16", "openvino-int8"), "cuda": ("torch-bf16", "aoti-bf16")}
"""Beside the plain float32 weights; slowest first: the last one that can be built is what peers get."""
YARDSTICK = "cifar10_resnet18"
"""The model whose figures are promised."""
_BUSY_CORES = 0.3
"""Of other programs: beside more than that no figure is worth keeping."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


Artifact = Annotated[str, typer.Option(help="The model: a folder, NAME or NAME:VERSION.")]
ProfileName = Annotated[
    str, typer.Option(help="standard (up to 45 minutes), or quick (6 minutes, for looking at only).")
]
Only = Annotated[str, typer.Option(help=f"Some systems: {', '.join(TITLES)}.")]
Rungs = Annotated[str, typer.Option(help="Rungs of the ladder beside the plain weights; by default the device's.")]
Photos = Annotated[Path | None, typer.Option("--photos", help="Your own JPEGs instead of the 64 standard ones.")]
DataRoot = Annotated[Path | None, typer.Option(help="Where the images for calibration and accuracy lie.")]
Cache = Annotated[Path, typer.Option(help="Environments of the peers, built models, logs.")]
Resume = Annotated[bool, typer.Option(help="Go on with the results file: same machine, boot, model, photos.")]
Beside = Annotated[bool, typer.Option(help="Measure although other programs are busy, and say so in the results.")]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")]


@app.command()
def compare(
    artifact: Artifact = YARDSTICK,
    device: Annotated[str, typer.Option(help="cpu, or cuda (also: gpu).")] = "cpu",
    profile: ProfileName = "standard",
    only: Only = "",
    rungs: Rungs = "",
    photo_folder: Photos = None,
    data_root: DataRoot = None,
    cache: Cache = Path(".bench"),
    output: Annotated[Path | None, typer.Option(help="The JSON file.")] = None,
    resume: Resume = False,
    beside: Beside = False,
    as_json: Json = False,
) -> None:
    """Measure."""
    screen = Screen(as_json)
    device = find_device(device)
    chosen = _profile(profile)
    wanted = _systems(only)
    environments.ignore(cache.resolve())
    cache = cache.resolve()
    scratch = run.private_scratch(cache)
    quiet = _require_quiet(screen, beside)
    bench, identity, notes = _prepare(
        screen, artifact, device, chosen, rungs or ",".join(RUNGS[device]), photo_folder, data_root, cache, scratch
    )
    target = output or _default_output(chosen.name, device, cache)
    record = Record.resume(target, identity) if resume else Record.start(target, identity)

    def plan(names: list[str]) -> list[schedule.Task]:
        return schedule.plan(
            chosen, bench.rungs, bench.fastest, names, machine.cores(), device=device, text=bool(run.text_artifact())
        )

    whole, tasks = plan(list(TITLES)), plan(wanted)
    record.value |= _conditions(bench, notes, quiet)
    run.install(cache, tasks, record, screen.note)
    try:
        run.carry_out(bench, tasks, record)
    finally:
        run.publish(record, complete=all(record.done(task.key) for task in whole))
    if chosen.name == "standard":
        report.write(target)
    screen.result({"results": str(target), "figures": record.value["figures"], "reasons": record.value["reasons"]})
    screen.table(("figure", "must reach", "measured"), report.figure_rows(record.value))
    screen.say(f"results  {target}")
    shutil.rmtree(scratch / "photos", ignore_errors=True)


@app.command()
def tables(
    results: Annotated[Path, typer.Argument(help="A JSON file of `compare`.")] = Path("benchmarks/results/cpu.json"),
) -> None:
    """Write the tables and plots of README.md again, from a results file."""
    report.write(results)


def find_model(artifacts: Path, text: str) -> Path:
    """The artifact's folder. Raises ArchiveError; BenchmarkError, which says how to train it, for the usual model."""
    try:
        return store.find_artifact(artifacts, text)
    except ArchiveError as error:
        if text != YARDSTICK:
            raise
        raise BenchmarkError(
            f"there is no artifact {YARDSTICK}, the model that the systems are compared with",
            remedy=f"train it, half an hour on two cores: marina train {YARDSTICK} (downloads CIFAR-10, or reads yours: "
            "--set data.root=cifar10-jpeg.zip)",
        ) from error


def find_device(word: str) -> str:
    """A key of RUNGS, which `make up` calls by another word. Raises BenchmarkError for none, and for a GPU without one."""
    device = "cuda" if word == "gpu" else word
    if device not in RUNGS:
        raise BenchmarkError(f"no device '{word}'", remedy=f"one of {', '.join(RUNGS)}")
    if device == "cuda" and not machine.gpus():
        raise BenchmarkError("nvidia-smi lists no GPU on this machine", remedy="--device cpu")
    return device


def _profile(name: str) -> schedule.Profile:
    if name not in schedule.PROFILES:
        raise BenchmarkError(
            f"no profile '{name}'{closest(name, schedule.PROFILES)}", remedy=f"one of {', '.join(schedule.PROFILES)}"
        )
    return schedule.PROFILES[name]


def _systems(only: str) -> list[str]:
    names = [name.strip() for name in only.split(",") if name.strip()] or list(TITLES)
    for name in names:
        if name not in TITLES:
            raise BenchmarkError(f"no system '{name}'{closest(name, TITLES)}", remedy=f"one of {', '.join(TITLES)}")
    return [name for name in TITLES if name in names]


def _require_quiet(screen: Screen, beside: bool) -> float:
    busy = machine.busy_cores(2.0)
    if busy > _BUSY_CORES:
        what = f"other programs keep {busy:.1f} cores busy"
        if not beside:
            raise BenchmarkError(f"{what}: nothing measured now would hold", remedy="stop them, or say --beside")
        screen.note(f"{what}; the results say so")
    return round(busy, 2)


def _prepare(
    screen: Screen,
    artifact: str,
    device: str,
    profile: schedule.Profile,
    rungs: str,
    photo_folder: Path | None,
    data_root: Path | None,
    cache: Path,
    scratch: Path,
) -> tuple[Bench, dict[str, Any], dict[str, Any]]:
    folder = find_model(find_home().artifacts, artifact)
    found = photos.read(photo_folder) if photo_folder is not None else photos.standard()
    photo_place = scratch / "photos"
    photos.write(found, photo_place)
    names = list(dict.fromkeys([PLAIN, *(name.strip() for name in rungs.split(",") if name.strip())]))
    screen.note(f"building the model's rungs: {', '.join(names)}")
    built = run.provide_models(folder, names, cache, scratch, device, data_root)
    models = {rung: Path(item["folder"]) for rung, item in built.items() if "folder" in item}
    for rung, item in built.items():
        if "reason" in item:
            screen.note(f"{rung} takes no part: {item['reason']}")
    place = Place(cache=cache, scratch=scratch, models=models, device=device)
    expected = run.expected_answers(place, photo_place)
    bench = Bench(
        place=place,
        profile=profile,
        photos=tuple(photo.data for photo in found),
        photo_folder=photo_place,
        grey=_grey(found),
        generator=load.generator(),
        fastest=list(models)[-1],
        expected=expected,
        tolerances=run.tolerances(built),
        say=screen.note,
    )
    identity = {
        "boot": machine.boot(),
        "device": device,
        "profile": dataclasses.asdict(profile),
        "weights": run.weights_digest(folder),
        "photos": photos.digest(found),
        "rungs": list(models),
    }
    spec = ModelSpec.load(folder)
    notes = {
        "model": {
            "artifact": f"{spec.name} {spec.version}",
            "architecture": dataclasses.asdict(spec.architecture),
            "rungs": {
                rung: {key: value for key, value in item.items() if key != "folder"} for rung, item in built.items()
            },
        },
        "rungs_against_plain": run.against_plain(expected, built),
        "photos": {"count": len(found), "mean_bytes": round(photos.mean_bytes(found)), "grey": _grey(found)},
    }
    return bench, identity, notes


def _grey(found: tuple[Photo, ...]) -> int:
    return sum(photos.is_grey(photo) for photo in found)


def _conditions(bench: Bench, notes: dict[str, Any], busy: float) -> dict[str, Any]:
    versions = machine.versions() | {"load generator": load.version_of(bench.generator)}
    return {
        **notes,
        "machine": machine.describe(),
        "date": time.strftime("%Y-%m-%d"),
        "profile": bench.profile.name,
        "fastest": bench.fastest,
        "busy_cores_before": busy,
        "package_versions": versions,
        "reasons": {} if run.text_artifact() else {"text_at_64_over_echo": "there is no text model `agnews` yet"},
    }


def _default_output(profile: str, device: str, cache: Path) -> Path:
    """Committed results come from a standard run only."""
    folder = systems.ROOT / "benchmarks" / "results"
    return folder / f"{device}.json" if profile == "standard" else cache / "results" / f"{device}-{profile}.json"


def main() -> None:
    """Run; every error ends here, as one or two lines and an exit code."""
    try:
        if len(sys.argv) < 2 or sys.argv[1] not in ("compare", "tables", "--help"):
            sys.argv.insert(1, "compare")
        app()
    except MarinaError as error:
        Screen("--json" in sys.argv).failure(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
