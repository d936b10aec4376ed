"""While an operator works: deploy, rollback, scale, retire, apply, under load, one load each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.chaos import overload
from benchmarks.chaos.bench import TIMES_QUIET_P99, Bench, Finding, brief, first_failure, p99_ms, say
from benchmarks.chaos.cases import MODEL, ROOT
from benchmarks.errors import BenchmarkError


def operator(bench: Bench) -> Finding:
    """Nothing failed, nothing wrong, and the slowest per cent at most half as slow again as when nothing happens."""
    steps: dict[str, Callable[[], object]] = {
        "deploy v2": lambda: bench.rollout().deploy(bench.cases.archives["2.0"]),
        "rollback": lambda: bench.rollout().rollback(MODEL),
        "scale 1->4->1": lambda: _scale(bench),
        "retire": lambda: bench.rollout().retire(MODEL, "2.0"),
        "apply": lambda: _apply(bench),
    }
    found: dict[str, Any] = {}
    usual = bench.quiet_p99_ms
    for name, action in steps.items():
        with bench.load() as under:
            action()
            seconds = under.seconds()
        result = under.found()
        found[name] = brief(result) | {"action_seconds": round(seconds, 1)}
        failed_words = f"{result.failed} of {result.planned} failed{first_failure(result)}"
        say(f"    {name}: {failed_words}, p99 {p99_ms(result):.0f} ms, {seconds:.1f} s")
    bench.restore()
    after = overload.quiet(bench, bench.form.least)
    # On a machine that others use too, what is usual changes meanwhile.
    usual = max(usual, bench.quiet_p99_ms)
    for item in found.values():
        item["p99_over_quiet"] = round((item["p99_ms"] or float("inf")) / usual, 2)
    failed = sum(sum(item["errors"].values()) for item in found.values())
    planned = sum(item["planned"] for item in found.values())
    ratios = ", ".join(f"{name} {item['p99_over_quiet']:.1f}x" for name, item in found.items())
    kept = failed == 0 and all(item["p99_over_quiet"] <= TIMES_QUIET_P99 for item in found.values())
    return Finding(
        f"{failed} of {planned} failed or wrong; p99: {ratios}", kept, {"actions": found, "quiet after": brief(after)}
    )


def _scale(bench: Bench) -> None:
    for workers in (4, 1):
        bench.rollout().scale(MODEL, workers)


def _apply(bench: Bench) -> None:
    """A file that wants version 2.0 as the default beside 1.0; then the same again, which must change nothing."""
    store = bench.stack.store
    (store / f"{MODEL}-2.0.mar").unlink(missing_ok=True)
    lines = [
        f"[models.{MODEL}]", 'default = "1.0"',
        f'versions = {{ "1.0" = 1, "2.0" = {{ workers = 1, archive = "{bench.cases.archives["2.0"]}" }} }}',
    ]  # fmt: skip
    for server in bench.stack.servers:
        lines += [
            f"[hosts.{server.name}]", 'target = "local"', f'url = "{server.url("management")}"',
            f'inference_url = "{server.url("inference")}"', f'supervisor_url = "{server.url("supervisor")}"',
            f'store = "{store}"',
        ]  # fmt: skip
    file = store.parent / "deploy.toml"
    file.write_text("\n".join(lines) + "\n")
    _marina("apply", file)
    if "nothing to change" not in _marina("apply", file):
        raise BenchmarkError("a second apply changed something", remedy=f"see {file}")


def _marina(*arguments: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MARINA_")}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT / "handlers"), str(ROOT))), "MARINA_HOME": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "marina", *map(str, arguments)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise BenchmarkError(f"marina {arguments[0]}: {done.stderr.strip()[-500:]}", remedy="see the message")
    return done.stdout + done.stderr
