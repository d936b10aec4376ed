"""The command that makes smaller and faster forms of a model: compress. It imports the training package when called."""

from __future__ import annotations

from typing import Annotated

import typer

from marina import store
from marina.home import find_home
from marina.progress import ProgressReporter
from marina.screen import Screen, shown
from marina.training_cli import Json


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(compress)


def compress(
    target: Annotated[str, typer.Argument(help="An artifact or run: a folder, NAME or NAME:VERSION.")],
    budget: Annotated[float, typer.Option("--budget", help="Percentage points of accuracy that may be lost.")] = 0.5,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods", help="Only these: prune,sparse,int8,int4,qat,bf16,fp16,distil; all that apply by default."
        ),
    ] = None,
    student: Annotated[
        str | None, typer.Option("--student", help="Architecture to train from the artifact's answers.")
    ] = None,
    student_epochs: Annotated[
        int | None, typer.Option("--student-epochs", help="Of the student's training (the recipe's by default).")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Of each fine-tuning (a fifth of the recipe's by default).")
    ] = None,
    minutes: Annotated[float | None, typer.Option("--time", help="Begin no new form after so many minutes.")] = None,
    importance: Annotated[
        str, typer.Option("--importance", help="What channels are chosen by: taylor, norm or batch_norm.")
    ] = "taylor",
    temperature: Annotated[float, typer.Option("--temperature", help="Of distillation: softens both answers.")] = 4.0,
    alpha: Annotated[float, typer.Option("--alpha", help="Of distillation: weight of the teacher's answers.")] = 0.9,
    hints: Annotated[
        list[str] | None,
        typer.Option(
            "--hint", metavar="STUDENT=TEACHER", help="Two layers to draw together in distillation; repeatable."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Where the data lies, if not where it was in training.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make smaller and faster versions of an artifact and keep those within the accuracy budget.

    Pruning, quantisation and distillation, as far as they apply. Ctrl-C, then the same command, resumes.
    """
    screen, home = Screen(as_json), find_home()
    folder = store.find_trained(home.runs, home.artifacts, target)

    from training.compress import chart, search

    options = search.read_options(
        budget=budget,
        methods=methods,
        student=student,
        epochs=epochs,
        student_epochs=student_epochs,
        minutes=minutes,
        importance=importance,
        distil={"temperature": temperature, "alpha": alpha, "hints": hints or []},
    )
    with ProgressReporter(screen.err) as report:
        result = search.compress(folder, options, runs=home.runs, artifacts=home.artifacts, report=report, root=data)
    fields = result.fields()
    screen.result(fields)
    screen.table(chart.BRIEF, chart.brief(fields), title=f"{shown(folder)}, budget {budget:g} points")
    kept = [row for row in result.rows if row.artifact is not None]
    for row in kept:
        assert row.artifact is not None
        screen.say(f"kept      {row.name:<24} {shown(row.artifact)}")
    if not kept:
        screen.say("kept      nothing: no form is within the budget")
    screen.say(f"report    {shown(result.folder / search.TABLE_FILE)}, {search.CHART_FILE} beside it")
