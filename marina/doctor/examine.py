"""All checks, each group in a thread of its own and within its time, so that one that hangs hides none of the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from marina.doctor import host, live, signatures, stored
from marina.doctor.finding import Finding
from marina.errors import ConfigError
from marina.home import Home
from marina.settings import OTHER_VARIABLES, ServeSettings

SECONDS = 8.0
"""How long all of it may take."""


def examine(home: Home, environment: Mapping[str, str] = os.environ, *, log: Path | None = None) -> list[Finding]:
    """Every finding about this machine, store and server, and about `log` when given; faults first.

    Raises ConfigError when `log` cannot be read.
    """
    addresses = _addresses(home, environment)
    serving = live.is_running(addresses)
    machine = host.Host(home=home, environment=environment, serving=serving)
    groups: dict[str, Callable[[], Iterable[Finding]]] = {
        "machine": lambda: host.check(machine),
        "model store": lambda: stored.check(home.store),
        "server": lambda: live.check(addresses, home.root),
    }
    found = _run(groups)
    if log is not None:
        found += read_log(log)
    return sorted(_once(found), key=lambda finding: finding.severity != "fault")


def read_log(path: Path) -> list[Finding]:
    """The causes that a log betrays. Raises ConfigError when it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            return list(signatures.in_log(lines))
    except OSError as error:
        raise ConfigError(
            f"the log {path} cannot be read: {error.strerror}", remedy="name a file that is there"
        ) from error


def _run(groups: Mapping[str, Callable[[], Iterable[Finding]]]) -> list[Finding]:
    pool = ThreadPoolExecutor(len(groups), thread_name_prefix="doctor")
    try:
        running: dict[str, Future[list[Finding]]] = {name: pool.submit(_all, check) for name, check in groups.items()}
        wait(running.values(), timeout=SECONDS)
        return [finding for name, future in running.items() for finding in _outcome(name, future)]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _all(check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    return list(check())


def _outcome(name: str, future: Future[list[Finding]]) -> Iterator[Finding]:
    if not future.done():
        yield Finding(
            code="server-not-ready",
            cause=f"the checks of the {name} did not end within {SECONDS:.0f} s: something there hangs",
            remedy="look at the disks (a network share that is gone?) and at the load of the machine",
        )
        return
    yield from future.result()


def _once(findings: Iterable[Finding]) -> list[Finding]:
    return list({(finding.code, finding.cause): finding for finding in findings}.values())


def _addresses(home: Home, environment: Mapping[str, str]) -> live.Addresses:
    """Where a server would answer by these settings; by the defaults when they cannot be read."""
    try:
        settings = ServeSettings.load({"config": home.config}, environment, other_variables=OTHER_VARIABLES)
    except ConfigError:
        settings = ServeSettings()
    return live.Addresses(
        supervisor=settings.url("supervisor"),
        management=environment.get("MARINA_MANAGEMENT_URL", settings.url("management")),
        management_port=settings.port("management"),
    )
