"""Rollouts on a real TorchServe while clients keep asking: every answer is there, and is the right one of one version."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from marina import archive, serving
from marina import store as model_store
from marina.archive import Archive
from marina.client import NO_RETRIES, InferenceClient, ManagementClient
from marina.golden import prove
from marina.server import Server
from support import images, torchserve
from support.artifacts import write_artifact
from support.commands import ROOT, Ran, environment, marina, project
from support.torchserve import eventually

PICTURES = [images.photo(seed) for seed in range(12)]
_OPTIONS = {"management": "--url", "inference": "--inference-url"}
STEPS = ["verify", "look", "publish", "load", "golden", "default", "retire"]
Table = dict[str, list[dict[int, float]]]
"""Version -> per picture, the probability per class."""


@dataclass
class Stage:
    """A project with two versions of one model, and the server that started with the first."""

    home: Path
    packed: dict[str, Archive]
    settings: Any
    server: Server
    expected: Table = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.home / "model_store"

    @property
    def urls(self) -> list[str]:
        kinds = ("management", "inference")
        return [item for kind in kinds for item in (_OPTIONS[kind], self.settings.url(kind))]

    def run(self, *arguments: str) -> Ran:
        return marina(self.home, *arguments, *self.urls, "--json")

    def deploy(self, mar: Path, *options: str) -> Ran:
        return self.run("deploy", str(mar), *options, "--supervisor-url", self.settings.url("supervisor"))

    def versions(self) -> dict[str, tuple[bool, int]]:
        """Version -> (default, ready workers)."""
        with ManagementClient(self.settings.url("management")) as client:
            return {item.version: (bool(item.default), item.ready_workers) for item in client.versions("tiny")}

    def table(self, version: str) -> list[dict[int, float]]:
        with InferenceClient(self.settings.url("inference")) as client:
            return [_probabilities(client, picture, version)[1] for picture in PICTURES]


def _start(home: Path, settings: Any) -> Server:
    """What `marina serve` without names does."""
    store = home / "model_store"
    models = serving.at_start(store)
    server = Server(models, settings, prove=prove, expected=serving.Following(store, models))
    server.start()
    return server


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    home = project(tmp_path_factory.mktemp("home"))
    outside = tmp_path_factory.mktemp("built")
    packed = {
        version: archive.pack(
            write_artifact(home / "artifacts", version=version, seed=seed),
            handlers=ROOT / "handlers",
            destination=outside,
        )
        for seed, version in enumerate(("1.0", "2.0"))
    }
    store = home / "model_store"
    store.mkdir()
    shutil.copy(packed["1.0"].path, store)
    model_store.publish(store, dataclasses.replace(packed["1.0"], path=store / packed["1.0"].path.name))
    settings = torchserve.settings(log_requests=False)
    found = Stage(home, packed, settings, _start(home, settings))
    found.expected["1.0"] = found.table("1.0")
    try:
        yield found
    finally:
        found.server.stop(drain=False)


@dataclass
class Load:
    """Clients that ask one after the other and compare every answer with the one of its version."""

    stage: Stage
    counts: Counter[str] = field(default_factory=Counter)
    unchecked: list[tuple[str, int, dict[int, float]]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, number: int) -> None:
        picture = number
        with InferenceClient(self.stage.settings.url("inference"), retries=NO_RETRIES) as client:
            while not self._stop.wait(0.01):  # leaves the processor to the workers that load
                picture = (picture + 5) % len(PICTURES)
                try:
                    version, found = _probabilities(client, PICTURES[picture], None)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is a failed answer
                    self.counts[f"failed: {error!r}"] += 1
                else:
                    self.counts[version] += 1
                    self.unchecked.append((version, picture, found))

    def wrong(self) -> list[tuple[str, int]]:
        return [
            (version, picture)
            for version, picture, found in self.unchecked
            if version not in self.stage.expected or not _close(found, self.stage.expected[version][picture])
        ]

    def failed(self) -> dict[str, int]:
        return {kind: count for kind, count in self.counts.items() if kind.startswith("failed")}


@contextlib.contextmanager
def load(stage: Stage, clients: int = 4) -> Iterator[Load]:
    """Under way when the block begins, and still when it ends."""
    found = Load(stage)
    threads = [threading.Thread(target=found.ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: found.counts.total() > 2 * clients, "answers")
        yield found
        so_far = found.counts.total()
        eventually(lambda: found.counts.total() > so_far + 2 * clients, "answers after the change")
    finally:
        found._stop.set()
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "a request hangs"


def _probabilities(client: InferenceClient, picture: bytes, version: str | None) -> tuple[str, dict[int, float]]:
    answer = client.predict("tiny", picture, version=version, top_k=3)
    (labels,) = answer.predictions
    return answer.version, {label.index: label.probability for label in labels}


def _close(found: dict[int, float], expected: dict[int, float]) -> bool:
    return found.keys() == expected.keys() and all(abs(found[index] - expected[index]) < 2e-4 for index in expected)


def _ready(stage: Stage) -> bool:
    return requests.get(f"{stage.settings.url('supervisor')}/readyz", timeout=5).status_code == 200


class TestTheLifeOfAVersion:
    """In this order: each test takes over the state of the one before."""

    def test_deploy_under_load_loses_nothing(self, stage: Stage) -> None:
        with load(stage) as seen:
            ran = stage.deploy(stage.packed["2.0"].path)
        assert ran.code == 0, ran.err
        stage.expected["2.0"] = stage.table("2.0")
        assert not _close(stage.expected["1.0"][0], stage.expected["2.0"][0]), "the two versions must differ"
        assert seen.failed() == {} and seen.wrong() == []
        assert seen.counts["1.0"] and seen.counts["2.0"]
        assert stage.versions() == {"2.0": (True, 1)}
        done = [step["what"] for step in ran.json["steps"] if not step["error"]]
        assert len(done) == len(ran.json["steps"])
        assert [what.split()[0] for what in done] == STEPS
        assert (ran.json["default"], ran.json["previous"]) == ("2.0", "1.0")
        eventually(lambda: _ready(stage), "ready with the new version expected")

    def test_rollback_to_a_retired_version_under_load_loses_nothing(self, stage: Stage) -> None:
        with load(stage) as seen:
            ran = stage.run("rollback", "tiny", "--keep")
        assert ran.code == 0, ran.err
        assert seen.failed() == {} and seen.wrong() == []
        assert seen.counts["1.0"] and seen.counts["2.0"]
        assert stage.versions() == {"1.0": (True, 1), "2.0": (False, 1)}
        eventually(lambda: _ready(stage), "ready with both versions expected")

    def test_rollback_between_loaded_versions_is_quick(self, stage: Stage) -> None:
        with load(stage) as seen:
            for default in ("2.0", "1.0"):
                ran = stage.run("rollback", "tiny", "--keep")
                assert (ran.code, ran.json["default"]) == (0, default), ran.err
                assert sum(step["seconds"] for step in ran.json["steps"]) < 10
        assert seen.failed() == {} and seen.wrong() == []

    def test_the_default_is_not_retired(self, stage: Stage) -> None:
        ran = stage.run("retire", "tiny:1.0")
        assert ran.code == 7
        assert "default" in ran.json["error"] and ran.json["remedy"]

    def test_retire_answers_the_pinned_requests_first(self, stage: Stage) -> None:
        with load(stage) as seen:
            ran = stage.run("retire", "tiny:2.0")
        assert ran.code == 0, ran.err
        assert seen.failed() == {} and seen.wrong() == []
        assert stage.versions() == {"1.0": (True, 1)}
        assert stage.run("retire", "tiny:2.0").code == 7

    def test_scaling_up_and_down_under_load_loses_nothing(self, stage: Stage) -> None:
        with load(stage) as seen:
            up = stage.run("scale", "tiny", "2")
            between = stage.versions()
            down = stage.run("scale", "tiny", "1")
        assert (up.code, down.code) == (0, 0), up.err + down.err
        assert between == {"1.0": (True, 2)} and stage.versions() == {"1.0": (True, 1)}
        assert seen.failed() == {} and seen.wrong() == []

    def test_other_bytes_of_a_served_version_are_refused(self, stage: Stage, tmp_path: Path) -> None:
        other = archive.pack(
            write_artifact(tmp_path, version="1.0", seed=9), handlers=ROOT / "handlers", destination=tmp_path / "other"
        )
        ran = stage.deploy(other.path)
        assert ran.code == 5
        assert "other bytes" in ran.json["error"] and "new version" in ran.json["remedy"]
        assert stage.versions() == {"1.0": (True, 1)} and stage.table("1.0") == stage.expected["1.0"]

    def test_a_broken_archive_is_refused_and_the_old_one_serves_on(self, stage: Stage, tmp_path: Path) -> None:
        broken = tmp_path / "tiny-3.0.mar"
        data = bytearray(stage.packed["2.0"].path.read_bytes())
        data[len(data) // 2] ^= 1
        broken.write_bytes(data)
        ran = stage.deploy(broken)
        assert ran.code == 5
        assert "is refused: " in ran.json["error"] and ran.json["remedy"]
        assert stage.versions() == {"1.0": (True, 1)} and not (stage.store / broken.name).exists()

    def test_a_version_that_does_not_load_is_reverted_with_its_cause(self, stage: Stage, tmp_path: Path) -> None:
        """It passes every check outside, and fails only where it is served."""
        handlers = tmp_path / "handlers"
        shutil.copytree(ROOT / "handlers", handlers, ignore=shutil.ignore_patterns("__pycache__"))
        entry = handlers / "image_classifier.py"
        entry.write_text(
            entry.read_text() + "\nimport os\nif 'LOG_LOCATION' in os.environ:\n    raise OSError('no room in here')\n"
        )
        artifact = write_artifact(tmp_path, version="4.0", seed=4)
        packed = archive.pack(artifact, handlers=handlers, destination=tmp_path / "built")
        before = serving.read(stage.store)
        with load(stage) as seen:
            ran = stage.deploy(packed.path)
        assert ran.code == 5, ran.err
        assert "tiny 4.0 did not load: OSError: no room in here" in ran.json["error"]
        assert "(reverted, tiny is served as before)" in ran.json["error"]
        assert seen.failed() == {} and seen.wrong() == []
        assert stage.versions() == {"1.0": (True, 1)} and serving.read(stage.store) == before
        assert not (stage.store / packed.path.name).exists()

    def test_an_interrupted_deploy_is_reverted(self, stage: Stage) -> None:
        (stage.store / "tiny-2.0.mar").unlink()
        with subprocess.Popen(
            [sys.executable, "-m", "marina", "deploy", str(stage.packed["2.0"].path), *stage.urls],
            env=environment(stage.home, PYTHONUNBUFFERED="1"), cwd=stage.home, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            seen: list[str] = []
            for line in process.stdout:
                if line.startswith("local: load tiny:2.0") and line not in seen:
                    process.send_signal(signal.SIGINT)
                seen.append(line)
            assert process.wait(30) == 130, seen
        assert any("interrupted; reverted, tiny is served as before" in line for line in seen), seen
        assert stage.versions() == {"1.0": (True, 1)} and not (stage.store / "tiny-2.0.mar").exists()

    def test_a_restart_comes_back_with_what_was_deployed(self, stage: Stage) -> None:
        """The newest version is 2.0, and 1.0 was chosen; two workers although the archive says one."""
        assert stage.deploy(stage.packed["2.0"].path, "--keep").code == 0
        assert stage.run("rollback", "tiny", "--keep").code == 0
        assert stage.run("scale", "tiny", "2").code == 0
        before = stage.versions()
        assert before == {"1.0": (True, 2), "2.0": (False, 1)}
        stage.server.stop()
        stage.server = _start(stage.home, stage.settings)
        assert stage.versions() == before
        assert stage.run("rollback", "tiny").json["default"] == "2.0"


def test_status_shows_what_is_served(stage: Stage) -> None:
    ran = marina(stage.home, "status", "--url", stage.settings.url("management"), "--json")
    assert ran.code == 0, ran.err
    assert {model["name"] for model in ran.json["models"]} == {"tiny"}
    assert sum(model["default"] for model in ran.json["models"]) == 1


def test_without_a_server_there_is_one_clear_line(tmp_path: Path) -> None:
    home = project(tmp_path / "home")
    ran = marina(home, "status", "--url", "http://127.0.0.1:9", "--json")
    assert ran.code == 7
    assert "127.0.0.1:9" in ran.json["error"] and "marina serve" in ran.json["remedy"]
