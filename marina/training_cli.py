"""The commands that make a model: train, evaluate, export. They import the training package when they are called."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from marina import store
from marina.home import Home, find_home
from marina.progress import ProgressReporter
from marina.screen import Screen, shown

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key of the recipe; repeatable.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (train, evaluate, export):
        app.command()(command)


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's short name (digits, folder, ...) or path.")],
    overrides: Overrides = None,
    again: Annotated[bool, typer.Option("--again", help="Train even when the same run is already finished.")] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe, evaluate it on the test split and export the artifact. Ctrl-C, then the same command, resumes."""
    from training import config

    screen, home = Screen(as_json), find_home()
    resolved = config.load_recipe(recipe, overrides or [])

    from training import pipeline  # after the recipe is known to be good: importing torch takes seconds

    with ProgressReporter(screen.err) as report:
        trained = pipeline.train(resolved, runs=home.runs, artifacts=home.artifacts, report=report, again=again)
    screen.result(
        {
            "run": str(trained.run),
            "artifact": str(trained.artifact),
            "metrics": trained.metrics,
            "reused": trained.reused,
        }
    )
    _show_metrics(screen, trained.metrics, "already trained, nothing to do" if trained.reused else "test split")
    screen.say(f"run       {shown(trained.run)}")
    screen.say(f"artifact  {shown(trained.artifact)}")
    screen.say(f"next      marina pack {shown(trained.artifact)}")


def evaluate(
    target: Annotated[str, typer.Argument(help="A run or artifact: a folder, NAME or NAME:VERSION.")],
    root: Annotated[
        str | None, typer.Option("--root", help="Where the data lies, if not where it was in training.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a run or an artifact on its test split again."""
    from training import pipeline

    screen, home = Screen(as_json), find_home()
    with ProgressReporter(screen.err) as report:
        found = pipeline.evaluate(_run_or_artifact(home, target), report=report, root=root)
    per_class = [dataclasses.asdict(row) for row in found.per_class]
    screen.result(
        {"metrics": found.metrics, "labels": found.labels, "per_class": per_class, "confusion": found.confusion}
    )
    _show_metrics(screen, found.metrics, "test split")
    screen.table(list(per_class[0]), [list(row.values()) for row in per_class])


def export(
    run: Annotated[str, typer.Argument(help="A finished run: a folder, or its name under runs/.")],
    as_json: Json = False,
) -> None:
    """Write the artifact of a finished run again."""
    from training import pipeline

    screen, home = Screen(as_json), find_home()
    folder = Path(run) if Path(run).is_dir() else home.runs / run
    artifact = pipeline.export(folder, artifacts=home.artifacts)
    screen.result({"artifact": str(artifact)})
    screen.say(f"artifact  {shown(artifact)}")


def _show_metrics(screen: Screen, metrics: dict[str, float], title: str) -> None:
    shown = [(name, value) for name, value in metrics.items() if "/" not in name]
    screen.table(("metric", "value"), shown, title=title)


def _run_or_artifact(home: Home, text: str) -> Path:
    if Path(text).is_dir():
        return Path(text)
    run = home.runs / text
    return run if run.is_dir() else store.find_artifact(home.artifacts, text)
