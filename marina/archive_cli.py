"""The commands on archives: pack, verify, inspect."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from marina import archive, store
from marina import verify as verification
from marina.errors import ArchiveError, StoreError
from marina.home import Home, find_home
from marina.screen import Screen, shown

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (pack, verify, inspect):
        app.command()(command)


def pack(
    artifact: Annotated[str, typer.Argument(help="An artifact: a folder, NAME or NAME:VERSION.")],
    destination: Annotated[
        Path | None, typer.Option("--store", help="Where to write the archive (model_store/ by default).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack an artifact into model_store/NAME-VERSION.mar, byte for byte reproducible."""
    screen, home = Screen(as_json), find_home()
    target = destination or home.store
    packed = archive.pack(store.find_artifact(home.artifacts, artifact), handlers=home.handlers, destination=target)
    store.publish(target, packed)
    screen.result(packed.fields)
    screen.say(f"archive  {shown(packed.path)}")
    screen.say(f"sha256   {packed.sha256}")
    screen.say(f"size     {packed.size / 1e6:.2f} MB")


def verify(
    mar: Annotated[str, typer.Argument(help="An archive: a file, NAME or NAME:VERSION of model_store/.")],
    python: Annotated[str, typer.Option("--python", help="The interpreter that will serve it.")] = sys.executable,
    publish: Annotated[bool, typer.Option("--publish", help="Add it to its folder's index when it passes.")] = False,
    as_json: Json = False,
) -> None:
    """Check an archive without trusting it: safe, unchanged, loads in TorchServe, answers as it was exported."""
    screen, home = Screen(as_json), find_home()
    path = _archive_path(home, mar)
    report = verification.verify(path, python=python)
    if publish and report.passed:
        store.publish(path.parent, verification.identify(path, report))
    screen.result({"archive": str(path), "sha256": report.sha256, "passed": report.passed} | _check_fields(report))
    _show_report(screen, report)
    if not report.passed:
        error = ArchiveError(
            f"{shown(path)} is refused: {len(report.findings)} finding{'s' if len(report.findings) != 1 else ''}, "
            f"the first: {report.findings[0].where}: {report.findings[0].message}",
            remedy=report.findings[0].remedy,
        )
        screen.end_with(error)


def inspect(
    mar: Annotated[str, typer.Argument(help="An archive: a file, NAME or NAME:VERSION of model_store/.")],
    as_json: Json = False,
) -> None:
    """Show what is inside an archive, from the file alone: nothing is unpacked or run."""
    screen, home = Screen(as_json), find_home()
    found = verification.inspect(_archive_path(home, mar))
    screen.result(found)
    _show_archive(screen, found)


def _show_report(screen: Screen, report: verification.Report) -> None:
    screen.table(
        ("check", "result", "seconds"),
        [
            (outcome.check, "skipped" if outcome.skipped else "REFUSED" if outcome.findings else "ok", outcome.seconds)
            for outcome in report.outcomes
        ],
        title=str(shown(report.path)),
    )
    for outcome in report.outcomes:
        for note in outcome.notes:
            screen.say(f"note: {note}")
    for finding in report.findings:
        screen.say(f"{finding.where}: {finding.message}\n  fix: {finding.remedy}")


def _show_archive(screen: Screen, found: dict[str, Any]) -> None:
    spec = found["spec"]
    # A vocabulary has tens of thousands of terms.
    how = spec.get("preprocess") or {key: value for key, value in spec["text"].items() if key != "vocabulary"}
    screen.table(
        ("", f"{spec['name']} {spec['version']}"),
        [
            ("archive", shown(Path(found["archive"]))),
            ("sha256", found["sha256"]),
            ("handler", spec["handler"]),
            ("architecture", json.dumps(spec["architecture"])),
            ("preprocess", json.dumps(how)),
            ("labels", ", ".join(spec["labels"])),
            ("limits", json.dumps(spec["limits"])),
            ("golden", f"{len(spec['golden']['samples'])} samples, tolerance {spec['golden']['tolerance']:g}"),
            ("engine", _engine_line(found["engine"])),
            ("metrics", json.dumps(found["build"]["metrics"])),
            ("provenance", json.dumps(found["build"]["provenance"])),
            ("built with", json.dumps(found["build"]["built_with"])),
        ],
    )
    screen.table(("file", "bytes"), sorted(found["files"].items()))
    screen.say(found["config"])


def _engine_line(engine: dict[str, Any] | None) -> str:
    if engine is None:
        return "none, the plain weights answer"
    wanted = engine["built_for"]
    packages = (f"{one['name']} >= {one['at_least']}, < {one['below']}" for one in wanted["packages"])
    needs = ", ".join([wanted["device"], wanted["machine"], *wanted["cpu_features"], *packages])
    return f"{engine['rung']}, tolerance {engine['tolerance']:g}, for {needs}; elsewhere the plain weights answer"


def _check_fields(report: verification.Report) -> dict[str, Any]:
    return {"checks": [dataclasses.asdict(outcome) for outcome in report.outcomes]}


def _archive_path(home: Home, text: str) -> Path:
    """A file, or NAME[:VERSION] in the store. Raises ArchiveError."""
    path = Path(text)
    if path.is_file() or (path.suffix == ".mar" and not path.is_dir()):
        return path
    try:
        return store.select(home.store, [text])[0].path
    except StoreError:
        if not path.is_dir():
            raise
        raise ArchiveError(
            f"{path} is a folder, not an archive", remedy=f"give a .mar file; an artifact's: marina pack {path}"
        ) from None
