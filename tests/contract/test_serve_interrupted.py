"""Ctrl-C while `marina serve --json` still starts: one object and exit code 130, for there never was a server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from marina import archive, processes, store
from support.artifacts import write_artifact
from support.commands import environment, project

DEADLINE_SECONDS = 60


def test_an_interrupted_start_is_no_success(tmp_path: Path) -> None:
    home = project(tmp_path / "home")
    folder = home / "model_store"
    artifact = write_artifact(home / "artifacts")
    store.publish(folder, archive.pack(artifact, handlers=home / "handlers", destination=folder))
    options = ("--port", "--management-port", "--metrics-port", "--supervisor-port")
    ports = [item for pair in zip(options, map(str, processes.free_ports(4)), strict=True) for item in pair]
    process = subprocess.Popen(
        [sys.executable, "-m", "marina", "serve", *ports, "--json"],
        env=environment(home), cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not psutil.Process(process.pid).children():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130, err[-3000:]
    assert json.loads(out)["exit_code"] == 130 and "Traceback" not in err
