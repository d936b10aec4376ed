"""`marina plan`, `diff` and `apply` on a real TorchServe: the file is what is served, once, again, and after tampering."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from marina import archive, serving
from marina import store as model_store
from marina.archive import Archive
from marina.client import ManagementClient, ModelStatus
from marina.errors import ClientError
from marina.golden import prove
from marina.server import Server
from support import torchserve
from support.artifacts import write_artifact
from support.commands import ROOT, Ran, environment, marina, project
from support.torchserve import eventually

SLOW = 90.0


@dataclass
class Stage:
    """A project with a server that started with version 1.0; 2.0 lies outside its store."""

    home: Path
    second: Archive
    server: Server
    settings: Any

    @property
    def store(self) -> Path:
        return self.home / "model_store"

    def write(self, default: str, versions: dict[str, int], *, more: str = "") -> Path:
        """deploy.toml: this server by its addresses, gates that two random networks pass."""
        table = ", ".join(
            f'"{version}" = {{ workers = {workers}, archive = "{self.second.path}" }}'
            if version == self.second.version
            else f'"{version}" = {workers}'
            for version, workers in versions.items()
        )
        urls = "".join(
            f'{name} = "{self.settings.url(kind)}"\n'
            for name, kind in (("url", "management"), ("inference_url", "inference"), ("supervisor_url", "supervisor"))
        )
        path = self.home / "deploy.toml"
        path.write_text(
            f'[models.tiny]\ndefault = "{default}"\nversions = {{ {table} }}\n[hosts.here]\n{urls}{more}'
            "[gates]\nmin_agreement = 0\nmax_p99_ratio = 1000\n"
        )
        return path

    def run(self, command: str, *options: str) -> Ran:
        return marina(self.home, command, "deploy.toml", "--json", *options)

    def versions(self) -> dict[str, tuple[bool, int]]:
        """Version -> (default, ready workers)."""
        with ManagementClient(self.settings.url("management")) as client:
            try:
                return {item.version: (bool(item.default), item.ready_workers) for item in client.versions("tiny")}
            except ClientError:
                return {}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    home = project(tmp_path_factory.mktemp("home"))
    outside = tmp_path_factory.mktemp("built")
    first, second = (
        archive.pack(
            write_artifact(home / "artifacts", version=version, seed=seed),
            handlers=ROOT / "handlers",
            destination=outside,
        )
        for seed, version in enumerate(("1.0", "2.0"))
    )
    store = home / "model_store"
    store.mkdir()
    shutil.copy(first.path, store)
    model_store.publish(store, dataclasses.replace(first, path=store / first.path.name))
    settings = torchserve.settings(log_requests=False, log_file=home / "server.log")
    models = serving.at_start(store)
    server = Server(models, settings, prove=prove, expected=serving.Following(store, models))
    with server:
        yield Stage(home, second, server, settings)


def test_the_file_becomes_what_is_served_and_a_second_time_changes_nothing(stage: Stage) -> None:
    stage.write("2.0", {"1.0": 1, "2.0": 2})
    stage.write("1.0", {"1.0": 1})
    first = stage.run("apply")
    assert first.code == 0, first.err
    stage.write("2.0", {"1.0": 1, "2.0": 2})
    planned = stage.run("plan")
    assert planned.json["hosts"]["here"]["actions"] == ["deploy tiny:2.0, tried beside 1.0"]
    differs = stage.run("diff", "--exit-code")
    assert differs.code == 1
    assert [row["what"] for row in differs.json["hosts"]["here"]["differences"]] == ["default", "2.0 workers"]
    assert stage.versions() == {"1.0": (True, 1)}, "planning changes nothing"
    done = stage.run("apply")
    assert done.code == 0 and done.json["changed"] is True, done.err
    assert stage.versions() == {"1.0": (False, 1), "2.0": (True, 2)}
    again = stage.run("apply")
    assert again.code == 0 and again.json == {"changed": False, "hosts": {"here": {"actions": []}}}
    assert stage.run("diff", "--exit-code").code == 0
    held = serving.read(stage.store)
    assert held is not None and held.models["tiny"].versions == {"1.0": 1, "2.0": 2}


def test_tampering_is_repaired(stage: Stage) -> None:
    """While `apply --watch` runs: another default, another number of workers, none at all, a version gone or registered
    again with another batch, and a model that nobody asked for."""
    stage.write("1.0", {"1.0": 1, "2.0": 1})
    meant = {"1.0": (True, 1), "2.0": (False, 1)}
    command = [sys.executable, "-m", "marina", "apply", "deploy.toml", "--watch", "--every", "0.5"]
    output = stage.home / "watch.txt"
    with (
        output.open("wb") as stream,
        subprocess.Popen(
            command, env=environment(stage.home), cwd=stage.home, stdout=stream, stderr=subprocess.STDOUT
        ) as watching,
        ManagementClient(stage.settings.url("management")) as client,
    ):
        try:
            eventually(lambda: stage.versions() == meant, "the file's state", seconds=SLOW)
            tampering = {
                "default": lambda: client.set_default("tiny", "2.0"),
                "too many": lambda: client.scale("tiny", 2, "1.0", wait=False),
                "none": lambda: client.scale("tiny", 0, "1.0", wait=False),
                "gone": lambda: client.unregister("tiny", "2.0"),
                "another batch": lambda: _register_again(client, "tiny", "2.0"),
                "a stranger": lambda: _register(client, "tiny-1.0.mar", name="stranger"),
            }
            batches = {item.version: _batch(item) for item in client.versions("tiny")}
            took = {}
            for what, tamper in tampering.items():
                before = output.read_text().count("repaired: ")
                tamper()
                began = time.monotonic()
                eventually(
                    lambda before=before: output.read_text().count("repaired: ") > before, f"{what}: seen", seconds=SLOW
                )
                eventually(lambda: stage.versions() == meant, f"{what}: repaired", seconds=SLOW)
                eventually(lambda: [item.name for item in client.models()] == ["tiny"], what, seconds=SLOW)
                eventually(
                    lambda: {item.version: _batch(item) for item in client.versions("tiny")} == batches,
                    f"{what}: its batch",
                    seconds=SLOW,
                )
                took[what] = round(time.monotonic() - began, 1)
            print(f"repaired after {took} s")  # noqa: T201 - a figure, for whoever reads the test's output
        finally:
            watching.send_signal(signal.SIGINT)
            try:
                watching.wait(30)
            finally:
                watching.kill()
    assert watching.returncode == 130, output.read_text()
    assert "repaired: local: tiny: default: 2.0 -> 1.0" in output.read_text()


def _batch(status: ModelStatus) -> tuple[int, int]:
    return status.batch_size, status.max_batch_delay_ms


def _register_again(client: ManagementClient, name: str, version: str) -> None:
    client.unregister(name, version)
    _register(client, f"{name}-{version}.mar")


def _register(client: ManagementClient, archive: str, *, name: str | None = None) -> None:
    with contextlib.suppress(ClientError):  # it is seen, and may be taken away, before its worker is ready
        client.register(archive, workers=1, batch_size=99, max_batch_delay_ms=500, name=name)


def test_another_host_is_asked_through_its_own_marina(stage: Stage) -> None:
    """A program in place of ssh: the archive travels, and that host's Marina does the rest."""
    program = stage.home / "far"
    calls = stage.home / "calls"
    program.write_text(f'#!/bin/sh\necho "$1" >> "{calls}"\nexec "{sys.executable}" -m marina "$@"\n')
    program.chmod(0o755)
    stage.write("2.0", {"2.0": 1}, more=f'program = ["{program}"]\n')
    planned = stage.run("plan")
    assert planned.code == 0 and planned.json["changed"] is True, planned.err
    done = stage.run("apply")
    assert done.code == 0 and done.json["changed"] is True, done.out
    assert stage.versions() == {"2.0": (True, 1)}
    assert not (stage.store / "incoming").exists(), "what was sent is cleared"
    calls.unlink()
    assert stage.run("apply").json["changed"] is False
    assert calls.read_text().splitlines() == ["plan"], "nothing is sent when nothing differs"


def test_a_host_that_cannot_be_reached_is_named_and_the_others_are_done(stage: Stage) -> None:
    path = stage.write("2.0", {"2.0": 1})
    path.write_text(path.read_text() + '[hosts.far]\nprogram = ["/nowhere/marina"]\n')
    ran = stage.run("apply")
    assert ran.code == 7
    assert ran.json["hosts"]["here"] == {"actions": []}
    assert "/nowhere/marina" in ran.json["hosts"]["far"]["error"] and ran.json["hosts"]["far"]["remedy"]


def test_a_version_that_is_nowhere_is_refused_before_anything_changes(stage: Stage) -> None:
    stage.write("2.0", {"2.0": 1, "9.0": 1})
    before = stage.versions()
    ran = stage.run("apply")
    assert ran.code == 5 and "'tiny:9.0' is not in" in ran.json["hosts"]["here"]["error"]
    assert stage.versions() == before
