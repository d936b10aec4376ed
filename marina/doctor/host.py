"""Whether a server could start on this machine: everything that can be seen without starting one."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from marina import gateway, java, processes, properties
from marina.doctor.finding import Finding, Repair
from marina.doctor.signatures import classify
from marina.engine import list_gpus
from marina.errors import ConfigError, MarinaError, NoJava, PortBusy, ServerError
from marina.home import Home
from marina.settings import OTHER_VARIABLES, ServeSettings

MODULES = ("ts", "yaml", "torch", "torchvision", "safetensors", "PIL", "numpy")
"""What TorchServe's worker and Marina's handlers import."""
SMALLEST_FREE_BYTES = 512 * 1024 * 1024
WORKER_BYTES = 700 * 1024 * 1024
"""What a worker needs beside its weights: Python, torch and its buffers."""
FEWEST_DESCRIPTORS = 1024
_PROGRAM_SECONDS = 4.0
_LOOPBACK = "listen on 127.0.0.1 behind the gateway; only where the network itself is private, --expose that interface"


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What the checks look at."""

    home: Home
    environment: Mapping[str, str]
    serving: bool
    """Whether a server of ours is running here: its ports are then rightly taken."""


def check(host: Host) -> Iterator[Finding]:
    """All that stands in the way of a start here."""
    yield from _java(host.environment)
    yield from _modules()
    settings = yield from _settings(host)
    yield from _allowed(_folders(host))
    yield from _memory(host)
    yield from _descriptors()
    yield from _gpus(host.environment)
    yield from _allowed(_keys(host.home))
    if settings is not None and not host.serving:
        yield from _ports(settings)


def _allowed(findings: Iterator[Finding]) -> Iterator[Finding]:
    """What this user may not look at is a finding too, and hides none of the others."""
    try:
        yield from findings
    except PermissionError as error:
        yield Finding(
            code="file-permissions",
            cause=f"this user may not look at {error.filename}",
            remedy="give this user access, or run this as the user that serves",
        )


def _java(environment: Mapping[str, str]) -> Iterator[Finding]:
    try:
        java.find(environment)
    except NoJava as error:
        yield _from_error("java-too-old" if " is version " in str(error) else "java-missing", error)
    try:
        java.torchserve_home()
    except ServerError as error:
        yield _from_error("torchserve-missing", error)


def _modules() -> Iterator[Finding]:
    for name in MODULES:
        if importlib.util.find_spec(name) is None and name != "ts":
            yield Finding(
                code="python-module-missing",
                cause=f"the Python module '{name}', which every worker imports, is not installed here",
                remedy="run `make setup`",
            )


def _settings(host: Host) -> Generator[Finding, None, ServeSettings | None]:
    """The findings, and as the generator's value the settings when they can be read at all."""
    config = host.home.config
    try:
        settings = ServeSettings.load(
            {"config": host.environment.get("MARINA_CONFIG", config)}, host.environment, other_variables=OTHER_VARIABLES
        )
        properties.check(properties.load(settings.config), environment=host.environment, expose=tuple(settings.expose))
    except ConfigError as error:
        for line in str(error).splitlines():
            public = "is not loopback" in line
            yield Finding(
                code="public-address" if public else "configuration",
                cause=line,
                remedy=_LOOPBACK if public else error.remedy or "correct it",
            )
        return None
    return settings


def _ports(settings: ServeSettings) -> Iterator[Finding]:
    for kind in settings.kinds():
        option = "--port" if kind == "inference" else f"--{kind}-port"
        try:
            processes.require_port(settings.host(kind), settings.port(kind), purpose=kind, option=option)
        except PortBusy as error:
            yield _from_error("port-taken", error)
        except ServerError as error:
            yield _from_error("configuration", error)


def _folders(host: Host) -> Iterator[Finding]:
    temp = Path(host.environment.get("TMPDIR") or tempfile.gettempdir())
    yield from _temp(temp)
    store = host.home.store
    if store.is_dir():
        if not os.access(store, os.R_OK | os.X_OK):
            yield _unreadable(store, "the model store")
        yield from _room(store, "disk-full", "the model store's disk", SMALLEST_FREE_BYTES)
        for archive in sorted(store.glob("*.mar")):
            if not os.access(archive, os.R_OK):
                yield _unreadable(archive, "the archive")
    unpacked = sum(path.stat().st_size for path in store.glob("*.mar")) if store.is_dir() else 0
    if temp.is_dir():
        # TorchServe unpacks every archive there at each start.
        yield from _room(temp, "temp-folder-full", "the temp folder's disk", SMALLEST_FREE_BYTES // 4 + unpacked)


def _temp(temp: Path) -> Iterator[Finding]:
    if not temp.is_dir() or not os.access(temp, os.W_OK | os.X_OK):
        yield Finding(
            code="temp-folder-unusable",
            cause=f"the temp folder {temp} is not a writable folder",
            remedy="set TMPDIR to one that is",
        )
        return
    longest = processes.socket_path_bytes(temp)
    if longest > processes.SOCKET_PATH_LIMIT:
        yield Finding(
            code="socket-path-too-long",
            cause=f"the temp folder {temp} has too long a path for a Unix socket",
            remedy="set TMPDIR to a short one, e.g. /tmp",
            evidence=f"{longest} bytes with TorchServe's own part, at most {processes.SOCKET_PATH_LIMIT}",
        )


def _room(folder: Path, code: str, what: str, needed: int) -> Iterator[Finding]:
    try:
        free = shutil.disk_usage(folder).free
        counts = os.statvfs(folder)
    except OSError:
        return
    if free < needed:
        yield Finding(
            code=code,
            cause=f"{what} has {free / 2**20:.0f} MiB left at {folder}, {needed / 2**20:.0f} MiB are needed",
            remedy="free some space, or put it elsewhere",
        )
    elif counts.f_files and counts.f_favail == 0:
        yield Finding(code=code, cause=f"{what} has no inodes left at {folder}", remedy="remove files there")


def _unreadable(path: Path, what: str) -> Finding:
    return Finding(
        code="file-permissions",
        cause=f"{what} {path} cannot be read by this user",
        remedy=f"give the user that serves access: chmod a+r {path}",
    )


def _memory(host: Host) -> Iterator[Finding]:
    available = psutil.virtual_memory().available
    if not host.serving and available < WORKER_BYTES:
        yield Finding(
            code="host-memory",
            cause=f"{available / 2**20:.0f} MiB of memory are free, one worker needs about {WORKER_BYTES / 2**20:.0f}",
            remedy="end something else, or serve on another machine",
        )
    killed = _killed_by_kernel()
    if killed:
        yield Finding(
            code="worker-killed",
            cause=f"the kernel killed {killed} processes of this container or slice for want of memory",
            remedy="raise its memory limit, or serve with fewer workers or a smaller batchSize",
            evidence="oom_kill in memory.events",
            severity="warning",
        )


def _killed_by_kernel(events: Path = Path("/sys/fs/cgroup/memory.events")) -> int:
    try:
        found = re.search(r"^oom_kill (\d+)$", events.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found is not None else 0


def _descriptors() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEWEST_DESCRIPTORS:
        yield Finding(
            code="too-few-file-descriptors",
            cause=f"a process here may open {soft} files, and every connection is one",
            remedy="raise the limit: ulimit -n 65536, or LimitNOFILE / ulimits.nofile where it is started",
        )


def _gpus(environment: Mapping[str, str]) -> Iterator[Finding]:
    wanted = environment.get("MARINA_DEVICE", "auto")
    program = shutil.which("nvidia-smi", path=environment.get("PATH", os.defpath))
    words = _words_of([program, "-L"]) if program is not None else ""
    known = classify(words) if words else None
    if known is not None and known.code == "gpu-driver":
        yield known
        return
    gpus = [name for name in list_gpus(environment) if name.isdigit()]
    if wanted == "gpu" and not gpus:
        yield Finding(
            code="gpu-missing",
            cause="MARINA_DEVICE is gpu, and nvidia-smi " + ("is missing" if program is None else "lists none"),
            remedy="install the driver (in a container: the NVIDIA container toolkit), or use MARINA_DEVICE=cpu",
            evidence=words[:200],
        )
    yield from _visible(environment.get("CUDA_VISIBLE_DEVICES", ""), gpus, wanted)


def _visible(visible: str, gpus: Sequence[str], wanted: str) -> Iterator[Finding]:
    parts = [part.strip() for part in visible.split(",") if part.strip()]
    if wanted == "cpu" or not parts:
        return
    strange = [part for part in parts if not part.isdigit()]
    absent = [part for part in parts if part.isdigit() and gpus and part not in gpus]
    if strange:
        yield Finding(
            code="gpu-visibility",
            cause=f"CUDA_VISIBLE_DEVICES is '{visible}'; TorchServe understands numbers only and would not start",
            remedy="write GPU numbers, e.g. 0,1, or choose GPUs with NVIDIA_VISIBLE_DEVICES",
        )
    elif absent:
        yield Finding(
            code="gpu-visibility",
            cause=f"CUDA_VISIBLE_DEVICES names GPU {', '.join(absent)}, this machine has {', '.join(gpus)}",
            remedy="correct CUDA_VISIBLE_DEVICES",
        )


def _words_of(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROGRAM_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else f"{done.stdout} {done.stderr}".strip()


def _keys(home: Home) -> Iterator[Finding]:
    folder = home.root / "secrets"
    key, clients = folder / gateway.KEY_FILE, folder / gateway.GATEWAY_FOLDER / gateway.CLIENTS_FILE
    if key.exists() and key.stat().st_mode & 0o077:
        yield Finding(
            code="keys",
            cause=f"{key} can be read by other users of this machine",
            remedy=f"chmod 600 {key}",
            severity="warning",
            repair=Repair(what=f"close {key} to other users", run=lambda: key.chmod(0o600)),
        )
    try:
        known = gateway.read_clients(clients)
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        yield Finding(code="keys", cause=str(error), remedy=getattr(error, "remedy", "") or "check its permissions")
        return
    if key.exists() and os.access(key, os.R_OK) and not _accepted(key.read_text("ascii").strip(), known):
        yield Finding(
            code="keys",
            cause=f"the gateway does not know the key in {key}, or it has expired: requests with it get 401",
            remedy=f"remove {key} and run `make up` to get a new one",
        )


def _accepted(key: str, known: Sequence[gateway.ClientKey]) -> bool:
    digest, now = hashlib.sha256(key.encode()).hexdigest(), time.time()
    return any(entry.digest == digest and (entry.expires_at is None or entry.expires_at > now) for entry in known)


def _from_error(code: str, error: MarinaError) -> Finding:
    return Finding(code=code, cause=str(error), remedy=error.remedy)
