"""The command that sets variants of a training side by side: compare. It imports the training package when called."""

from __future__ import annotations

from typing import Annotated

import typer

from marina.home import find_home
from marina.progress import ProgressReporter
from marina.screen import Screen, shown
from marina.training_cli import Json, Overrides


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(compare)


def compare(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Short names or paths; one will do.")],
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="A.B=C,D,...", help="One variant for each value; repeatable, then all pairs."),
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option("--variant", metavar='"A.B=C D.E=F"', help="One variant with these values; repeatable."),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train variants on the same data and draw them on one figure. Ctrl-C, then the same command, resumes.

    Figures are those of the validation split: the test split is for the one that you choose and train.
    """
    screen, home = Screen(as_json), find_home()

    from training import compare as comparing

    asked = comparing.read_variants(recipes, overrides=overrides or [], vary=vary or [], sets=variants or [])
    with ProgressReporter(screen.err) as report:
        found = comparing.compare(asked, runs=home.runs, report=report)
    screen.result(found.fields())
    screen.table(comparing.COLUMNS, [row.cells() for row in found.rows], title="validation split, best epoch of each")
    screen.say(f"chart     {shown(found.folder / comparing.CHART_FILE)}")
    if found.failure is not None:
        screen.end_with(found.failure)
