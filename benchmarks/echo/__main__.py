"""Requests per second and latency of the echo model on each server, side by side.

    python -m benchmarks.echo [--seconds 8] [--repeats 3] [--systems stock,stock-quiet,marina] [--json FILE]

The servers run one at a time, in turns, so that a machine that slows down slows all of them down. Body and answer have
784 bytes. Needs wrk.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import load, measure
from benchmarks.echo.systems import SYSTEMS, TITLES
from benchmarks.measure import Plan, Row, Visit

BODY_BYTES = 784
CONNECTIONS = (1, 64)


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.echo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each burst")
    parser.add_argument("--warm-up", type=float, default=8.0, help="seconds of load before the bursts")
    parser.add_argument("--repeats", type=int, default=3, help="starts of each server")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    chosen = parser.parse_args(arguments)
    names = chosen.systems.split(",")
    plan = Plan(connections=CONNECTIONS, seconds=chosen.seconds, warm_up=chosen.warm_up)
    visits: dict[str, list[Visit]] = {name: [] for name in names}
    for _ in range(chosen.repeats):
        for name in names:
            visits[name].append(_visit(name, plan))
            sys.stderr.write(f"{name}: {_brief(visits[name][-1])}\n")
    print(_table(visits))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({name: [asdict(visit) for visit in found] for name, found in visits.items()}))


def _visit(name: str, plan: Plan) -> Visit:
    with tempfile.TemporaryDirectory(prefix="echo-", dir="/tmp") as scratch:  # short: it holds Unix sockets
        folder = Path(scratch)
        launch = SYSTEMS[name](folder)
        return measure.visit(launch, [_body()], plan, load.generator(), folder / "output.txt")


def _body() -> bytes:
    return random.Random(0).randbytes(BODY_BYTES)


def _brief(visit: Visit) -> str:
    return (
        "; ".join(
            f"c={row.connections}: {row.requests_per_second:.0f}/s, p50 {row.p50_ms:.2f} ms, p99 {row.p99_ms:.2f} ms, "
            f"CPU {row.server_cpu_ms or 0:.3f} ms, {row.failed} failed, {row.pss_mib:.0f} MiB"
            for row in visit.rows
        )
        + f"; ready in {visit.ready_seconds:.1f} s"
    )


def _table(visits: dict[str, list[Visit]]) -> str:
    lines = [
        "| server | connections | requests/s (each start) | p50 ms | p99 ms | CPU ms/request | PSS MiB | failed |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for index, connections in enumerate(CONNECTIONS):
        for name, found in visits.items():
            lines.append(_line(TITLES[name], connections, [visit.rows[index] for visit in found]))
    return "\n".join(lines)


def _line(title: str, connections: int, rows: Sequence[Row]) -> str:
    rates = [row.requests_per_second for row in rows]
    each = ", ".join(f"{rate:.0f}" for rate in rates)
    cpu = statistics.median(row.server_cpu_ms or 0.0 for row in rows)
    return (
        f"| {title} | {connections} | **{statistics.median(rates):.0f}** ({each}) "
        f"| {statistics.median(row.p50_ms for row in rows):.2f} | {statistics.median(row.p99_ms for row in rows):.2f} "
        f"| {cpu:.3f} | {statistics.median(row.pss_mib for row in rows):.0f} | {sum(row.failed for row in rows)} |"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
