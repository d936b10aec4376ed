"""The running server as it is now: readiness, workers, queues, who can reach it, and the gateway in front of it."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from marina import remote
from marina.client import NO_RETRIES, ManagementClient, ModelStatus, Timeout
from marina.doctor.finding import Finding
from marina.doctor.signatures import classify
from marina.errors import ClientError, TimedOut
from marina.home import Home
from marina.properties import is_loopback
from marina.serving import TRIAL_SUFFIX

QUEUE_ALARM = 0.9
"""Part of a queue that is full when it becomes a finding."""
_TIMEOUT = Timeout(connect=1.0, read=3.0)
_GATEWAY_SERVICE = "gateway"


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Where the interfaces of the local server answer."""

    supervisor: str
    management: str
    management_port: int


def is_running(addresses: Addresses) -> bool:
    """Whether something answers as a server of ours or as TorchServe's management interface, or hangs in their place."""
    for url in (f"{addresses.supervisor}/livez", f"{addresses.management}/models"):
        try:
            if _get(url) is not None:
                return True
        except requests.ReadTimeout:
            return True
    return False


def check(addresses: Addresses, project: Path) -> Iterator[Finding]:
    """What is wrong with the server on this machine and with this project's containers."""
    yield from supervised(addresses)
    yield from served(addresses, project)
    yield from containers(project)


def supervised(addresses: Addresses) -> Iterator[Finding]:
    """What the supervisor says of the server."""
    try:
        failures = _get(f"{addresses.supervisor}/failures")
        ready = _get(f"{addresses.supervisor}/readyz")
    except requests.ReadTimeout:
        yield _hanging(addresses.supervisor)
        return
    for label, cause in (failures or {}).items():
        known = classify(str(cause))
        yield Finding(
            code=known.code if known is not None else "worker-dead",
            cause=f"{label}: {known.cause if known is not None else cause}",
            remedy=known.remedy if known is not None else "check the archive: marina verify MAR",
            evidence=str(cause),
        )
    if ready is not None and not ready.get("ready", False):
        missing = "; ".join(ready.get("missing", []))
        yield Finding(
            code="server-not-ready",
            cause=f"the server is not ready: {missing}",
            remedy="wait while it starts or drains; otherwise the findings beside this one say why",
        )


def served(addresses: Addresses, project: Path) -> Iterator[Finding]:
    """What the management interface says of the models. `project` is where a tuner at work has its lock."""
    with ManagementClient(addresses.management, timeout=_TIMEOUT, retries=NO_RETRIES) as client:
        try:
            models = client.status()
        except TimedOut:
            yield _hanging(addresses.management)
            return
        except ClientError:
            return
    for model in models:
        yield from _model(model)
        yield from _trial(model, addresses.management, Home(project).runs / "tune")
    yield from _public(addresses.management_port)


def _hanging(url: str) -> Finding:
    return Finding(
        code="server-not-ready",
        cause=f"what listens at {url} hangs: it takes connections and gave no answer within {_TIMEOUT.read:.0f} s",
        remedy="see who it is: ss -ltnp; when it is the server and the machine is not only busy, start it anew",
    )


def _model(model: ModelStatus) -> Iterator[Finding]:
    who = f"{model.name} {model.version}"
    dead = len(model.workers) - model.ready_workers
    if dead:
        yield Finding(
            code="worker-dead",
            cause=f"{who}: {dead} of {len(model.workers)} workers cannot answer: loading again, or given up",
            remedy="the server's log has the worker's last words: marina doctor --log FILE",
            severity="fault" if model.ready_workers == 0 else "warning",
        )
    whole = model.pending + model.remaining_capacity
    if whole and model.pending >= QUEUE_ALARM * whole:
        yield Finding(
            code="queue-full",
            cause=f"{who}: {model.pending} requests wait in a queue of {whole}; soon new ones get 503",
            remedy=f"marina scale {model.name} {len(model.workers) + 1}, or slow the clients down",
        )
    if model.workers and model.max_batch_delay_ms > 50:
        yield Finding(
            code="batch-delay",
            cause=f"{who}: maxBatchDelay is {model.max_batch_delay_ms} ms: every lone request waits that long",
            remedy="set maxBatchDelay to 1 in model-config.yaml and deploy again",
            severity="warning",
        )


def _trial(model: ModelStatus, management: str, tuners: Path) -> Iterator[Finding]:
    """A registration that a killed tuner (marina/tune.py) left behind."""
    name = model.name.removesuffix(TRIAL_SUFFIX)
    if name == model.name or _is_locked(tuners / f".{name}.lock"):
        return
    yield Finding(
        code="trial-left",
        cause=f"{model.name} {model.version} is registered and no tuner of this project is at work on {name}: "
        f"one that was killed left it, with {len(model.workers)} workers",
        remedy=f"the next `marina tune` of {name} removes it; or curl -X DELETE {management}/models/{model.name}",
        severity="warning",
    )


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _public(port: int) -> Iterator[Finding]:
    try:
        listening = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return
    for connection in listening:
        if not connection.laddr or connection.laddr.port != port or connection.status != psutil.CONN_LISTEN:
            continue
        if not is_loopback(connection.laddr.ip.removeprefix("::ffff:")):
            yield Finding(
                code="public-address",
                cause=f"the management interface listens on {connection.laddr.ip}:{port}: whoever reaches it can run code",
                remedy="set management_address=http://127.0.0.1:8081 and restart",
            )
            return


def containers(project: Path) -> Iterator[Finding]:
    """The containers of this project's docker-compose stack; nothing where there is no Docker or no stack."""
    states = _states(project)
    servers = [state for service, state in states if service == "torchserve"]
    for service, state in states:
        if not state.startswith("Up") or "unhealthy" in state:
            yield Finding(
                code="gateway-down" if service == _GATEWAY_SERVICE else "server-down",
                cause=f"the container of {service} is not well: {state}",
                remedy="its last lines say why: make logs; then make up",
            )
    if servers and not any(service == _GATEWAY_SERVICE for service, _ in states):
        yield Finding(
            code="gateway-down",
            cause="TorchServe's containers run and there is no gateway in front of them: no client can reach them",
            remedy="make up",
        )


def _states(project: Path) -> list[tuple[str, str]]:
    docker = shutil.which("docker")
    if docker is None:
        return []
    form = f'{{{{.Label "{remote.SERVICE_LABEL}"}}}}\t{{{{.Status}}}}'
    command = [docker, "ps", "--all", "--format", form, "--filter", f"label={remote.FOLDER_LABEL}={project}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=4, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.partition("\t") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [(service, state) for service, _, state in rows]


def _get(url: str) -> Mapping[str, Any] | None:
    """The JSON object at `url` whatever its status; None when nothing of ours answers there.

    Raises requests.ReadTimeout when what listens there does not answer.
    """
    try:
        answer = requests.get(url, timeout=(_TIMEOUT.connect, _TIMEOUT.read))
        value = answer.json()
    except requests.ReadTimeout:
        raise
    except (requests.RequestException, ValueError):
        return None
    return value if isinstance(value, dict) else None
