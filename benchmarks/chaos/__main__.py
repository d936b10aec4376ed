"""The promises under faults, measured on this machine.

    python -m benchmarks.chaos [--quick] [--only NAME,...] [--soak MINUTES] [--cycles N] [--requests N] [--share SHARE]

Two `marina serve` behind HAProxy, open-loop load at 60 % of the capacity measured first, every answer checked. Prints the
table and writes `benchmarks/results/chaos.json` (with --quick only where --json says): the rows measured take their place
in it, each with its date, the capacity at that time and what else was running; the others stay. A row that fails does not
stop the others. Ends with 1 when a promise was not kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.chaos import cases, endurance, faults, identity, operations, overload, resources
from benchmarks.chaos.bench import FULL, QUICK, SHARE, Bench, Finding, Form, say
from benchmarks.chaos.stack import Stack, marina_serve, running
from benchmarks.errors import BenchmarkError
from handlerlib.errors import MarinaError
from marina import archive, store
from marina import verify as verification
from marina.processes import interruptible

RESULTS = Path(__file__).resolve().parent.parent / "results" / "chaos.json"
KEPT_WORK = cases.ROOT / "runs" / "chaos"
"""Trained versions: a second run finds them."""
SOAK_MINUTES = 10.0
CYCLES = 200


@dataclass(frozen=True, slots=True)
class Row:
    """One promise."""

    name: str
    situation: str
    promise: str


ROWS = (
    Row("operator", "deploy v2, rollback, scale 1->4->1, retire, apply", "0 failed or wrong, p99 <= 1.5x the quiet p99"),
    Row(
        "kill-worker", "kill -9 of a worker every 10 s for 2 minutes",
        "0 failed; replacement READY within 5 s plus its load time",
    ),
    Row("stop-reload", "SIGTERM of one of two replicas; gateway reload", "0 failed"),
    Row("kill-java", "kill -9 of java in one of two replicas; SIGSTOP of a worker", "0 failed"),
    Row(
        "overload", "3x capacity for 60 s",
        "answered within the deadline or 429 in under 50 ms; goodput >= 90 %; recovered within 5 s",
    ),
    Row("poison", "1 % and 10 % damaged images", "the rest correct; loss at most 5 % and 20 %"),
    Row("identity", "10^6 requests of an identity model, or 2 minutes of them; cancels, retries, killed workers", "0 mixed"),
    Row("soak", "a soak", "0 unexplained errors, memory flat"),
    Row("cycles", "deploy and retire cycles", "memory, temp files, sockets, processes back to the start"),
)  # fmt: skip
_BY_DEFAULT = tuple(row.name for row in ROWS[:7])
_ACTIONS: Mapping[str, Callable[[Bench], Finding]] = {
    "operator": operations.operator,
    "kill-worker": faults.kill_workers,
    "stop-reload": faults.stop_and_reload,
    "kill-java": faults.kill_java_and_hang,
    "overload": overload.three_times,
    "poison": overload.poison,
}


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write."""
    chosen = _options(arguments)
    names = _names(chosen)
    form = QUICK if chosen.quick else FULL
    if chosen.requests:
        form = dataclasses.replace(form, requests=chosen.requests, identity=None)
    path = chosen.json or (None if chosen.quick else RESULTS)
    found: dict[str, Any] = {}
    with resources.temp_folder() as folder, interruptible():
        os.environ["TMPDIR"] = str(folder)  # of everything that is started here: what stays in it is counted
        try:
            for name, row in _measure(names, form, chosen, folder):
                found[name] = row
                if path is not None:
                    _write(path, name, row)
        finally:
            if chosen.logs is not None:
                _keep_logs(folder, chosen.logs)
    sys.stdout.write(table({"rows": found}) + "\n")
    return 0 if all(found[name]["kept"] for name in found) else 1


def table(value: Mapping[str, Any]) -> str:
    """For people, in Markdown."""
    lines = ["| while | promise | measured | kept |", "|---|---|---|---|"]
    for row in ROWS:
        item = value["rows"].get(row.name)
        if item is not None:
            lines.append(
                f"| {row.situation} | {row.promise} | {item['measured']} | {'yes' if item['kept'] else 'no'} |"
            )
    return "\n".join(lines)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter stretches: for looking at only")
    parser.add_argument("--only", default="", help=f"of {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help=f"the soak alone ({SOAK_MINUTES:g} with --only)")
    parser.add_argument("--cycles", type=int, metavar="N", help=f"the cycles alone ({CYCLES} with --only)")
    parser.add_argument(
        "--requests", type=int, metavar="N", help="so many of the identity model, however long it takes"
    )
    parser.add_argument("--share", type=float, default=SHARE, help="of the capacity; less on a machine that others use")
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="keep the logs of the gateway and the servers there"
    )
    parser.add_argument("--json", type=Path, help="the results file (results/chaos.json; with --quick: none)")
    return parser.parse_args(arguments)


def _names(chosen: argparse.Namespace) -> tuple[str, ...]:
    wanted = [name for name in chosen.only.split(",") if name]
    wanted += ["soak"] * (chosen.soak is not None) + ["cycles"] * (chosen.cycles is not None)
    known = [row.name for row in ROWS]
    for name in wanted:
        if name not in known:
            raise BenchmarkError(f"there is no row '{name}'", remedy=f"--only takes {', '.join(known)}")
    return tuple(name for name in known if name in wanted) or _BY_DEFAULT


def _measure(
    names: Sequence[str], form: Form, chosen: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row when it is done."""
    if set(names) != {"identity"}:
        say("the model: made once, then found again")
        made = cases.prepare(KEPT_WORK)
        with _served(folder, made) as stack:
            bench = Bench(stack, made, form, chosen.share)
            for name in names:
                action = _action(name, chosen, folder)
                if action is not None:
                    yield name, _row(name, bench, action)
    if "identity" in names:
        say("identity")
        yield (
            "identity",
            _judged(lambda: identity.measure(folder / "echo", form.requests, form.identity), {"form": form.name}),
        )


def _action(name: str, chosen: argparse.Namespace, folder: Path) -> Callable[[Bench], Finding] | None:
    if name == "soak":
        return lambda bench: endurance.soak(bench, chosen.soak or SOAK_MINUTES, folder)
    if name == "cycles":
        return lambda bench: endurance.cycles(bench.stack, bench.cases.archives["2.0"], chosen.cycles or CYCLES, folder)
    return _ACTIONS.get(name)


def _row(name: str, bench: Bench, action: Callable[[Bench], Finding]) -> dict[str, Any]:
    say(name)
    conditions: dict[str, Any] = {"form": bench.form.name}

    def measured() -> Finding:
        bench.restore()
        if name in _ACTIONS or name == "soak":
            conditions.update(share_of_capacity=bench.share, **overload.normal(bench))
        return action(bench)

    return _judged(measured, conditions)


def _judged(measure: Callable[[], Finding], conditions: dict[str, Any]) -> dict[str, Any]:
    """A row that cannot be measured is a promise that was not kept; the others are measured all the same. `conditions` is
    what it was measured under, and may grow meanwhile."""
    began = time.monotonic()
    conditions["measured_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    before = machine.busy_cores()
    try:
        finding = measure()
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs into the table
        say(f"    {traceback.format_exc()}")
        words = str(error) if isinstance(error, MarinaError) else f"{type(error).__name__}: {error}"
        finding = Finding(f"could not be measured: {words}", kept=False)
    conditions["others_busy_cores"] = [round(before, 2), round(machine.busy_cores(), 2)]
    conditions["row_seconds"] = round(time.monotonic() - began, 1)
    return dataclasses.asdict(finding) | conditions


@contextmanager
def _served(folder: Path, made: cases.Cases) -> Iterator[Stack]:
    """Version 1.0 on two servers with one model store."""
    models = folder / "store"
    models.mkdir()
    first = models / made.archives["1.0"].name
    shutil.copyfile(made.archives["1.0"], first)
    verified = verification.identify(first, verification.verify(first))
    store.publish(models, archive.Archive(first, verified.name, verified.version, verified.sha256, verified.size))
    with running(folder / "stack", cases.MODEL, marina_serve(models), store=models) as stack:
        yield stack


def _keep_logs(folder: Path, kept: Path) -> None:
    kept.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("*/*.log"), *folder.glob("*/*.out")]:
        shutil.copyfile(path, kept / path.name)


def _write(path: Path, name: str, row: Mapping[str, Any]) -> None:
    """As soon as it is measured: whoever interrupts the rest keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"machine": machine.describe(), "versions": machine.versions()}
    text = json.dumps(_joined(path, head, {name: row}), indent=1, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def _joined(path: Path, head: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured before, with the rows `found` in place of theirs. Figures of another machine are not kept."""
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = before.get("head", {}).get("machine") == head.get("machine")
    rows = before.get("rows", {}) if same else {}
    return {"head": dict(head), "rows": rows | dict(found)}


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MarinaError as error:
        sys.stderr.write(f"error: {error}\nfix: {error.remedy}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
