"""A real TorchServe for tests: tiny archives, ports of the system's choice, the log's tail when a test fails."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from marina import processes
from marina.server import ServedModel, Server
from marina.settings import ServeSettings

HANDLERS = Path(__file__).parent / "handlers"
ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "batchSize": 4,
    "maxBatchDelay": 1,
    "responseTimeout": 60,
    "startupTimeout": 60,
}


def pack(
    handler: str, store: Path, *, version: str = "1.0", default: bool = True, name: str = "", **config: int
) -> ServedModel:
    """An archive of a handler in support/handlers, without weights."""
    name = name or handler
    path = store / f"{name}-{version}.mar"
    settings = {**CONFIG, **config}
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "model-config.yaml").write_text(yaml.safe_dump(settings))
        # fmt: off
        command = [
            sys.executable, "-m", "model_archiver.model_packaging", "--model-name", name, "--version", version,
            "--handler", str(HANDLERS / f"{handler}.py"), "--config-file", f"{scratch}/model-config.yaml",
            "--runtime", "python", "--export-path", scratch,
        ]
        # fmt: on
        subprocess.run(command, env={**os.environ, "TMPDIR": scratch}, check=True, capture_output=True)
        path.write_bytes((Path(scratch) / f"{name}.mar").read_bytes())
    return ServedModel(name=name, version=version, archive_file=path, default=default, config=settings)


def settings(**changes: Any) -> ServeSettings:
    """Free ports, CPU, and quick looks at the state. Without a fork server: these handlers do not import torch."""
    kinds = ("inference", "management", "metrics", "supervisor")
    ports = dict(zip((f"{kind}_port" for kind in kinds), processes.free_ports(4), strict=True))
    values: dict[str, Any] = {**ports, "device": "cpu", "startup_timeout": 60.0, "watch_seconds": 0.2}
    values["fork_server"] = False
    return ServeSettings(**{**values, **changes})


@contextlib.contextmanager
def running(models: Sequence[ServedModel], **changes: Any) -> Iterator[Server]:
    """A started server; its log's tail is printed when the block fails."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(models, settings(**{"log_file": Path(folder) / "log", **changes}))
        with server:
            try:
                yield server
            except BaseException:
                sys.stderr.write(server.log_tail(60))
                raise


@dataclass(frozen=True, slots=True)
class Program:
    """`marina serve` as a process of its own."""

    process: subprocess.Popen[bytes]
    settings: ServeSettings
    output: Path
    temp: Path

    @property
    def text(self) -> str:
        return self.output.read_text()

    def descendants(self) -> list[psutil.Process]:
        """java and the workers."""
        return psutil.Process(self.process.pid).children(recursive=True)


@contextlib.contextmanager
def program(
    models: Sequence[ServedModel], folder: Path, *, wait_ready: bool = True, **changes: Any
) -> Iterator[Program]:
    """The process, from its ready line on unless told otherwise; its output is printed when the block fails."""
    chosen = settings(**changes)
    wish = {
        "settings": chosen.model_dump(mode="json"),
        "models": [{**dataclasses.asdict(model), "archive_file": str(model.archive_file)} for model in models],
    }
    output = folder / "output.txt"
    temp = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))  # pytest's own folders are too long for a socket
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'handlers'}:{ROOT}", "TMPDIR": str(temp)}
    command = [sys.executable, str(Path(__file__).with_name("serve_program.py")), json.dumps(wish)]
    with output.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    found = Program(process, chosen, output, temp)
    try:
        if wait_ready:
            eventually(lambda: "\nready " in f"\n{found.text}" or process.poll() is not None, "the ready line")
        yield found
    except BaseException:
        sys.stderr.write(found.text)
        raise
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        shutil.rmtree(temp)


def eventually(condition: Callable[[], bool], what: str, *, seconds: float = 30.0) -> None:
    """Poll until true; AssertionError naming `what` at the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)


def gone(found: Sequence[psutil.Process]) -> bool:
    """Whether none of these processes runs any more."""
    return not any(item.is_running() and item.status() != psutil.STATUS_ZOMBIE for item in found if _exists(item))


def _exists(item: psutil.Process) -> bool:
    return psutil.pid_exists(item.pid)
