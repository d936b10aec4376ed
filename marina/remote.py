"""Where the servers of this project are: one of this machine, or the containers of its docker-compose stack.

TorchServe's management interface listens on loopback inside each container and is never published. What has to be asked
of it is therefore run inside: `docker exec CONTAINER marina replica ACTION`, which answers with one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from marina import lifeline
from marina.canary import QUEUE_SECONDS, ContainerLog, Front
from marina.client import NO_RETRIES, ManagementClient, ModelStatus, Timeout, WorkerStatus
from marina.errors import ArchiveError, ClientError, ConfigError, MarinaError, ServerError, Unreachable
from marina.gates import Arm
from marina.gateway import GATEWAY_FOLDER, SPLITS_FILE
from marina.replica import LocalReplica, Replica
from marina.shadow import Shadow, from_lines, to_lines

Target = Literal["auto", "local", "compose"]

SERVICE = "torchserve"
GATEWAY_SERVICE = "gateway"
"""The services' names in docker-compose.yml."""
STORE_FOLDER = "model_store"
"""The last part of the path at which it mounts the model store."""
ACTION_SECONDS = 900.0
"""How long one action inside a container may take; loading a large model is the longest."""
_QUEUE_TIMEOUT = "GATEWAY_QUEUE_TIMEOUT_MS"
_LIST_TRIES = 3
FOLDER_LABEL = "com.docker.compose.project.working_dir"
_PROJECT_LABEL = "com.docker.compose.project"
SERVICE_LABEL = "com.docker.compose.service"
_START = "start one: marina serve on this machine, or make up for the containers"


class ContainerReplica:
    """One container of the stack."""

    def __init__(self, container: str, *, docker: str) -> None:
        self.name = container
        self._docker = docker

    @property
    def store(self) -> Path:
        """The folder of this host that is its model store. Raises ClientError when none is mounted."""
        return _mounted(self._docker, self.name, STORE_FOLDER)

    def status(self) -> tuple[ModelStatus, ...]:
        return tuple(status_from_json(item) for item in self._run("status")["models"])

    def register(self, key: str, workers: int) -> None:
        self._run("register", key, str(workers))

    def prove(self, key: str) -> None:
        self._run("prove", key)

    def set_default(self, key: str) -> None:
        self._run("set-default", key)

    def scale(self, key: str, workers: int) -> None:
        self._run("scale", key, str(workers))

    def retire(self, key: str) -> None:
        self._run("retire", key)

    def shadow(self, name: str, old: str, new: str, recorded: Sequence[bytes], sample_seconds: float) -> Shadow:
        found = self._run(
            "shadow", name, old, new, f"{sample_seconds:g}", given=to_lines(recorded) if recorded else ""
        )["shadow"]
        return Shadow(**{**found, "old": _arm(found["old"]), "new": _arm(found["new"])})

    def drained(self, key: str) -> bool:
        return bool(self._run("drained", key)["drained"])

    def drain(self) -> None:
        self._run("drain")

    def _run(self, action: str, *arguments: str, given: str = "") -> dict[str, Any]:
        """`given` is for the action to read. What is interrupted here, or takes too long, has ended inside before the
        error is raised: what is reverted then stays so."""
        command = [self._docker, "exec", "-i", self.name, "marina", "replica", action, *arguments]
        try:
            done = lifeline.run(command, given, within=ACTION_SECONDS)
        except subprocess.TimeoutExpired:
            raise ClientError(
                f"{self.name}: {action} did not end within {ACTION_SECONDS:.0f} s", remedy="look at it: make logs"
            ) from None
        answer = _last_object(done.stdout)
        if done.returncode == 0 and answer is not None:
            return answer
        if answer is not None and "error" in answer:
            raise _error(answer, where=self.name)
        words = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise Unreachable(f"{self.name}: {action}: {words}", remedy="is the container running? docker ps")


def run_action(replica: Replica, action: str, arguments: Sequence[str], given: str) -> dict[str, Any]:
    """The other end of `ContainerReplica`: do it here. Raises ConfigError for an action that is none."""
    actions: Mapping[str, tuple[int, Callable[..., Mapping[str, Any] | None]]] = {
        "register": (2, lambda key, workers: replica.register(key, int(workers))),
        "prove": (1, replica.prove),
        "set-default": (1, replica.set_default),
        "scale": (2, lambda key, workers: replica.scale(key, int(workers))),
        "shadow": (
            4,
            lambda name, old, new, seconds: {
                "shadow": dataclasses.asdict(replica.shadow(name, old, new, from_lines(given), float(seconds)))
            },
        ),
        "drained": (1, lambda key: {"drained": replica.drained(key)}),
        "retire": (1, replica.retire),
        "drain": (0, replica.drain),
        "status": (0, lambda: {"models": [dataclasses.asdict(model) for model in replica.status()]}),
    }
    count, run = actions.get(action, (-1, None))
    if run is None or len(arguments) != count:
        raise ConfigError(
            f"no action '{action}' with {len(arguments)} arguments", remedy=f"actions: {', '.join(actions)}"
        )
    return {"done": action, **(run(*arguments) or {})}


def find_replicas(target: Target, local: LocalReplica, *, management_url: str, project: Path) -> list[Replica]:
    """The servers to talk to: with `auto` the project's containers when there are any, else the local server.

    Raises Unreachable when there is none.
    """
    no_stack = f"no {SERVICE} container of {project} is running"
    if target != "local":
        try:
            found = containers(project)
        except Unreachable as error:
            found, no_stack = [], str(error)
        if found:
            return list(found)
        if target == "compose":
            raise Unreachable(no_stack, remedy="start the stack: make up")
    if _answers(management_url):
        return [local]
    also = "" if target == "local" else f", and {no_stack}"
    raise Unreachable(f"nothing listens at {management_url}{also}", remedy=_START)


def containers(project: Path) -> list[ContainerReplica]:
    """The running TorchServe containers of the stack in this folder, by name; none without Docker.

    COMPOSE_PROJECT_NAME, as for Compose itself, tells several stacks of one folder apart. Raises Unreachable with
    Docker's own words when it cannot say.
    """
    docker = shutil.which("docker")
    return (
        [] if docker is None else [ContainerReplica(name, docker=docker) for name in _running(docker, project, SERVICE)]
    )


def find_front(project: Path) -> Front | None:
    """The gateway's container of the stack in this folder; None when none runs. Raises as `containers` does."""
    docker = shutil.which("docker")
    found = [] if docker is None else _running(docker, project, GATEWAY_SERVICE)
    if docker is None or not found:
        return None
    (gateway, *_) = found
    folder = _mounted(docker, gateway, GATEWAY_FOLDER)
    return Front(
        splits=folder / SPLITS_FILE,
        open_log=lambda: ContainerLog(docker, gateway),
        queue_seconds=_queue_seconds(docker, gateway),
    )


def _running(docker: str, project: Path, service: str) -> list[str]:
    command = [docker, "ps", "--format", "{{.Names}}", "--filter", f"label={FOLDER_LABEL}={project}"]
    command += ["--filter", f"label={SERVICE_LABEL}={service}"]
    if stack := os.environ.get("COMPOSE_PROJECT_NAME"):
        command += ["--filter", f"label={_PROJECT_LABEL}={stack}"]
    return sorted(_listed(command))


def _mounted(docker: str, container: str, last_part: str) -> Path:
    """This host's folder behind a mount of the container, by the last part of its path inside."""
    command = [docker, "inspect", "--format", "{{json .Mounts}}", container]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    for mount in json.loads(done.stdout) if done.returncode == 0 else []:
        if Path(mount["Destination"]).name == last_part:
            return Path(mount["Source"])
    raise ClientError(
        f"{container} has no {last_part} mounted from this host", remedy="mount one in docker-compose.yml"
    )


def _queue_seconds(docker: str, gateway: str) -> float:
    """What the container was given; else haproxy.cfg's own."""
    command = [docker, "inspect", "--format", "{{range .Config.Env}}{{println .}}{{end}}", gateway]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    found = [line.partition("=")[2] for line in done.stdout.splitlines() if line.startswith(f"{_QUEUE_TIMEOUT}=")]
    return int(found[-1]) / 1000 if found and found[-1].isdigit() else QUEUE_SECONDS


def _listed(command: Sequence[str]) -> list[str]:
    """Asked again when it fails: an engine that removes a container at that moment may not list the others."""
    words = ""
    for attempt in range(_LIST_TRIES):
        time.sleep(0.5 * attempt)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            words = str(error)
            continue
        if done.returncode == 0:
            return done.stdout.split()
        words = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise Unreachable(f"docker cannot list the containers: {words}", remedy="is the Docker engine running? docker ps")


def status_from_json(value: Mapping[str, Any]) -> ModelStatus:
    """What `run_action` wrote."""
    return ModelStatus(**{**value, "workers": tuple(WorkerStatus(**worker) for worker in value["workers"])})


def _arm(value: Mapping[str, Any]) -> Arm:
    return Arm(**{**value, "latencies_ms": tuple(value["latencies_ms"])})


def _answers(management_url: str) -> bool:
    with ManagementClient(management_url, timeout=Timeout(connect=2.0, read=5.0), retries=NO_RETRIES) as client:
        try:
            client.models()
        except Unreachable:
            return False
    return True


def _last_object(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        with_braces = line.strip()
        if with_braces.startswith("{"):
            try:
                found = json.loads(with_braces)
            except ValueError:
                return None
            return found if isinstance(found, dict) else None
    return None


def _error(answer: Mapping[str, Any], *, where: str) -> MarinaError:
    """The error of the inside, as one of the same exit code."""
    kinds: Mapping[int, type[MarinaError]] = {3: ConfigError, 5: ArchiveError, 6: ServerError, 7: ClientError}
    kind = kinds.get(int(answer.get("exit_code", 1)), MarinaError)
    return kind(f"{where}: {answer['error']}", remedy=str(answer.get("remedy", "")))
