"""One measured server: start it, prove its answers, warm it up, load it, stop it."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests

from benchmarks import answers, load, stages
from benchmarks.errors import NotAvailable
from benchmarks.load import Body, Generator
from benchmarks.systems import Launch
from benchmarks.tree import Tree, Usage

Check = Callable[[Sequence[answers.Answer | None]], answers.Verdict]
"""One answer, or None, per photo -> whether they are the expected ones."""
READY_SECONDS = 180.0
"""A server that is not ready by then is listed as one that does not start."""
_SPARE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with a server once it is up."""

    connections: tuple[int, ...]
    seconds: float
    """Of each burst."""
    warm_up: float
    """Seconds of load before the first burst."""
    warm_up_connections: int = 0
    """0: as many as the largest burst has."""


@dataclass(frozen=True, slots=True)
class Row:
    """One burst on one server."""

    connections: int
    seconds: float
    requests_per_second: float
    """Good answers."""
    good: int
    failed: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    server_cpu_ms: float | None
    """User and system time of the whole process tree per good answer."""
    cores_busy: float
    client_cpu_ms: float | None
    """The load generator's, per good answer."""
    pss_mib: float
    """After the burst, of the whole process tree."""
    rss_mib: float
    processes: int
    stages: Mapping[str, float] | None = None
    """Of Marina: milliseconds of worker time per answer, by stage."""


@dataclass(frozen=True, slots=True)
class Visit:
    """All that one start of one server gave."""

    ready_seconds: float
    """From the start of the process to ready."""
    ready_pss_mib: float
    verdict: answers.Verdict | None
    rows: tuple[Row, ...]


def visit(
    launch: Launch,
    photos: Sequence[bytes],
    plan: Plan,
    generator: Generator,
    log: Path,
    check: Check | None = None,
) -> Visit:
    """Raises NotAvailable, with the log's last lines, when the server does not start or does not answer."""
    bodies = [launch.encode(photo) for photo in photos]
    life = READY_SECONDS + plan.warm_up + len(plan.connections) * (plan.seconds + load.TIMEOUT_SECONDS) + _SPARE_SECONDS
    # Its own, short because Unix sockets lie in it, and removed with whatever the server leaves there.
    with tempfile.TemporaryDirectory(prefix="mb-", dir="/tmp", ignore_cleanup_errors=True) as temp:
        tree = Tree(
            launch.command,
            environment={**launch.environment, "TMPDIR": temp},
            folder=launch.folder,
            log=log,
            seconds=life,
            isolated=launch.isolated,
        )
        with tree:
            return _measured(tree, launch, bodies, plan, generator, check)


def _measured(
    tree: Tree, launch: Launch, bodies: Sequence[Body], plan: Plan, generator: Generator, check: Check | None
) -> Visit:
    started = time.monotonic()
    _wait_for_process(tree)
    with tree.network(), requests.Session() as session:
        session.trust_env = False  # no proxy stands between us and loopback
        _wait_ready(tree, launch, session, bodies[0], started + READY_SECONDS)
        ready = time.monotonic() - started
        memory = tree.usage().pss_mib
        verdict = check([_ask(session, launch, body) for body in bodies]) if check is not None else None
        if plan.warm_up:
            count = plan.warm_up_connections or max(plan.connections)
            load.drive(generator, launch.url, bodies, count, plan.warm_up)
        rows, before = [], stages.totals(_metrics(session, launch))
        for count in plan.connections:
            # Requests that the last burst left behind are still being worked on.
            _ask(session, launch, bodies[0])
            row = _burst(tree, launch, bodies, count, plan.seconds, generator)
            after = stages.totals(_metrics(session, launch))
            rows.append(dataclasses.replace(row, stages=stages.between(before, after)))
            before = after
    return Visit(ready, memory, verdict, tuple(rows))


def _metrics(session: requests.Session, launch: Launch) -> str:
    """Raises NotAvailable when the workers answer with another engine than the one that is to be measured."""
    if not launch.metrics_url:
        return ""
    text = stages.read(session, launch.metrics_url)
    engine = stages.engine(text)
    if launch.engine and engine not in (None, launch.engine):
        raise NotAvailable(
            f"its workers answer with the engine {engine}, not with {launch.engine}",
            remedy="see its log for the reason",
        )
    return text


def _burst(
    tree: Tree, launch: Launch, bodies: Sequence[Body], connections: int, seconds: float, generator: Generator
) -> Row:
    before = tree.usage()
    found = load.drive(generator, launch.url, bodies, connections, seconds)
    after = tree.usage()
    return _row(connections, found, before, after)


def _row(connections: int, found: load.Burst, before: Usage, after: Usage) -> Row:
    cpu = max(0.0, after.cpu_seconds - before.cpu_seconds)
    return Row(
        connections=connections,
        seconds=found.seconds,
        requests_per_second=found.good / found.seconds,
        good=found.good,
        failed=found.failed,
        mean_ms=found.mean_ms,
        p50_ms=found.p50_ms,
        p90_ms=found.p90_ms,
        p99_ms=found.p99_ms,
        server_cpu_ms=1e3 * cpu / found.good if found.good else None,
        cores_busy=cpu / found.seconds,
        client_cpu_ms=1e3 * found.client_cpu_seconds / found.good if found.good else None,
        pss_mib=after.pss_mib,
        rss_mib=after.rss_mib,
        processes=after.processes,
    )


def _wait_for_process(tree: Tree) -> None:
    """Until the warden has made the network that the server is to live in, if any."""
    deadline = time.monotonic() + 10.0
    while not tree.processes() and not tree.ended() and time.monotonic() < deadline:
        time.sleep(0.005)


def _wait_ready(tree: Tree, launch: Launch, session: requests.Session, first: Body, deadline: float) -> None:
    while time.monotonic() < deadline:
        if tree.ended():
            raise NotAvailable(f"its server ended before it was ready: {tree.log_tail()}", remedy="see its log")
        if launch.ready_url:
            if _status(session, launch.ready_url) == 200:
                return
        elif _ask(session, launch, first) is not None:
            return
        time.sleep(0.05)
    raise NotAvailable(f"not ready after {READY_SECONDS:.0f} s: {tree.log_tail()}", remedy="see its log")


def _status(session: requests.Session, url: str) -> int:
    try:
        return session.get(url, timeout=(1.0, 5.0)).status_code
    except requests.RequestException:
        return 0


def _ask(session: requests.Session, launch: Launch, body: Body) -> dict[str, float] | None:
    headers = {"Content-Type": body.content_type, **body.headers}
    try:
        answer = session.post(launch.url, data=body.data, headers=headers, timeout=(1.0, 30.0))
        return launch.parse(answer.content) if answer.status_code == 200 else None
    except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError):
        return None
