"""All checks, each group in a thread of its own and within its time, so that one that hangs hides none of the others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue

from marina.doctor import host, live, signatures, stored
from marina.doctor.finding import Finding
from marina.errors import ConfigError
from marina.home import Home
from marina.settings import OTHER_VARIABLES, ServeSettings

SECONDS = 8.0
"""How long all of it may take."""
LOG_SECONDS = SECONDS - 2.0
"""How long a log is read."""
LOG_BYTES = 64 << 20
"""How much of a log is read, from its end."""
_LOG = "log"


def examine(home: Home, environment: Mapping[str, str] = os.environ, *, log: Path | None = None) -> list[Finding]:
    """Every finding about this machine, store and server, and about `log` when given; faults first.

    Raises ConfigError when `log` cannot be read.
    """
    addresses = _addresses(home, environment)

    def machine() -> Iterable[Finding]:
        return host.check(host.Host(home=home, environment=environment, serving=live.is_running(addresses)))

    groups: dict[str, Callable[[], Iterable[Finding]]] = {
        "machine": machine,
        "model store": lambda: stored.check(home.store),
        "supervisor": lambda: live.supervised(addresses),
        "server": lambda: live.served(addresses, home.root),
        "containers": lambda: live.containers(home.root),
    }
    if log is not None:
        groups[_LOG] = lambda: read_log(log)
    return sorted(_once(_run(groups)), key=lambda finding: finding.severity != "fault")


def examine_log(log: Path) -> list[Finding]:
    """The causes that a log betrays, and nothing else. Raises ConfigError when it cannot be read."""
    return _once(_run({_LOG: lambda: read_log(log)}))


def read_log(path: Path) -> list[Finding]:
    """The causes that the end of a log betrays, as far as it can be read in LOG_SECONDS. Raises as `examine_log`."""
    ends = time.monotonic() + LOG_SECONDS
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LOG_BYTES:
                file.seek(size - LOG_BYTES)
                file.readline()
            lines = (line.decode("utf-8", "replace") for line in file)
            found = list(signatures.in_log(lines, ends=ends))
    except OSError as error:
        raise ConfigError(
            f"the log {path} cannot be read: {error.strerror}", remedy="name a file that is there"
        ) from error
    return found + ([_only_the_end(size)] if size > LOG_BYTES else [])


def _only_the_end(size: int) -> Finding:
    return Finding(
        code="log-partly-read",
        cause=f"only the last {LOG_BYTES >> 20} MB of {size >> 20} MB of the log were read",
        remedy=signatures.IN_PIECES,
        severity="warning",
    )


def _run(groups: Mapping[str, Callable[[], Iterable[Finding]]]) -> list[Finding]:
    said: SimpleQueue[tuple[str, Finding | Exception | None]] = SimpleQueue()
    running = dict.fromkeys(groups)
    for name, check in groups.items():
        # A thread that hangs must not keep the process from ending.
        threading.Thread(target=_tell, args=(name, check, said), name=f"doctor-{name}", daemon=True).start()
    found: list[Finding] = []
    ends = time.monotonic() + SECONDS
    while running:
        try:
            name, item = said.get(timeout=max(0.0, ends - time.monotonic()))
        except Empty:
            break
        if isinstance(item, Finding):
            found.append(item)
            continue
        del running[name]
        if isinstance(item, ConfigError) and name == _LOG:
            raise item
        if item is not None:
            found.append(_broken_off(name, item))
    return found + [_hanging(name) for name in running]


def _tell(
    name: str,
    check: Callable[[], Iterable[Finding]],
    said: SimpleQueue[tuple[str, Finding | Exception | None]],
) -> None:
    """Each finding as soon as it is there; at last None, or what stopped the check."""
    try:
        for finding in check():
            said.put((name, finding))
    except Exception as error:  # noqa: BLE001 - the other checks' findings matter all the same
        said.put((name, error))
    else:
        said.put((name, None))


def _hanging(name: str) -> Finding:
    return Finding(
        code="server-not-ready",
        cause=f"the checks of the {name} did not end within {SECONDS:.0f} s: something there hangs",
        remedy="look at the disks (a network share that is gone?) and at the load of the machine",
    )


def _broken_off(name: str, error: Exception) -> Finding:
    denied = isinstance(error, PermissionError)
    return Finding(
        code="file-permissions" if denied else "check-failed",
        cause=f"the checks of the {name} could not be finished: {error if denied else repr(error)}",
        remedy="give this user access, or run this as the user that serves" if denied else "mend what the error names",
    )


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
