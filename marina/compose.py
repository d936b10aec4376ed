"""`marina up`, `down`, `logs`: the stack of docker-compose.yml, started only after everything that can be checked was.

What the files and `.env` say is asked from Compose itself (`config`), so that there is one reader of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import requests
import yaml

from handlerlib.spec import SPEC_FILE, ModelSpec
from marina import gateway, images, serving, store, verify
from marina.archive import Archive
from marina.client import Answer, InferenceClient
from marina.engine import Device, Engine, Wanted, choose_device, find_engine, gpu_ids, last_line
from marina.errors import ArchiveError, ConfigError, NotReady, PortBusy, ServerError, StoreError
from marina.home import Home

COMPOSE_FILE = "docker-compose.yml"
CPU_FILE = "docker-compose.cpu.yml"
TLS_FILE = "deploy/docker-compose.tls.yml"
LOCAL_FILE = "docker-compose.override.yml"
"""A host's own additions; used when it is there, as Compose itself would."""
GRAFANA_PORT = 3000
SBOM = "/usr/share/marina/sbom.json"
HEALTHCHECK = ("/opt/venv/bin/python", "-I", "-S", "/opt/marina/healthcheck.py")

_STORE_TARGET = "/opt/marina/model_store"
_SECRETS_TARGET = "/run/secrets/gateway"
_POLL_SECONDS = 0.5
_SAY_EVERY_SECONDS = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """One container of the stack at one moment."""

    id: str
    name: str
    running: bool
    restarts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Where the gateway listens on this host."""

    host: str
    port: int

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("", "0.0.0.0") else self.host
        return f"http://{host}:{self.port}"


@dataclass(frozen=True)
class Stack:
    """The services of the compose files in one project folder, on one engine."""

    engine: Engine
    home: Home
    files: tuple[str, ...]
    environment: Mapping[str, str]

    def command(self, *arguments: str) -> list[str]:
        """Compose with our files."""
        files = [part for name in self.files for part in ("-f", str(self.home.root / name))]
        return [*self.engine.compose, "--project-directory", str(self.home.root), *files, *arguments]

    def run(self, *arguments: str) -> str:
        """What Compose prints. Raises ServerError with the last line of its messages."""
        done = subprocess.run(
            self.command(*arguments), env=dict(self.environment), capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ServerError(f"compose {arguments[0]}: {_reason(done.stderr)}", remedy="see the message")
        return done.stdout

    def show(self, *arguments: str) -> int:
        """Compose with its own output on our standard error; returns its exit status."""
        return subprocess.run(
            self.command(*arguments), env=dict(self.environment), stdout=sys.stderr, check=False
        ).returncode

    @cached_property
    def services(self) -> Mapping[str, Mapping[str, Any]]:
        """The services as Compose understood them. Raises ConfigError when it does not."""
        try:
            return dict(yaml.safe_load(self.run("config"))["services"])
        except ServerError as error:
            raise ConfigError(str(error), remedy="correct the compose file, or the variable that it names") from error

    def containers(self, service: str) -> list[Container]:
        """Running or not, ordered by name."""
        # Compose v2 lists only running ones unless asked; 1.29 lists all and knows no such option.
        everything = [] if self.engine.compose_version.startswith("1.") else ["--all"]
        ids = self.run("ps", "-q", *everything, service).split()
        found = json.loads(self.engine.ask("inspect", *ids)) if ids else []
        return sorted(
            (
                Container(
                    id=item["Id"],
                    name=item["Name"].lstrip("/"),
                    running=item["State"]["Running"] and not item["State"]["Restarting"],
                    restarts=item["RestartCount"],
                )
                for item in found
            ),
            key=lambda item: item.name,
        )

    def internal_url(self, service: str, port: int) -> str:
        """Address of a port that is not published: only this host, and containers of the stack, have a way there.

        Empty when the service does not run.
        """
        for item in self.containers(service):
            networks = json.loads(self.engine.ask("inspect", item.id))[0]["NetworkSettings"]["Networks"]
            addresses = [entry["IPAddress"] for name, entry in networks.items() if name.endswith("_inner")]
            if item.running and addresses[0]:
                return f"http://{addresses[0]}:{port}"
        return ""

    def source(self, service: str, target: str) -> Path:
        """The host's folder that is mounted there. Raises ConfigError when none is."""
        for volume in self.services[service].get("volumes", ()):
            source, where = volume.split(":")[:2] if isinstance(volume, str) else (volume["source"], volume["target"])
            if where == target:
                return Path(source)
        raise ConfigError(f"{service} has no volume at {target}", remedy=f"mount one in {COMPOSE_FILE}")

    @cached_property
    def published(self) -> Published:
        """The gateway's first port."""
        first = self.services["gateway"]["ports"][0]
        if isinstance(first, str):  # 127.0.0.1:8000:8000/tcp, as docker-compose 1.29 has it
            host, port, _ = first.rsplit(":", 2)
            return Published(host=host, port=int(port))
        return Published(host=first.get("host_ip", ""), port=int(first["published"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A stack that answered."""

    url: str
    device: Device
    replicas: int
    key_file: Path
    models: tuple[str, ...]
    """NAME:VERSION"""
    answer: Answer
    """To a golden sample of the first model, sent through the gateway with the key."""
    seconds: float
    """From the first container's start to that answer."""
    curl: str
    """A shell line that asks the same again."""
    dashboards: str
    """Grafana's address for this host alone; empty when it does not run."""


def open_stack(
    home: Home, device: Wanted = "cpu", *, tls: bool = False, environment: Mapping[str, str] = os.environ
) -> Stack:
    """The stack for a device. Raises ServerError without a usable engine, NoDevice without the wanted GPUs."""
    engine = find_engine(environment)
    ids = gpu_ids(environment)
    files = [COMPOSE_FILE]
    if choose_device(engine, device, ids, environment) == "cpu":
        files.append(CPU_FILE)
    if tls:
        files.append(TLS_FILE)
    if (home.root / LOCAL_FILE).is_file():
        files.append(LOCAL_FILE)
    if not (home.root / COMPOSE_FILE).is_file():
        raise ConfigError(f"there is no {COMPOSE_FILE} in {home.root}", remedy="run it in the project folder")
    given = {"GPU_IDS": ids} if "GPU_IDS" in environment or "GPU_COUNT" in environment else {}
    return Stack(engine, home, tuple(files), {**environment, **given})


def up(
    home: Home,
    device: Wanted = "auto",
    *,
    services: Sequence[str] = (),
    build: bool = True,
    tls: bool = False,
    timeout_s: float = 300.0,
    say: Say = print,
    environment: Mapping[str, str] = os.environ,
) -> Running:
    """Check the host, make the keys, build or pull, start, and return when a golden sample came back as a label.

    `services` starts only these and not all. Idempotent: on a running stack it applies what changed. Raises ServerError
    (engine, GPU, port, start), ConfigError (settings, keys) or ArchiveError (model store), each before anything starts
    where that can be known; a stack that does not get ready is left running, so that it can be looked at.
    """
    stack = open_stack(home, device, tls=tls, environment=environment)
    check_settings(stack)
    models = check_store(stack.source("torchserve", _STORE_TARGET))
    keys = prepare_secrets(stack.source("gateway", _SECRETS_TARGET).parent, tls=tls)
    check_port(stack)
    stack, started_services = _provide_images(stack, services, build, say)
    before = {item.id: item.restarts for item in stack.containers("torchserve")}
    started = time.monotonic()
    say(f"starting on {'the CPU' if CPU_FILE in stack.files else 'GPUs'}")
    if stack.show("up", "-d", "--no-build", "--remove-orphans", *started_services) != 0:
        raise ServerError("the containers were not started: see the message above", remedy="correct it and run again")
    wait_ready(stack, before, started + timeout_s, say)
    answer = _first_answer(stack.published.url, keys.key.read_text("ascii").strip(), models[0])
    return Running(
        url=stack.published.url,
        device="cpu" if CPU_FILE in stack.files else "gpu",
        replicas=len(stack.containers("torchserve")),
        key_file=keys.key,
        models=tuple(item.key for item in models),
        answer=answer,
        seconds=time.monotonic() - started,
        curl=curl_line(home, stack.published.url, keys.key, models[0]),
        dashboards=stack.internal_url("grafana", GRAFANA_PORT),
    )


def down(home: Home, *, keep_data: bool = False, environment: Mapping[str, str] = os.environ) -> None:
    """Drain, stop and remove containers and networks, and the volumes (metrics, dashboards' state) unless kept."""
    stack = open_stack(home, "cpu", environment={**environment, "COMPOSE_PROFILES": "gpu-metrics"})
    if stack.show("down", "--remove-orphans", *([] if keep_data else ["--volumes"])) != 0:
        raise ServerError("not everything was removed: see the message above", remedy="run it again")


def logs(
    home: Home, services: Sequence[str] = (), *, follow: bool = False, tail: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> int:  # fmt: skip
    """Print the containers' logs; returns Compose's exit status."""
    stack = open_stack(home, "cpu", environment=environment)
    options = [*(["--follow"] if follow else []), *([f"--tail={tail}"] if tail is not None else [])]
    return subprocess.run(
        stack.command("logs", "--no-color", *options, *services), env=dict(stack.environment), check=False
    ).returncode


def sbom(home: Home, *, environment: Mapping[str, str] = os.environ) -> str:
    """The image's bill of materials, CycloneDX JSON. Raises ServerError when there is no image yet."""
    stack = open_stack(home, "cpu", environment=environment)
    image = stack.services["torchserve"]["image"]
    return stack.engine.ask("run", "--rm", "--network", "none", "--entrypoint", "/bin/cat", image, SBOM)


# ------------------------------------------------------------------------------------------------------------- checks


def check_settings(stack: Stack) -> None:
    """Raises ConfigError when a container would be killed before its drain can end."""
    service = stack.services["torchserve"]
    drain = float(service["environment"]["MARINA_DRAIN_SECONDS"])
    grace = _seconds(str(service["stop_grace_period"]))
    if grace < drain + 5:
        raise ConfigError(
            f"STOP_SECONDS is {grace:g}, DRAIN_SECONDS {drain:g}: the engine would kill a server that still drains",
            remedy=f"set STOP_SECONDS to {drain + 30:g} or more",
        )


def check_store(folder: Path) -> list[Archive]:
    """The archives that will be served. Raises StoreError or ArchiveError naming the first that would not be.

    Whether a model loads and answers its golden samples is checked by the container that serves it, before it is ready.
    """
    found = store.select(folder, [f"{model.name}:{model.version}" for model in serving.at_start(folder)])
    for item in found:
        for path in (item.path, folder / store.INDEX_FILE):
            if not path.stat().st_mode & 0o004:
                raise StoreError(f"{path} cannot be read by the container's user", remedy=f"chmod a+r {path}")
        with tempfile.TemporaryDirectory(prefix="marina-up-") as scratch:
            subject = verify.Subject(item.path, Path(scratch), sys.executable)
            for check in verify.CHECKS:
                finding = next(check.run(subject), None) if check.guard else None
                if isinstance(finding, verify.Finding):  # a sentence is a note, no reason to refuse
                    raise ArchiveError(
                        f"{item.path} is refused: {finding.where}: {finding.message}", remedy=finding.remedy
                    )
    return found


def prepare_secrets(folder: Path, *, tls: bool = False) -> gateway.Secrets:
    """Make what is not there yet. Raises ConfigError when what is there cannot be used."""
    try:
        made = gateway.create_keys(folder)
        made.key.read_text("ascii")
        _create_dashboard_password(folder)
        if tls and not (folder / gateway.GATEWAY_FOLDER / gateway.CERTIFICATE_FILE).exists():
            gateway.create_certificate(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the keys in {folder} cannot be used: {error}", remedy=f"give this user the folder, or remove {folder}"
        ) from error
    return made


def check_port(stack: Stack) -> None:
    """Raises PortBusy when another program has the gateway's port; our own running gateway may keep it."""
    if any(item.running for item in stack.containers("gateway")):
        return
    wanted = stack.published
    with socket.socket(socket.AF_INET6 if ":" in wanted.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((wanted.host.strip("[]"), wanted.port))
        except OSError as error:
            raise PortBusy(
                f"the gateway's port {wanted.port} cannot be used: {error.strerror}",
                remedy="stop what uses it, or set GATEWAY_PORT to another one",
            ) from error


def wait_ready(stack: Stack, restarts: Mapping[str, int], deadline: float, say: Say) -> None:
    """Return when the gateway has a ready replica and every replica is ready.

    `restarts` is how often each container had been restarted before. Raises NotReady with the cause as soon as one has
    ended, and at the deadline (time.monotonic() seconds).
    """
    said = time.monotonic()
    while True:
        replicas = stack.containers("torchserve")
        for item in replicas:
            if not item.running or item.restarts > restarts.get(item.id, 0):
                raise _broken(stack, item)
        open_gateway = _answers(f"{stack.published.url}/healthz")
        ready = [item for item in replicas if open_gateway and _is_ready(stack.engine, item)]
        if replicas and len(ready) == len(replicas):
            return
        if time.monotonic() > deadline:
            raise NotReady(
                f"{len(ready)} of {len(replicas)} replicas are ready, the gateway "
                f"{'has one' if open_gateway else 'has none'}: time is up",
                remedy="see `marina logs`; allow more with --timeout",
            )
        if time.monotonic() - said > _SAY_EVERY_SECONDS:
            said = time.monotonic()
            say(f"waiting: {len(ready)} of {len(replicas)} replicas ready")
        time.sleep(_POLL_SECONDS)


# -------------------------------------------------------------------------------------------------------------- steps


def curl_line(home: Home, url: str, key: Path, model: Archive) -> str:
    """A line for a shell in the project folder that sends a golden sample."""
    name = _first_sample(model)[0]
    exported = home.artifacts / model.name / model.version / name
    ask = f'curl -sS -H "Authorization: Bearer $(cat {_shown(key)})" --data-binary'
    target = f"{url}/predictions/{model.name}"
    if exported.is_file():
        return f"{ask} @{_shown(exported)} {target}"
    return f"unzip -p {_shown(model.path)} {shlex.quote(name)} | {ask} @- {target}"


def _provide_images(stack: Stack, services: Sequence[str], build: bool, say: Say) -> tuple[Stack, tuple[str, ...]]:
    """Have all images: others' are pulled or replaced, ours is built unless it names a registry.

    Returns the stack with the images that were found, and the services to start.
    """
    provided = images.provide(stack.engine, stack.services, services, stack.home.root, say)
    stack = dataclasses.replace(stack, environment={**stack.environment, **provided.variables})
    image = str(stack.services["torchserve"]["image"])
    if "/" in image or not build:
        return stack, provided.services
    base = images.base_image(stack.engine, stack.services["torchserve"], say)
    stack = dataclasses.replace(stack, environment={**stack.environment, **base})
    say(f"building the image {image} (the first time some GB are downloaded)")
    if stack.show("build", "torchserve") != 0:
        raise ServerError(
            "the image was not built: see the message above", remedy="correct it, or set TORCHSERVE_IMAGE"
        )
    return stack, provided.services


def _first_answer(url: str, key: str, model: Archive) -> Answer:
    with InferenceClient(url, key=key) as client:
        return client.predict(model.name, _first_sample(model)[1])


def _first_sample(model: Archive) -> tuple[str, bytes]:
    """File name inside the archive, and its bytes."""
    with zipfile.ZipFile(model.path) as packed:
        spec = ModelSpec.from_json(packed.read(SPEC_FILE).decode())
        name = spec.golden.samples[0].file
        return name, packed.read(name)


def _create_dashboard_password(folder: Path) -> None:
    """For Grafana's first user. Its container runs as a user of its own; `folder` is closed to other users."""
    target = folder / "grafana" / "admin.password"
    if not target.exists():
        target.parent.mkdir(mode=0o755, exist_ok=True)
        target.write_text(secrets.token_urlsafe(24), encoding="ascii")
        target.chmod(0o644)


def _broken(stack: Stack, item: Container) -> NotReady:
    """The server's own error line, which it prints before it ends."""
    done = subprocess.run(
        [stack.engine.docker, "logs", "--tail", "200", item.id], capture_output=True, text=True, check=False
    )
    lines = (done.stdout + done.stderr).splitlines()
    said = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    fixes = [line.strip().removeprefix("fix:").strip() for line in lines if line.strip().startswith("fix:")]
    return NotReady(
        f"{item.name} ended: {said[-1] if said else last_line(done.stdout + done.stderr)}",
        remedy=fixes[-1] if said and fixes else "see `marina logs torchserve`",
        log_tail="\n".join(lines[-40:]),
    )


def _is_ready(engine: Engine, item: Container) -> bool:
    return (
        subprocess.run([engine.docker, "exec", item.id, *HEALTHCHECK], capture_output=True, check=False).returncode == 0
    )


def _answers(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(url, timeout=2).status_code == 200
    return False


def _seconds(text: str) -> float:
    """`1m30s`, `60s`, `500ms` -> seconds."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([0-9.]+)(ms|h|m|s)", text))


def _reason(text: str) -> str:
    """Compose's warnings come first; its error is last, 1.29 adds advice below a colon."""
    errors = [line for line in text.splitlines() if re.match(r"(?i)\s*(error|invalid|the compose file)", line)]
    return (errors[-1] if errors else last_line(text)).strip()


def _shown(path: Path) -> str:
    try:
        return shlex.quote(str(path.relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(path))
