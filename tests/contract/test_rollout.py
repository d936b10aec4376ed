"""Rollouts on a real TorchServe while clients keep asking: every answer is there, and is the right one of one version."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
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

from marina import archive, canary, gateway, serving
from marina import store as model_store
from marina.archive import Archive
from marina.client import NO_RETRIES, InferenceClient, ManagementClient
from marina.golden import prove
from marina.replica import LocalReplica
from marina.rollout import Rollout
from marina.server import Server
from marina.serving import ModelServing
from support import images, torchserve
from support.artifacts import write_artifact
from support.commands import ROOT, Ran, environment, marina, project
from support.gateway import Front, front, require_haproxy
from support.torchserve import eventually

PICTURES = [images.photo(seed) for seed in range(12)]
_OPTIONS = {"management": "--url", "inference": "--inference-url"}
STEPS = ["verify", "look", "publish", "load", "golden", "shadow", "no", "default", "drain"]
TRIAL = ("--min-agreement", "0", "--max-p99-ratio", "1000", "--sample-seconds", "0.5")
"""Two networks with random weights agree about nothing, and a busy machine is no place to compare latencies."""
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
        return self.run("deploy", str(mar), *TRIAL, *options, "--supervisor-url", self.settings.url("supervisor"))

    def rollout(self, front: canary.Front | None = None) -> Rollout:
        """In this process: for setting a state up, and for what the command line does not say."""
        urls = {f"{kind}_url": self.settings.url(kind) for kind in ("inference", "management", "supervisor")}
        return Rollout([LocalReplica(store=self.store, **urls)], self.store, python=sys.executable, front=front)

    def back_to_the_first(self) -> None:
        """Version 1.0 alone, and 2.0 not in the store."""
        self.rollout().bring("tiny", ModelServing(default="1.0", versions={"1.0": 1}))
        (self.store / "tiny-2.0.mar").unlink(missing_ok=True)

    def kill_deploy(self, event: str, step: str, after: float = 0.0, gate: Front | None = None) -> None:
        """Deploy 2.0 in a process of its own, which is killed there."""
        urls = {kind: self.settings.url(kind) for kind in ("inference", "management", "supervisor")}
        wish = {"store": str(self.store), "archive": str(self.packed["2.0"].path), "name": "tiny", "version": "2.0"}
        gateway = None if gate is None else [str(gate.clients.parent), str(gate.running.log)]
        text = json.dumps({**wish, "urls": urls, "gateway": gateway, "event": event, "step": step, "after": after})
        program = Path(torchserve.__file__).with_name("killed_rollout.py")
        done = subprocess.run(
            [sys.executable, str(program), text], env=environment(self.home), capture_output=True, text=True,
            check=False, timeout=110,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr

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
    settings = torchserve.settings(log_requests=False, log_file=home / "server.log")
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
    url: str
    key: str | None = None
    counts: Counter[str] = field(default_factory=Counter)
    unchecked: list[tuple[str, int, dict[int, float]]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, number: int) -> None:
        picture = number
        with InferenceClient(self.url, key=self.key, retries=NO_RETRIES) as client:
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
def load(stage: Stage, clients: int = 4, gate: Front | None = None) -> Iterator[Load]:
    """Under way when the block begins, and still when it ends; through the gateway where there is one."""
    found = Load(stage, stage.settings.url("inference")) if gate is None else Load(stage, gate.running.url, gate.key)
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
            ran = stage.deploy(stage.packed["2.0"].path, "--sample-seconds", "10")
        assert ran.code == 0, ran.err
        stage.expected["2.0"] = stage.table("2.0")
        (shadow,) = [step["found"] for step in ran.json["steps"] if step["what"].startswith("shadow")]
        assert re.match(r"\d+ golden, 0 recorded, [1-9]\d* live inputs; ", shadow), shadow
        assert not _close(stage.expected["1.0"][0], stage.expected["2.0"][0]), "the two versions must differ"
        assert seen.failed() == {} and seen.wrong() == []
        assert seen.counts["1.0"] and seen.counts["2.0"]
        assert stage.versions() == {"1.0": (False, 1), "2.0": (True, 1)}, "the old version is kept for a rollback"
        assert {gate["gate"] for gate in ran.json["gates"]} == {"error rate", "p99", "agreement"}
        done = [step["what"] for step in ran.json["steps"] if not step["error"]]
        assert len(done) == len(ran.json["steps"])
        assert [what.split()[0] for what in done] == STEPS
        assert (ran.json["default"], ran.json["previous"]) == ("2.0", "1.0")
        eventually(lambda: _ready(stage), "ready with the new version expected")

    def test_rollback_to_a_retired_version_under_load_loses_nothing(self, stage: Stage) -> None:
        assert stage.run("retire", "tiny:1.0").code == 0
        assert stage.versions() == {"2.0": (True, 1)}
        with load(stage) as seen:
            ran = stage.run("rollback", "tiny")
        assert ran.code == 0, ran.err
        assert seen.failed() == {} and seen.wrong() == []
        assert seen.counts["1.0"] and seen.counts["2.0"]
        assert stage.versions() == {"1.0": (True, 1), "2.0": (False, 1)}
        eventually(lambda: _ready(stage), "ready with both versions expected")

    def test_rollback_between_loaded_versions_is_quick(self, stage: Stage) -> None:
        with load(stage) as seen:
            for default in ("2.0", "1.0"):
                ran = stage.run("rollback", "tiny")
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
        assert "(reverted, tiny 1.0 is served as before)" in ran.json["error"]
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
        assert any("interrupted; reverted, tiny 1.0 is served as before" in line for line in seen), seen
        assert stage.versions() == {"1.0": (True, 1)} and not (stage.store / "tiny-2.0.mar").exists()

    def test_a_restart_comes_back_with_what_was_deployed(self, stage: Stage) -> None:
        """The newest version is 2.0, and 1.0 was chosen; two workers although the archive says one."""
        assert stage.deploy(stage.packed["2.0"].path).code == 0
        assert stage.run("rollback", "tiny").code == 0
        assert stage.run("scale", "tiny", "2").code == 0
        before = stage.versions()
        assert before == {"1.0": (True, 2), "2.0": (False, 1)}
        stage.server.stop()
        stage.server = _start(stage.home, stage.settings)
        assert stage.versions() == before
        assert stage.run("rollback", "tiny", "--retire").json["default"] == "2.0"
        assert stage.versions() == {"2.0": (True, 1)}

    def test_a_version_that_disagrees_is_reverted_and_the_gate_named(self, stage: Stage) -> None:
        """Recorded inputs: 30 photos, about which two networks with random weights do not agree."""
        recorded = stage.home / "recorded"
        recorded.mkdir()
        for seed in range(30):
            (recorded / f"{seed}.png").write_bytes(images.photo(seed))
        assert stage.run("retire", "tiny:1.0").code == 7, "it is not loaded"
        before = serving.read(stage.store)
        with load(stage) as seen:
            ran = stage.deploy(stage.packed["1.0"].path, "--min-agreement", "1", "--shadow", str(recorded))
        assert ran.code == 5, ran.out
        assert "tiny 1.0 failed the gate 'agreement' at shadow: " in ran.json["error"]
        assert "at least 100.0% must (reverted, tiny 2.0 is served as before)" in ran.json["error"]
        assert seen.failed() == {} and seen.wrong() == []
        assert stage.versions() == {"2.0": (True, 1)} and serving.read(stage.store) == before


KILLS = [
    ("begin", "", 0.0, "1.0"),
    ("start", "publish", 0.0, "1.0"),
    ("start", "load", 0.0, "1.0"),
    ("start", "load", 0.4, "1.0"),
    ("start", "golden", 0.0, "1.0"),
    ("start", "shadow", 0.0, "1.0"),
    ("start", "default", 0.0, "1.0"),
    ("done", "default", 0.0, "1.0"),
    ("commit", "", 0.0, "2.0"),
    ("start", "drain", 0.0, "2.0"),
]


class TestAKilledDeploy:
    """SIGKILL to the deploying process, under load; then the next command finds a way out."""

    @pytest.mark.parametrize(("event", "step", "after", "default"), KILLS, ids=lambda value: str(value))
    def test_is_settled_and_nobody_notices(
        self, stage: Stage, event: str, step: str, after: float, default: str
    ) -> None:
        stage.back_to_the_first()
        with load(stage, clients=1) as seen:
            stage.kill_deploy(event, step, after)
            # What `marina serve` would start with at this moment.
            assert {model.version for model in serving.at_start(stage.store) if model.default} == {default}
            rollout = stage.rollout()
            assert rollout.recover().startswith("deploy of tiny (at: ") or event == "begin"
        assert seen.failed() == {} and seen.wrong() == []
        served = {"1.0": (True, 1)} if default == "1.0" else {"1.0": (False, 1), "2.0": (True, 1)}
        assert stage.versions() == served
        held = serving.read(stage.store)
        assert held is not None and held.models["tiny"].default == default
        assert set(held.models["tiny"].versions) == set(served)
        assert (stage.store / "tiny-2.0.mar").exists() == (default == "2.0")
        assert rollout.recover() == "", "settled once and for all"


@pytest.fixture(scope="module")
def gate(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A gateway in front of the server."""
    require_haproxy()
    address = stage.settings.url("inference").removeprefix("http://")
    replica = gateway.Replica(address=address, health_port=stage.settings.port("supervisor"))
    with front(tmp_path_factory.mktemp("gateway"), [replica], rate_limit=1_000_000) as found:
        yield found


class TestThroughTheGateway:
    """A canary of real requests."""

    def test_a_growing_share_and_nobody_notices(self, stage: Stage, gate: Front) -> None:
        stage.back_to_the_first()
        folder, log = gate.clients.parent, gate.running.log
        with load(stage, gate=gate) as seen:
            ran = stage.deploy(
                stage.packed["2.0"].path, "--canary", "10,50,100", "--canary-seconds", "1", "--canary-requests", "5",
                "--gateway-folder", str(folder), "--gateway-log", str(log),
            )  # fmt: skip
        assert ran.code == 0, ran.err
        assert seen.failed() == {} and seen.wrong() == []
        done = [step["what"] for step in ran.json["steps"] if step["what"].startswith("canary")]
        assert done == [f"canary: {share} % of requests to tiny:2.0" for share in (10, 50, 100)]
        assert (folder / "splits").read_text() == "", "the canary is over"
        assert any(line["canary"] == "2.0" for line in gate.log_lines())
        assert stage.versions() == {"1.0": (False, 1), "2.0": (True, 1)}

    def test_a_killed_canary_is_taken_back(self, stage: Stage, gate: Front) -> None:
        stage.back_to_the_first()
        splits = gate.clients.parent / "splits"
        before = serving.read(stage.store)
        with load(stage, gate=gate) as seen:
            stage.kill_deploy("done", "canary: 10", gate=gate)
            assert splits.read_text().startswith("tiny 2.0 10 ")
            stage.rollout(canary.Front(splits=splits, open_log=lambda: canary.FileLog(gate.running.log))).recover()
        assert seen.failed() == {} and seen.wrong() == []
        assert splits.read_text() == "" and serving.read(stage.store) == before
        assert stage.versions() == {"1.0": (True, 1)}


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
