"""The command that says what is wrong: doctor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from marina.doctor import examine
from marina.doctor.finding import Finding
from marina.home import find_home
from marina.screen import Screen

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of sentences.")]


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(doctor)


def doctor(
    log: Annotated[
        Path | None, typer.Option("--log", help="Also a log: of `marina serve`, or TorchServe's own ts_log.log.")
    ] = None,
    log_only: Annotated[
        bool, typer.Option("--log-only", help="Nothing but that log, e.g. one from elsewhere.")
    ] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Do what is safe: it loses nothing and stops nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Name what is wrong with this machine, the model store, the server or a log, each with its remedy.

    Ends with 0 when no fault was found (warnings may be), else with the code that the first fault's command would end
    with.
    """
    if log_only and log is None:
        raise typer.BadParameter("--log-only needs --log FILE")
    screen = Screen(as_json)
    found = examine.examine_log(log) if log is not None and log_only else examine.examine(find_home(), log=log)
    repaired = _repair(found, screen) if fix else []
    faults = [finding for finding in found if finding.severity == "fault" and finding not in repaired]
    screen.result(
        {
            "faults": len(faults),
            "findings": [_as_dict(finding, repaired=finding in repaired) for finding in found],
        }
    )
    for finding in found:
        _tell(screen, finding, repaired=finding in repaired)
    if not found:
        screen.say("nothing is wrong here")
    if faults:
        raise typer.Exit(faults[0].exit_code)


def _repair(found: Sequence[Finding], screen: Screen) -> list[Finding]:
    """Those that were repaired; of the others it is said why not."""
    repaired = []
    for finding in found:
        if finding.repair is None:
            continue
        try:
            finding.repair.run()
        except OSError as error:
            screen.say(f"not done: {finding.repair.what}: {error.strerror}")
        else:
            repaired.append(finding)
    return repaired


def _tell(screen: Screen, finding: Finding, *, repaired: bool) -> None:
    screen.say(f"{finding.severity}: {finding.cause}  [{finding.code}]")
    if finding.evidence:
        screen.say(f"    seen: {finding.evidence}")
    if repaired and finding.repair is not None:
        screen.say(f"    done: {finding.repair.what}")
    else:
        screen.say(f"    fix: {finding.remedy}")


def _as_dict(finding: Finding, *, repaired: bool) -> dict[str, Any]:
    values = dataclasses.asdict(dataclasses.replace(finding, repair=None))
    del values["repair"]
    return {**values, "can_fix": finding.repair is not None, "fixed": repaired}
