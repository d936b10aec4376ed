"""The container engine of this host: Docker, a Compose of either generation, and the GPUs that containers can get."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from marina.errors import ConfigError, NoDevice, ServerError

OLDEST_ENGINE = (20, 10)
OLDEST_COMPOSE = (1, 28)
"""The first with profiles."""
NVIDIA_RUNTIME = "nvidia"

Device = Literal["cpu", "gpu"]
Wanted = Literal["auto", "cpu", "gpu"]

_INSTALL_ENGINE = "install Docker Engine 20.10 or newer, on Debian: apt-get install docker.io docker-compose"
_INSTALL_COMPOSE = "install the Compose plugin, or docker-compose 1.28 or newer: apt-get install docker-compose"
_INSTALL_TOOLKIT = "install the NVIDIA container toolkit and run `nvidia-ctk runtime configure --runtime=docker`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A running Docker engine and the Compose to use with it."""

    docker: str
    """The docker program."""
    compose: tuple[str, ...]
    """`docker compose`, or `docker-compose`."""
    version: str
    compose_version: str
    runtimes: frozenset[str]

    def ask(self, *arguments: str) -> str:
        """What `docker ARGUMENTS` prints. Raises ServerError with the engine's own message."""
        done = _run([self.docker, *arguments])
        if done.returncode != 0:
            raise ServerError(f"docker {arguments[0]}: {last_line(done.stderr)}", remedy="see the engine's message")
        return done.stdout


def find_engine(environment: Mapping[str, str] = os.environ) -> Engine:
    """The engine and Compose on PATH. Raises ServerError when one is missing, does not run or is too old."""
    path = environment.get("PATH", os.defpath)
    docker = shutil.which("docker", path=path)
    if docker is None:
        raise ServerError("docker was not found", remedy=_INSTALL_ENGINE)
    version = _engine_version(docker)
    _require(version, OLDEST_ENGINE, "Docker Engine", _INSTALL_ENGINE)
    compose, compose_version = _find_compose(docker, path)
    _require(compose_version, OLDEST_COMPOSE, "Compose", _INSTALL_COMPOSE)
    runtimes = _run([docker, "info", "--format", "{{range $name, $_ := .Runtimes}}{{$name}} {{end}}"]).stdout.split()
    return Engine(
        docker=docker,
        compose=compose,
        version=version,
        compose_version=compose_version,
        runtimes=frozenset(runtimes),
    )


def choose_device(engine: Engine, wanted: Wanted, ids: str, environment: Mapping[str, str] = os.environ) -> Device:
    """`auto`: the GPUs where the engine can hand them out. `ids` as in GPU_IDS: numbers or UUIDs, or `all`.

    Raises NoDevice when GPUs are wanted and cannot be had, or when one of the ids is not there.
    """
    if wanted == "cpu":
        return "cpu"
    gpus = list_gpus(environment)
    if wanted == "auto" and not (gpus and NVIDIA_RUNTIME in engine.runtimes):
        return "cpu"
    if not gpus:
        raise NoDevice("no GPU: nvidia-smi is missing or lists none", remedy="install the driver, or DEVICE=cpu")
    if NVIDIA_RUNTIME not in engine.runtimes:
        raise NoDevice("the engine has no NVIDIA runtime", remedy=f"{_INSTALL_TOOLKIT}; or use DEVICE=cpu")
    for item in ids.split(","):
        if ids != "all" and item.strip() not in gpus:
            known = ", ".join(name for name in gpus if name.isdigit())
            raise NoDevice(f"GPU_IDS: there is no GPU '{item.strip()}'", remedy=f"this host has: {known}")
    return "gpu"


def gpu_ids(environment: Mapping[str, str]) -> str:
    """GPU_IDS, or the first GPU_COUNT ones, or all. Raises ConfigError when both are set or the count is no number."""
    ids, count = environment.get("GPU_IDS", ""), environment.get("GPU_COUNT", "")
    if ids and count:
        raise ConfigError("GPU_IDS and GPU_COUNT are both set", remedy="set one of them")
    if not count or count == "all":
        return ids or "all"
    if not re.fullmatch(r"[1-9][0-9]?", count):
        raise ConfigError(f"GPU_COUNT is '{count}'", remedy="a number from 1, or all")
    return ",".join(str(index) for index in range(int(count)))


def list_gpus(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Numbers and UUIDs of the host's GPUs; empty when there is none or no driver."""
    program = shutil.which("nvidia-smi", path=environment.get("PATH", os.defpath))
    if program is None:
        return ()
    listed = _run([program, "-L"])
    found = re.findall(r"^GPU (\d+): .*\(UUID: (\S+)\)", listed.stdout, re.MULTILINE) if listed.returncode == 0 else []
    return tuple(name for pair in found for name in pair)


def last_line(text: str) -> str:
    """The last line that says something: there engines and Compose put the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def _engine_version(docker: str) -> str:
    asked = _run([docker, "version", "--format", "{{.Server.Version}}"])
    if asked.returncode == 0 and asked.stdout.strip():
        return asked.stdout.strip()
    message = last_line(asked.stderr)
    if "permission denied" in message.lower():
        raise ServerError("this user may not use the Docker engine", remedy="join the group docker, or use sudo")
    raise ServerError(
        f"the Docker engine does not answer: {message}", remedy="start it: systemctl start docker, or dockerd"
    )


def _find_compose(docker: str, path: str) -> tuple[tuple[str, ...], str]:
    """The plugin first: where both are installed it is the newer one."""
    plugin = _run([docker, "compose", "version", "--short"])
    if plugin.returncode == 0 and re.match(r"v?\d", plugin.stdout):
        return (docker, "compose"), plugin.stdout.strip()
    program = shutil.which("docker-compose", path=path)
    if program is None:
        raise ServerError("neither `docker compose` nor docker-compose was found", remedy=_INSTALL_COMPOSE)
    return (program,), _run([program, "version", "--short"]).stdout.strip()


def _require(version: str, oldest: tuple[int, int], what: str, remedy: str) -> None:
    found = re.match(r"v?(\d+)\.(\d+)", version)
    if found is None:
        raise ServerError(f"{what} says '{version}' about its version", remedy=remedy)
    if (int(found[1]), int(found[2])) < oldest:
        raise ServerError(f"{what} is {version}, {oldest[0]}.{oldest[1]} or newer is needed", remedy=remedy)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"{command[0]} cannot be run: {error}", remedy="check the installation") from error
