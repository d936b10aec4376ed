"""A model that answers each request with its own body, behind batching, retries, killed workers and cancels."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.chaos import stack as stacks
from benchmarks.chaos.bench import Finding, say
from benchmarks.chaos.cases import ROOT
from benchmarks.chaos.stack import Command, Server, Stack
from benchmarks.echo.systems import MODEL_CONFIG, pack_echo
from benchmarks.errors import BenchmarkError

MODEL = "echo"
CLIENTS = 2
_KILL_EVERY = 7.0
_LONGEST = 1800.0


@contextlib.contextmanager
def echo_stack(folder: Path, **settings: Any) -> Iterator[Stack]:
    """Two servers with the identity model, behind the gateway."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = pack_echo(folder)
    with stacks.running(folder, MODEL, _serve(archive), store=archive.parent, **settings) as stack:
        yield stack


def _serve(archive: Path) -> Command:
    def command(ports: Mapping[str, int], log: Path) -> Sequence[str]:
        wish = {
            "archive": str(archive),
            "model_config": dict(MODEL_CONFIG),
            "settings": {**ports, "device": "cpu", "log_file": str(log), "log_requests": False},
        }
        return sys.executable, "-m", "benchmarks.echo.serve", json.dumps(wish)

    return command


def ask(stack: Stack, requests: int, *, within: float | None = None, kill_every: float = _KILL_EVERY) -> dict[str, Any]:
    """So many requests, or as many as go into `within` seconds, unique each; a worker is killed now and then meanwhile, so
    that the gateway has to ask again.
    """
    address = urlsplit(stack.url)
    clients = []
    for number in range(CLIENTS):
        wish = {
            "host": address.hostname, "port": address.port, "path": address.path, "key": stack.key,
            "requests": requests // CLIENTS, "within": within, "name": str(number),
        }  # fmt: skip
        clients.append(
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.chaos.echoing", json.dumps(wish)],
                cwd=ROOT, stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    began = time.monotonic()
    kills = 0
    try:
        victims = itertools.cycle(stack.servers)
        next_kill = began + kill_every
        while any(client.poll() is None for client in clients):
            if time.monotonic() - began > _LONGEST:
                raise BenchmarkError(f"not answered within {_LONGEST:.0f} s", remedy="give fewer --requests")
            if time.monotonic() >= next_kill and stack.ready_servers() == len(stack.servers):
                kills += _kill_workers(next(victims))
                next_kill = time.monotonic() + kill_every
            time.sleep(0.1)
        seconds = time.monotonic() - began
        return _summed([json.loads(_given(client)) for client in clients]) | {"kills": kills, "seconds": seconds}
    finally:
        for client in clients:
            client.kill()
            client.wait()
            if client.stdout is not None:
                client.stdout.close()


def _kill_workers(server: Server) -> int:
    """All of them at once: the other server is all that is left."""
    killed = 0
    for worker in server.ready_workers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
            killed += 1
    return killed


def measure(folder: Path, requests: int, within: float | None = None) -> Finding:
    """The row of the table."""
    with echo_stack(folder) as stack:
        found = ask(stack, requests, within=within)
    measured = (
        f"{found['mixed']} mixed of {found['right'] + found['mixed']} answers, {found['unanswered']} unanswered; "
        f"{found['cancelled']} cancels, {sum(found['retried'].values())} retries by clients, {found['kills']} workers "
        f"killed; {(found['right'] + found['mixed']) / found['seconds']:.0f} requests/s"
    )
    say(f"    {measured}")
    return Finding(measured, found["mixed"] == 0 and found["unanswered"] == 0, found)


def _given(client: subprocess.Popen[str]) -> str:
    said = client.stdout.read() if client.stdout is not None else ""
    if client.returncode != 0:
        raise BenchmarkError(f"a client ended with {client.returncode}", remedy="see its words above")
    return said


def _summed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    retried: Counter[str] = Counter()
    for part in parts:
        retried.update(part["retried"])
    counts = {name: sum(part[name] for part in parts) for name in ("right", "mixed", "unanswered", "cancelled")}
    return counts | {"retried": dict(retried), "examples": [text for part in parts for text in part["examples"]]}
