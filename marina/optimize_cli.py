"""The command that looks for the fastest form of a model on this machine: optimize. It imports training when called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from handlerlib.spec import ModelSpec
from marina import archive, model_config, store
from marina.home import Home, find_home
from marina.progress import ProgressReporter
from marina.screen import Screen, shown
from marina.training_cli import Json

if TYPE_CHECKING:
    from training.optimize.ladder import Outcome, Result


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(optimize)


def optimize(
    target: Annotated[str, typer.Argument(help="An artifact: a folder, NAME or NAME:VERSION.")],
    device: Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="What it will be served on.")] = "cpu",
    budget: Annotated[
        float, typer.Option("--budget", min=0, max=100, help="Percentage points of accuracy that may be lost.")
    ] = 0.5,
    objective: Annotated[
        Literal["throughput", "latency", "both"],
        typer.Option("--objective", help="A full batch on one core, one image on all cores, or both."),
    ] = "both",
    data: Annotated[
        Path | None, typer.Option("--data", help="Where the images lie, if not where they were in training.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Test images to judge accuracy on; 0: all.")] = 2000,
    only: Annotated[
        list[str] | None, typer.Option("--rung", metavar="RUNG", help="Try only this rung; repeatable.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="Time of each measurement.")] = 2.0,
    pack: Annotated[bool, typer.Option("--pack/--no-pack", help="Pack the new version into model_store/.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Measure again what an earlier run measured.")] = False,
    as_json: Json = False,
) -> None:
    """Find the fastest form of a model that keeps its accuracy on this machine, and pack it with the plain weights.

    Run it on the hardware that will serve, with nothing else running. Ctrl-C, then the same command, resumes.
    """
    screen, home = Screen(as_json), find_home()
    artifact = store.find_artifact(home.artifacts, target)

    from training.optimize import ladder

    settings = ladder.Settings(
        device=device,
        budget=budget,
        objective=objective,
        limit=limit,
        seconds=seconds,
        batch_size=_batch_size(home, artifact),
        rungs=tuple(only or ()),
        root=data,
    )
    with ProgressReporter(screen.err) as report:
        result = ladder.run(artifact, settings, runs=home.runs, artifacts=home.artifacts, report=report, again=again)
    packed = None
    if result.artifact is not None and pack:
        packed = archive.pack(result.artifact, handlers=home.handlers, destination=home.store)
        store.publish(home.store, packed)
    screen.result(
        {
            "run": str(result.run),
            "chosen": result.chosen,
            "artifact": str(result.artifact) if result.artifact else None,
            "archive": packed.fields if packed else None,
            "notes": list(result.notes),
            "reused": result.reused,
            "rungs": [ladder.row(outcome) for outcome in result.outcomes],
        }
    )
    _show(screen, result, f"{shown(artifact)} on {device}, budget {budget:g} points")
    if packed is not None:
        screen.say(f"archive  {shown(packed.path)}  {packed.size / 1e6:.2f} MB")


def _show(screen: Screen, result: Result, title: str) -> None:
    columns = ("rung", "ms alone", "ms busy", "x alone", "x busy", "load s", "MiB", "accuracy", "lost", "")
    screen.table(columns, [_cells(one, result.chosen) for one in result.outcomes], title=title)
    for note in result.notes:
        screen.say(f"note     {note}")
    screen.say(f"run      {shown(result.run)}{' (measured earlier; --again measures anew)' if result.reused else ''}")
    if result.artifact is not None:
        screen.say(f"artifact {shown(result.artifact)}  served by {result.chosen}, plain where that does not fit")


def _cells(outcome: Outcome, chosen: str | None) -> list[object]:
    """ms per image of one image on all cores and of a full batch on one core, and how many times plain's speed that is."""
    verdict = "taken" if outcome.rung == chosen else outcome.reason
    if outcome.trial is None:
        return [outcome.rung, *[""] * 8, verdict]
    figures = outcome.trial.measurements
    alone, busy = figures[0], max((one for one in figures if one.threads == 1), key=lambda one: one.batch)
    judged: list[Any] = ["", ""]
    if outcome.accuracy is not None:
        low, high = outcome.accuracy.interval_points
        lost = f"{outcome.accuracy.loss_points:+.2f} ({low:+.2f} to {high:+.2f})"
        judged = [f"{outcome.accuracy.engine:.4f}", lost]
    return [
        outcome.rung,
        f"{alone.milliseconds:.2f}",
        f"{busy.milliseconds:.2f}",
        f"{alone.reference_milliseconds / alone.milliseconds:.2f}",
        f"{busy.reference_milliseconds / busy.milliseconds:.2f}",
        f"{outcome.trial.load_seconds:.2f}",
        str(outcome.trial.memory_mib),
        *judged,
        verdict,
    ]


def _batch_size(home: Home, artifact: Path) -> int:
    """The largest batch that workers of this model get."""
    own = artifact / model_config.CONFIG_FILE
    handler = home.handlers / f"{ModelSpec.load(artifact).handler}.yaml"
    values = model_config.read((own if own.is_file() else handler).read_text(encoding="utf-8"))
    return int(values["batchSize"])
