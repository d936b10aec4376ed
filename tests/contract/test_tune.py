"""`marina tune` on a real TorchServe with a tiny model and a tiny grid: what it finds is in the grid, what was served is
served on, and nothing of it is left, whether it ends or is interrupted.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from marina import archive, store
from marina.client import NO_RETRIES, InferenceClient, ManagementClient, ModelStatus
from marina.server import Server
from support import images
from support.artifacts import write_artifact
from support.commands import ROOT, environment, marina, project
from support.torchserve import running

GRID = ("--workers", "1", "--batch-sizes", "2,8", "--delays", "1", "--probe", "1", "--budget", "40", "--p99", "5s")


@dataclass(slots=True)
class Clients:
    """Requests to the served model while something else happens."""

    url: str
    seen: Counter[str] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)

    def ask(self) -> None:
        with InferenceClient(self.url, retries=NO_RETRIES) as client:
            while not self._stop.wait(0.05):
                try:
                    client.predict("tiny", images.photo(0))
                    self.seen["good"] += 1
                except Exception as error:  # noqa: BLE001 - whatever it is, it is a failed answer
                    self.seen[repr(error)] += 1


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = project(tmp_path_factory.mktemp("tune") / "home")
    artifact = write_artifact(found / "artifacts")
    store.publish(
        found / "model_store",
        archive.pack(artifact, handlers=ROOT / "handlers", destination=found / "model_store"),
    )
    return found


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    with running(store.to_serve(store.select(home / "model_store", []))) as found:
        yield found


def served(server: Server) -> tuple[ModelStatus, ...]:
    with ManagementClient(server.management_url) as client:
        return client.status()


def test_tune_finds_settings_and_leaves_the_server_as_it_was(home: Path, server: Server) -> None:
    urls = ("--url", server.management_url, "--inference-url", server.inference_url)
    before = served(server)
    assert [model.name for model in before] == ["tiny"]
    clients = Clients(server.inference_url)
    thread = threading.Thread(target=clients.ask)
    thread.start()
    try:
        _interrupted(home, urls)
        assert served(server) == before
        ran = marina(home, "tune", "tiny", *GRID, *urls, "--json", "--pack")
    finally:
        clients._stop.set()
        thread.join(30)
    assert ran.code == 0, ran.err
    assert set(clients.seen) == {"good"}
    assert served(server) == before, "same version, same workers, same processes"

    found = ran.json
    assert found["remembered"] >= 1, "the interrupted run's measurements are used"
    assert found["best"]["batch_size"] in (2, 8) and found["best"]["workers"] == 1
    assert found["best"]["throughput"]["value"] > 0 and found["best"]["p99_ms"]["value"] <= 5000
    assert {item["batch_size"] for item in found["settings"]} <= {2, 8}
    folder = Path(found["folder"])
    assert (folder / "tune.png").stat().st_size > 10_000
    assert json.loads((folder / "report.json").read_text())["best"] == found["best"]

    assert (found["name"], found["version"]) == ("tiny", "1.1")
    config = yaml.safe_load((home / "artifacts" / "tiny" / "1.1" / "model-config.yaml").read_text())
    assert config["batchSize"] == found["best"]["batch_size"]
    assert "tiny-1.1.mar" in (home / "model_store" / "index.json").read_text(), "verified and published"


def _interrupted(home: Path, urls: tuple[str, ...]) -> None:
    """Ctrl-C after the first measurement."""
    with subprocess.Popen(
        [sys.executable, "-m", "marina", "tune", "tiny", *GRID, *urls],
        env=environment(home, PYTHONUNBUFFERED="1"), cwd=home, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "in flight" in line and process.poll() is None:
                process.send_signal(signal.SIGINT)
                break
        lines += process.stdout.readlines()
        assert process.wait(60) == 130, lines


def test_without_the_model_there_is_one_clear_error(home: Path, server: Server) -> None:
    ran = marina(home, "tune", "nobody", *GRID, "--url", server.management_url, "--inference-url", server.inference_url)
    assert ran.code == 7
    assert "no such model" in ran.err and "marina status" in ran.err
