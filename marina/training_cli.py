"""The commands that make a model: train, evaluate, export. They import the training package when they are called."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marina import scoring, scoring_view, store
from marina.errors import ConfigError
from marina.home import Home, find_home
from marina.progress import ProgressReporter
from marina.screen import Screen, shown

if TYPE_CHECKING:  # it comes with torch, which takes seconds
    from training.evaluate import Evaluation
    from training.html_report import Subject
    from training.scoring import Comparison, Questions

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key of the recipe; repeatable.")
]
_SHOWN = 10
"""Samples without an answer that are named on the screen."""


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (train, evaluate, export):
        app.command()(command)


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's short name (digits, folder, ...) or path.")],
    overrides: Overrides = None,
    again: Annotated[bool, typer.Option("--again", help="Train even when the same run is already finished.")] = False,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Train in this many processes: cores of a CPU, or a GPU each.")
    ] = 1,
    restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, help="How often to go on from the checkpoint when one is killed.")
    ] = 3,
    as_json: Json = False,
) -> None:
    """Train a recipe, evaluate it on the test split and export the artifact. Ctrl-C, then the same command, resumes.

    Over several machines: torchrun --nnodes ... -m marina train RECIPE, with the project folder on all of them.
    """
    from training import config

    screen, home = Screen(as_json), find_home()
    resolved = config.load_recipe(recipe, overrides or [])

    from training import distributed, distributed_launch, pipeline  # importing torch takes seconds: after the recipe
    from training.errors import PeerFailed

    with ProgressReporter(screen.err) as report:
        folders = {"runs": home.runs, "artifacts": home.artifacts}
        if processes > 1 and not distributed.launched():
            trained = distributed_launch.train(
                resolved, processes=processes, restarts=restarts, report=report, again=again, **folders
            )
        else:
            try:
                trained = pipeline.train(resolved, report=report, again=again, **folders)
            except PeerFailed:
                raise typer.Exit(0) from None
    if distributed.follows():
        return
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
    target: Annotated[
        str,
        typer.Argument(help="A run or artifact: a folder, NAME or NAME:VERSION. With --url: a served NAME[:VERSION]."),
    ],
    root: Annotated[
        str | None, typer.Option("--root", help="Where the data lies, if not where it was in training.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Score on this, not the test split: a folder with one folder per class, a .zip of one, or a .csv.",
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Score what is served there, e.g. http://127.0.0.1:8080.")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", envvar="MARINA_KEY_FILE", help="The gateway's key, e.g. secrets/inference.key."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="With --url: requests at once.")] = 8,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="With --url: ask the artifact here the same (on).")
    ] = True,
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write a page with figures, plots and mistakes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a run or an artifact on its test split or other labelled data, or a served model by the same code."""
    screen, home = Screen(as_json), find_home()
    _check_paths(data, report_file)
    if url is None:
        _evaluate_here(screen, store.find_trained(home.runs, home.artifacts, target), root, data, report_file)
        return
    name, _, version = target.partition(":")
    options = scoring.Options(
        name=name,
        version=version or None,
        folder=data,
        concurrency=concurrency,
        compare=compare,
        report=report_file,
    )
    _evaluate_served(screen, home, url, key_file, root, options)


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


def _evaluate_here(screen: Screen, target: Path, root: str | None, data: Path | None, report_file: Path | None) -> None:
    from training import pipeline

    with ProgressReporter(screen.err) as report:
        asked = pipeline.questions(target, report=report, root=root, folder=data)
        found = pipeline.evaluate_on(target, asked, report=report)
    if report_file is not None:
        _write_report(report_file, pipeline.subject(target, asked, found.left_out), found, asked)
    left_out = [dataclasses.asdict(one) for one in found.left_out]
    screen.result(_figures(found) | {"left_out": left_out} | _reported(report_file))
    _show_metrics(screen, found.metrics, asked.what)
    _show_classes(screen, found)
    _show_left_out(screen, found)
    if report_file is not None:
        screen.say(f"report    {shown(report_file)}")


def _evaluate_served(
    screen: Screen, home: Home, url: str, key_file: Path | None, root: str | None, options: scoring.Options
) -> None:
    with scoring.open_client(url, key_file) as client, ProgressReporter(screen.err) as report:
        from training import judge

        score = scoring.score(client, options, home, judge.Judge(report, root), report)
    if options.report is not None:
        _write_report(options.report, served_subject(score, url), score.evaluation, score.asked)
    screen.result(scoring_view.fields(score, url) | _figures(score.evaluation) | _reported(options.report))
    scoring_view.show(screen, score, url)
    _show_classes(screen, score.evaluation)
    if options.report is not None:
        screen.say(f"report    {shown(options.report)}")
    against = scoring_view.against(score, url)
    if against is not None:
        screen.end_with(against)


def served_subject(score: scoring.Score[Questions, Evaluation, Comparison], url: str) -> Subject:
    """What a report of a served model says beside the figures."""
    from training import html_report, pipeline

    about = html_report.Subject(title="", subtitle="")
    if score.artifact is not None:
        about = pipeline.subject(score.artifact, score.asked)
    failures = [(one.name, one.reason) for one in score.answered.failures]
    return dataclasses.replace(
        about,
        title=f"Report: {score.model} {score.version} as served",
        subtitle=f"{url}, {score.asked.what}",
        served=html_report.Served(facts=scoring_view.facts(score, url), failures=failures),
        warnings=scoring_view.warnings(score),
    )


def _check_paths(data: Path | None, report_file: Path | None) -> None:
    """Before anything is computed, and in the words of these options."""
    if data is not None and not data.is_dir() and not (data.is_file() and data.suffix.lower() in (".zip", ".csv")):
        from training.errors import DataError

        raise DataError(
            f"--data {data}: there is no such folder, .zip or .csv file",
            remedy="give a folder with one folder per class, a .zip of one, or a .csv",
        )
    if report_file is None:
        return
    report_file.parent.mkdir(parents=True, exist_ok=True)
    if report_file.is_dir() or not os.access(report_file if report_file.exists() else report_file.parent, os.W_OK):
        raise ConfigError(
            f"--report {report_file} cannot be written{': it is a folder' if report_file.is_dir() else ''}",
            remedy="give another file, e.g. report.html",
        )


def _write_report(path: Path, subject: Subject, found: Evaluation, asked: Questions) -> None:
    from training import html_report

    html_report.write(path, subject, found, asked.read())


def _reported(path: Path | None) -> dict[str, str]:
    return {} if path is None else {"report": str(path)}


def _figures(found: Evaluation) -> dict[str, Any]:
    rows = [dataclasses.asdict(row) for row in found.rows]
    figures = {"metrics": found.metrics, "task": found.task, "labels": found.labels}
    if found.task == "multi-class":
        return figures | {"per_class": rows, "confusion": found.confusion}
    return figures | {"per_label" if found.task == "multi-label" else "per_target": rows}


def _show_classes(screen: Screen, found: Evaluation) -> None:
    table = [dataclasses.asdict(row) for row in found.rows]
    rows = [["–" if value is None else value for value in row.values()] for row in table]
    screen.table(list(table[0]), rows)


def _show_left_out(screen: Screen, found: Evaluation) -> None:
    if found.left_out:
        screen.say(f"{len(found.left_out)} left out:")
    for one in found.left_out[:_SHOWN]:
        screen.say(f"  {one.name}: {one.reason}")
    if len(found.left_out) > _SHOWN:
        screen.say(f"  and {len(found.left_out) - _SHOWN} more; --json names all")


def _show_metrics(screen: Screen, metrics: dict[str, float], title: str) -> None:
    shown = [(name, value) for name, value in metrics.items() if "/" not in name]
    screen.table(("metric", "value"), shown, title=title)
