"""The command that tunes hyperparameters: search. It imports the training package when called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from marina.home import find_home
from marina.progress import ProgressReporter
from marina.screen import Screen, shown
from marina.training_cli import Json, Overrides

if TYPE_CHECKING:
    from training.search import Found

_SHOWN = 10
"""Trials in the table; the report has all."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(search)


def search(
    recipe: Annotated[
        str, typer.Argument(help="A recipe's short name or path; its table \\[search] says what varies.")
    ],
    space: Annotated[
        list[str] | None,
        typer.Option("--space", metavar="A.B=RANGE", help="1e-4..1e-1,log or 16..64,step=16 or sgd,adamw; repeatable."),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="In all; more later go on from those done.")] = 20,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes that share the study.")] = 1,
    prune: Annotated[bool, typer.Option("--prune/--no-prune", help="Stop trials that fall behind.")] = True,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Tune hyperparameters on the validation split and write the best recipe. After Ctrl-C or a kill the same command
    goes on, unfinished trials from their checkpoints.
    """
    from training import config

    screen, home = Screen(as_json), find_home()
    resolved = config.load_recipe(recipe, overrides or [])

    from training import search as searching

    wanted = searching.read_space(resolved, space or [])
    with ProgressReporter(screen.err) as report:
        found = searching.search(wanted, trials=trials, runs=home.runs, report=report, jobs=jobs, prune=prune)
    screen.result(found.fields())
    _show(screen, found)
    screen.say(f"chart     {shown(found.folder / searching.CHART_FILE)}")
    if found.best is None:
        screen.say("best      none: no trial was finished; see the errors above")
    else:
        screen.say(f"best      {shown(found.best)}")
        screen.say(f"next      marina train {shown(found.best)}")


def _show(screen: Screen, found: Found) -> None:
    keys = list(dict.fromkeys(key for one in found.trials for key in one["values"]))
    best_first = sorted(
        found.trials,
        key=lambda one: (
            one["state"] != "complete",
            one["value"] is None,
            (one["value"] or 0.0) * (1 if found.monitor == "loss" else -1),
            one["validation_loss"] or 0.0,
        ),
    )
    rows = [
        [
            one["number"],
            one["state"],
            "" if one["value"] is None else f"{one['value']:.4f}",
            one["epochs"],
            *(_cell(one["values"].get(key, "")) for key in keys),
            one["error"] or "",
        ]
        for one in best_first[:_SHOWN]
    ]
    screen.table(["trial", "state", found.monitor, "epochs", *keys, ""], rows, title=f"{len(found.trials)} trials")
    if found.importance:
        screen.table(["key", "importance"], [[key, round(part, 3)] for key, part in found.importance.items()])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
