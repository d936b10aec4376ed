"""One burst of load on a running server: a closed loop over a rotating set of bodies."""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.errors import BenchmarkError

Generator = Literal["wrk", "marina"]
TIMEOUT_SECONDS = 60
"""After which a request counts as failed."""
_ROTATE = Path(__file__).with_name("rotate.lua")


@dataclass(frozen=True, slots=True)
class Body:
    """One request's body, in the form that a system takes."""

    data: bytes
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Burst:
    """What came of it. Latencies are the client's, in milliseconds, of answered requests."""

    seconds: float
    good: int
    """Answers with status 200."""
    failed: int
    """Other statuses, broken connections, and requests without an answer within the timeout."""
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    client_cpu_seconds: float


def generator() -> Generator:
    """wrk where it is installed, because it costs the server's cores least; else Marina's own."""
    return "wrk" if shutil.which("wrk") else "marina"


def version_of(which: Generator) -> str:
    """For the results."""
    if which == "marina":
        return "marina.loadgen"
    said = subprocess.run(["wrk", "-v"], capture_output=True, text=True, timeout=30, check=False)
    return (said.stdout + said.stderr).partition(" [")[0].strip()


def drive(which: Generator, url: str, bodies: Sequence[Body], connections: int, seconds: float) -> Burst:
    """Keep `connections` requests in flight for `seconds`. All bodies have one content type and the same headers."""
    if which == "wrk":
        return _with_wrk(url, bodies, connections, seconds)
    return _with_marina(url, bodies, connections, seconds)


def _with_wrk(url: str, bodies: Sequence[Body], connections: int, seconds: float) -> Burst:
    first = bodies[0]
    extra = [part for pair in first.headers.items() for part in pair]
    with tempfile.TemporaryDirectory(prefix="marina-bench-") as scratch:
        for index, body in enumerate(bodies):
            (Path(scratch) / str(index)).write_bytes(body.data)
        # wrk counts whole seconds.
        length = max(1, math.ceil(seconds))
        options = ["-t1", f"-c{connections}", f"-d{length}s", "--timeout", f"{TIMEOUT_SECONDS}s", "-s", str(_ROTATE)]
        command = ["wrk", *options, url, "--", scratch, str(len(bodies)), first.content_type, *extra]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=length + TIMEOUT_SECONDS + 30, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [line for line in said.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        last = (said.stderr or said.stdout).strip().splitlines()[-1:] or ["it said nothing"]
        raise BenchmarkError(f"wrk gave no result: {last[0]}", remedy="look at the server's log")
    found = json.loads(lines[0].removeprefix("RESULT "))
    return Burst(
        seconds=found["microseconds"] / 1e6,
        good=found["requests"] - found["refused"],
        failed=found["refused"] + found["broken"] + found["late"],
        mean_ms=found["mean_us"] / 1e3,
        p50_ms=found["p50_us"] / 1e3,
        p90_ms=found["p90_us"] / 1e3,
        p99_ms=found["p99_us"] / 1e3,
        client_cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


def _with_marina(url: str, bodies: Sequence[Body], connections: int, seconds: float) -> Burst:
    from marina import loadgen

    headers = {"Content-Type": bodies[0].content_type, **bodies[0].headers}
    result = loadgen.run(
        loadgen.Scenario(
            url=url,
            payloads=tuple(loadgen.Payload(body=body.data) for body in bodies),
            headers=headers,
            loop=loadgen.Closed(connections=connections),
            duration=seconds,
            warm_up=0.0,
            timeout=float(TIMEOUT_SECONDS),
        )
    )
    latency = result.latency
    if latency is None:
        raise BenchmarkError(f"no good answer in {seconds:g} s: {result.errors}", remedy="look at the server's log")
    return Burst(
        seconds=result.seconds,
        good=result.good,
        failed=result.failed,
        mean_ms=latency.mean_ms,
        p50_ms=latency.p50.value,
        p90_ms=latency.p90.value,
        p99_ms=latency.p99.value,
        client_cpu_seconds=result.client_cpu_us * (result.good + result.failed) / 1e6,
    )
