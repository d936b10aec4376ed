"""Three times more than can be answered; and requests that cannot be answered at all."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.chaos.bench import CONNECTIONS, TIMES_QUIET_P99, Bench, Finding, brief, p99_ms, say
from benchmarks.errors import BenchmarkError
from marina import loadgen
from marina.gates import p99 as p99_of
from marina.loadgen import Closed, Result

TIMES = 3.0
DEADLINE_MS = 2000
REFUSED = "HTTP 429"
REFUSED_WITHIN_MS = 50.0
_REFUSALS = ("HTTP 415", "HTTP 422")
"""Of damaged images."""
LEAST_GOODPUT = 0.9
RECOVERED_WITHIN = 5.0
_AFTER_SECONDS = 12.0
_OVERLOAD_CONNECTIONS = 900
_MUCH_WORSE = 2.0
"""Times the p99 of the first time: then the capacity is not what it was."""
_POISON = {100: 0.05, 10: 0.20}
"""Every so-manieth request is damaged -> the largest loss of good answers."""


def three_times(bench: Bench) -> Finding:
    """Each is answered within its deadline or refused at once; what can be done is done; soon after all is as before."""
    seconds = bench.form.overload
    loop = loadgen.Open(rate=TIMES * bench.capacity, connections=_OVERLOAD_CONNECTIONS)
    headers = bench.stack.headers | {"X-Deadline-Ms": str(DEADLINE_MS)}
    log = bench.stack.front.open_log()
    with loadgen.start(bench.scenario(loop, headers=headers)) as running:
        running.wait_measuring()
        running.wait_seconds(seconds)
        ended = time.monotonic()
        running.stop(drain=DEADLINE_MS / 1e3 + 1.0)
        flood = running.result()
    began = time.monotonic()
    with contextlib.closing(log):
        inside_ms = _refused_ms(log.lines())
    ended += time.monotonic() - began  # nothing was asked meanwhile
    with loadgen.start(bench.scenario(bench.open_loop(), warm_up=0.0, duration=_AFTER_SECONDS)) as running:
        gap = time.monotonic() - ended
        running.wait()
        after = running.result()
    return _judged(bench, flood, after, gap, inside_ms)


def _refused_ms(lines: Iterable[str]) -> list[float]:
    """How long the gateway took, by its own clock, for each request that it refused."""
    entries = (json.loads(line) for line in lines if line.startswith("{") and '"status":429' in line)
    return [float(entry["total_ms"]) for entry in entries if entry["status"] == 429]


def _judged(bench: Bench, flood: Result, after: Result, gap: float, inside_ms: Sequence[float]) -> Finding:
    refused = flood.by_outcome.get(REFUSED)
    others = {name: count for name, count in flood.errors.items() if name != REFUSED}
    late = flood.latency.max_ms if flood.latency is not None else float("inf")
    goodput = flood.throughput.value / bench.capacity
    recovered = gap + _recovered(after, bench.quiet_p99_ms)
    slowest = refused.max_ms if refused is not None else 0.0
    p99 = refused.p99.value if refused is not None else 0.0
    count = refused.count if refused is not None else 0
    measured = (
        f"{flood.good} answered, the last within {late / 1e3:.2f} s of its {DEADLINE_MS / 1e3:g} s; {count} refused with "
        f"429, p99 {p99:.0f} ms, slowest {slowest:.0f} ms{_inside(inside_ms)}; {sum(others.values())} others; goodput "
        f"{goodput:.0%} of capacity beside a client that took {flood.client_cpu_us * flood.offered / 1e6:.1f} cores; "
        f"recovered after {recovered:.1f} s"
    )
    say(f"    {measured}")
    kept = (
        not others
        and late <= DEADLINE_MS
        and slowest < REFUSED_WITHIN_MS
        and goodput >= LEAST_GOODPUT
        and recovered <= RECOVERED_WITHIN
    )
    details: dict[str, Any] = {"flood": brief(flood), "after": brief(after), "goodput": goodput, "recovered": recovered}
    details["refused"] = refused.as_dict() if refused is not None else None
    details["gateway_refused_ms"] = {"p99": p99_of(inside_ms), "max": max(inside_ms)} if inside_ms else None
    details["client_cores"] = flood.client_cpu_us * flood.offered / 1e6
    return Finding(measured, kept, details)


def _inside(refused_ms: Sequence[float]) -> str:
    """For people: a client on the same cores is late itself, so its clock tells more than the gateway took."""
    return f" (by the gateway's clock {p99_of(refused_ms):.0f} and {max(refused_ms):.0f} ms)" if refused_ms else ""


def _recovered(after: Result, quiet_p99_ms: float) -> float:
    """Seconds until the first whole second in which nothing failed and no slowest per cent was above the quiet one's."""
    spans = after.timeline
    for first in range(len(spans)):
        second = [span for span in spans if spans[first].start <= span.start < spans[first].start + 1.0]
        fine = all(span.failed == 0 and (span.p99_ms or 0.0) <= TIMES_QUIET_P99 * quiet_p99_ms for span in second)
        if fine and spans[first].start + 1.0 <= after.seconds:
            return spans[first].start
    return float("inf")


def poison(bench: Bench) -> Finding:
    """Damaged images among the others: refused one by one, and the others answered as if they were not there.

    Closed loops in turns that begin with another one each round, compared within their round, so that a machine that
    slows down slows all of them down. What counts is good answers: one per cent of damaged requests costs at least that
    one per cent.
    """
    runs: dict[int, list[Result]] = {0: [], **{every: [] for every in _POISON}}
    for number in range(bench.form.poison_rounds):
        kinds = list(runs)
        for every in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
            runs[every].append(loadgen.run(_closed(bench, every, bench.form.poison)))
    clean = [item.throughput.value for item in runs[0]]
    details: dict[str, Any] = {}
    kept, words = True, []
    for every, limit in _POISON.items():
        losses = [1 - item.throughput.value / first for item, first in zip(runs[every], clean, strict=True)]
        loss = statistics.median(losses)
        wrong = sum(_unexpected(item, every) for item in runs[every])
        kept = kept and loss <= limit and wrong == 0
        words.append(f"{1 / every:.0%}: {wrong} of the rest failed or wrong, {loss:.1%} fewer good answers")
        details[f"every {every}"] = {"losses": losses, "wrong": wrong, "runs": [brief(item) for item in runs[every]]}
    say(f"    {'; '.join(words)}")
    return Finding("; ".join(words), kept, details | {"clean": [brief(item) for item in runs[0]]})


def _closed(bench: Bench, every: int, seconds: float) -> loadgen.Scenario:
    return bench.scenario(Closed(connections=CONNECTIONS), damaged_every=every, duration=seconds)


def _unexpected(result: Result, every: int) -> int:
    """Failures that no damaged image explains: another status, an undamaged image, or more than were sent."""
    refused = sum(result.errors.get(name, 0) for name in _REFUSALS)
    undamaged = sum(item.outcome in _REFUSALS and item.payload % every != every - 1 for item in result.failures)
    # Requests count from the moment they were planned for, so one more than the share may fall into the time measured.
    surplus = max(0, refused - math.ceil(result.planned / every) - 1)
    return result.failed - refused + max(undamaged, surplus)


def normal(bench: Bench) -> dict[str, Any]:
    """How the stack answers at this moment when nothing happens, for the results file.

    The first time with its capacity; later too when it answers much worse than it did then, because the machine has
    become slower, or is shared: 60 % of what it could do once may be more than it can do now.
    """
    if bench.capacity:
        control = quiet(bench, bench.form.least)
        if not control.failed and bench.quiet_p99_ms <= _MUCH_WORSE * bench.first_p99_ms:
            return _conditions(bench, control)
        say(f"    quiet p99 {bench.quiet_p99_ms:.0f} ms, {control.failed} failed: the capacity is measured anew")
    capacity(bench)
    control = quiet(bench, bench.form.quiet)
    bench.first_p99_ms = bench.quiet_p99_ms
    say(f"    capacity {bench.capacity:.0f}/s; quiet: {bench.rate:.0f}/s, p99 {bench.quiet_p99_ms:.1f} ms")
    return _conditions(bench, control)


def _conditions(bench: Bench, control: Result) -> dict[str, Any]:
    return {"capacity_per_second": round(bench.capacity, 1), "quiet": brief(control)}


def capacity(bench: Bench) -> Result:
    """What the stack can answer at most."""
    result = loadgen.run(_first(bench))
    if result.failed:
        first = f"{result.failures[0].outcome}: {result.failures[0].detail}" if result.failures else "no detail"
        raise BenchmarkError(f"{result.failed} of {result.planned} failed with nothing wrong: {first}", remedy="see it")
    bench.capacity = result.throughput.value
    return result


def _first(bench: Bench) -> loadgen.Scenario:
    """With a warm-up until it is steady: java compiles for some time."""
    loop = Closed(connections=CONNECTIONS)
    return bench.scenario(loop, duration=bench.form.capacity, warm_up="auto", warm_up_limit=30.0)


def quiet(bench: Bench, seconds: float) -> Result:
    """60 % of the capacity, and nothing happens."""
    result = loadgen.run(bench.scenario(bench.open_loop(), duration=seconds))
    bench.quiet_p99_ms = p99_ms(result)
    return result
