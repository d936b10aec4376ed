"""The command that makes smaller and faster forms of a model: compress. It imports the training package when called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from handlerlib.spec import WEIGHTS_FILE
from marina import archive, store
from marina.errors import ArchiveError
from marina.home import Home, find_home
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
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None,
        typer.Option("--device", help="What it will be served on; int8 is for CPUs (the recipe's by default)."),
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

    Pruning, quantisation and distillation, as far as they apply. Ctrl-C, then the same command, resumes. NAME is its newest
    version, or, where this command or optimize made that, what it was made from.
    """
    screen, home = Screen(as_json), find_home()
    folder = _what(screen, home, target)

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
        device=device,
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
    if result.best is not None and result.best.artifact is not None:
        newest = store.find_artifact(home.artifacts, result.name)
        screen.say(
            f"next      marina pack {_key(result.best.artifact)}  ({result.best.name}, the best of what is kept)"
        )
        screen.say(f"note      {result.name} alone now means {_key(newest)}")


def _what(screen: Screen, home: Home, target: str) -> Path:
    """The run or artifact to compress. Raises ArchiveError when it is not there."""
    folder = store.find_trained(home.runs, home.artifacts, target)
    if folder.parent != home.artifacts / target:  # a folder, a run or NAME:VERSION
        return folder
    origin = _trained(home, folder)
    if origin != folder:
        screen.say(f"from      {_key(origin)}, which {_key(folder)} was made from")
    return origin


def _trained(home: Home, folder: Path) -> Path:
    """The artifact, or what it comes from that neither compress nor optimize made.

    Forms of forms would each be allowed to lose the budget anew. Raises ArchiveError when it is gone.
    """
    seen = {folder}
    while (parent := _parent(folder)) is not None:
        places = (home.artifacts / parent["name"] / parent["version"], home.runs / parent["run"])
        found = [place for place in places if _digest(place) == parent["weights_sha256"]]
        if not found:
            raise ArchiveError(
                f"{_key(folder)} was made from {parent['name']}:{parent['version']}, which is not there any more",
                remedy=f"to make forms of this form: marina compress {_key(folder)}",
            )
        if found[0] in seen:
            raise ArchiveError(
                f"{_key(folder)} names itself as what it was made from",
                remedy=f"name the version that was trained: marina compress {folder.parent.name}:VERSION",
            )
        folder = found[0]
        seen.add(folder)
    return folder


def _parent(folder: Path) -> dict[str, str] | None:
    """What compress or optimize made this from; None of what was trained."""
    try:
        origin: dict[str, Any] = json.loads((folder / archive.PROVENANCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    parent: dict[str, str] | None = (origin.get("compression") or {}).get("parent") or origin.get("parent")
    return parent


def _digest(folder: Path) -> str | None:
    return archive.sha256_of(folder / WEIGHTS_FILE) if (folder / WEIGHTS_FILE).is_file() else None


def _key(artifact: Path) -> str:
    return f"{artifact.parent.name}:{artifact.name}"
