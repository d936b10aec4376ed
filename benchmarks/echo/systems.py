"""The three servers of the echo benchmark: TorchServe as installed, TorchServe with a few settings, Marina."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.errors import NotAvailable
from benchmarks.load import Body
from benchmarks.systems import ROOT, Launch
from marina import java, processes

HERE = Path(__file__).parent
MODEL_CONFIG: Mapping[str, int] = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "batchSize": 64,
    "maxBatchDelay": 1,
    "responseTimeout": 60,
    "startupTimeout": 60,
    "jobQueueSize": 1000,
}
"""Marina's, for 1 connection and for 64."""
_QUIET_LOG = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="WARN"><Loggers><Root level="off"/></Loggers></Configuration>
"""


def stock(folder: Path) -> Launch:
    """`torchserve --start` with every setting at its default: a worker per core, batches of one, all logs."""
    return _torchserve(folder, {}, "")


def stock_quiet(folder: Path) -> Launch:
    """The settings that TorchServe itself offers: one worker, batches up to 16 within 1 ms, no logs."""
    (folder / "log4j2.xml").write_text(_QUIET_LOG)
    quiet = f"vmargs=-Dlog4j.configurationFile=file://{folder}/log4j2.xml\nasync_logging=true\n"
    return _torchserve(folder, {**MODEL_CONFIG, "batchSize": 16}, quiet)


def marina(folder: Path, **settings: Any) -> Launch:
    """The supervisor with its defaults: one JSON line per request and one configuration for any load."""
    archive = pack_echo(folder)
    kinds = ("inference", "management", "metrics", "supervisor")
    ports = dict(zip((f"{kind}_port" for kind in kinds), processes.free_ports(4), strict=True))
    wish = {
        "archive": str(archive),
        "model_config": dict(MODEL_CONFIG),
        "settings": {**ports, "device": "cpu", "log_file": str(folder / "server.log"), **settings},
    }
    return _launch(
        (sys.executable, "-m", "benchmarks.echo.serve", json.dumps(wish)),
        folder,
        ports["inference_port"],
        ready_url=f"http://127.0.0.1:{ports['supervisor_port']}/readyz",
    )


def pack_echo(folder: Path) -> Path:
    """The echo archive that Marina serves, in `folder/store`."""
    return _pack(folder, "marina_handler.py", MODEL_CONFIG, extra=ROOT / "handlers" / "handlerlib")


SYSTEMS: Mapping[str, Callable[[Path], Launch]] = {"stock": stock, "stock-quiet": stock_quiet, "marina": marina}
TITLES: Mapping[str, str] = {
    "stock": "TorchServe, default settings",
    "stock-quiet": "TorchServe, 1 worker, batch 16, delay 1 ms, no logs",
    "marina": "Marina",
}


def _torchserve(folder: Path, config: Mapping[str, int], properties: str) -> Launch:
    program = shutil.which("torchserve", path=str(Path(sys.executable).parent))
    if program is None:
        raise NotAvailable("the program torchserve is not beside this Python", remedy="run `make setup`")
    archive = _pack(folder, "stock_handler.py", config)
    inference, management, metrics, grpc, grpc_management = processes.free_ports(5)
    (folder / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{inference}\nmanagement_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\ngrpc_inference_port={grpc}\n"
        f"grpc_management_port={grpc_management}\n{properties}"
    )
    command = (
        program, "--start", "--foreground", "--ncs", "--disable-token-auth",
        "--ts-config", str(folder / "config.properties"), "--model-store", str(archive.parent),
        "--models", f"echo={archive.name}",
    )  # fmt: skip
    return _launch(command, folder, inference)


def _launch(command: tuple[str, ...], folder: Path, port: int, ready_url: str = "") -> Launch:
    found = java.find()
    logs = str(folder / "logs")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return Launch(
        command=command,
        environment={
            "HOME": os.environ.get("HOME", str(folder)),
            "PATH": path,
            "PYTHONPATH": f"{ROOT / 'handlers'}:{ROOT}",
            "JAVA_HOME": str(found.executable.parent.parent),
            "LOG_LOCATION": logs,
            "METRICS_LOCATION": logs,
            "TEMP": str(folder),
        },
        folder=folder,
        url=f"http://127.0.0.1:{port}/predictions/echo",
        encode=lambda body: Body(body, "application/octet-stream"),
        parse=lambda answer: {"bytes": float(len(answer))},
        ready_url=ready_url,
        packages={"java": str(found.major)},
    )


def _pack(folder: Path, handler: str, config: Mapping[str, int], extra: Path | None = None) -> Path:
    store = folder / "store"
    store.mkdir(exist_ok=True)
    # fmt: off
    command = [
        sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "echo", "--version", "1.0",
        "--handler", str(HERE / handler), "--runtime", "python", "--export-path", str(store), "--force",
    ]
    # fmt: on
    if config:
        (folder / "model-config.yaml").write_text(yaml.safe_dump(dict(config)))
        command += ["--config-file", str(folder / "model-config.yaml")]
    if extra is not None:
        parent = folder / "extra"  # the archiver packs a folder's content, not the folder
        shutil.copytree(extra, parent / extra.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        command += ["--extra-files", str(parent)]
    subprocess.run(command, env={**os.environ, "TMPDIR": str(folder)}, check=True, capture_output=True)
    return store / "echo.mar"
