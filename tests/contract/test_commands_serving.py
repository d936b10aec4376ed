"""`marina serve`, `predict`, `status`, `scale` and `demo` as processes, on a real TorchServe."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests

from marina import archive, processes, store
from support import images
from support.artifacts import write_artifact
from support.commands import environment, marina, project

DEADLINE_SECONDS = 90


@dataclass(frozen=True, slots=True)
class Serving:
    home: Path
    process: subprocess.Popen[str]
    ready: str
    inference: str
    management: str
    log: Path


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """`marina serve` with no arguments but ports, in a project with two versions of one model."""
    home = project(tmp_path_factory.mktemp("home"))
    for version, seed in (("1.0", 0), ("1.1", 1)):
        artifact = write_artifact(home / "artifacts", version=version, seed=seed)
        store.publish(
            home / "model_store", archive.pack(artifact, handlers=home / "handlers", destination=home / "model_store")
        )
    ports = processes.free_ports(4)
    options = ["--port", "--management-port", "--metrics-port", "--supervisor-port"]
    arguments = [item for pair in zip(options, map(str, ports), strict=True) for item in pair]
    log = home / "serve.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "marina", "serve", *arguments],
            env=environment(home), cwd=home, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    ready = process.stdout.readline()
    assert ready, log.read_text()[-3000:]
    yield Serving(home, process, ready, f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", log)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0, log.read_text()[-3000:]
    with process.stdout as rest:
        assert rest.read() == "", "only the ready line belongs on standard output"
    _, alive = psutil.wait_procs(tree, timeout=5)
    assert alive == []


def test_one_ready_line_names_the_newest_version(serving: Serving) -> None:
    assert serving.ready.startswith(f"ready {serving.inference}/predictions/tiny (tiny 1.1, 1 worker) in ")


def test_predict_reports_a_bad_file_and_answers_the_others(serving: Serving) -> None:
    for seed in range(2):
        (serving.home / f"{seed}.png").write_bytes(images.photo(seed))
    (serving.home / "text.png").write_text("hello")
    ran = marina(
        serving.home, "predict", "tiny", "0.png", "text.png", "gone.png", "1.png", "--url", serving.inference, "--json"
    )
    assert ran.code == 7
    kinds = ["error" if "error" in item else item["labels"][0]["label"] for item in ran.json["results"]]
    assert kinds[1:3] == ["error", "error"]
    assert {kinds[0], kinds[3]} <= set(images.LABELS)
    table = marina(serving.home, "predict", "tiny", "0.png", "--top-k", "1", "--url", serving.inference)
    assert table.code == 0
    assert kinds[0] in table.out


def test_status_and_scale(serving: Serving) -> None:
    scaled = marina(serving.home, "scale", "tiny", "2", "--url", serving.management, "--json")
    assert scaled.code == 0, scaled.err
    (model,) = marina(serving.home, "status", "--url", serving.management, "--json").json["models"]
    assert (model["name"], model["version"], model["ready_workers"]) == ("tiny", "1.1", 2)
    assert "tiny" in marina(serving.home, "status", "--url", serving.management).out
    assert marina(serving.home, "scale", "nobody", "1", "--url", serving.management).code == 7


def test_the_log_is_one_json_line_per_request(serving: Serving) -> None:
    before = len(serving.log.read_text().splitlines())
    for _ in range(5):
        query = "request_id=a-1&trace_id=0af7651916cd43dd8448eb211c80319c"
        requests.post(f"{serving.inference}/predictions/tiny?{query}", data=b"hello", timeout=30)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(lines := serving.log.read_text().splitlines()[before:]) < 5:
        assert time.monotonic() < deadline, serving.log.read_text()[-3000:]
        time.sleep(0.05)
    assert len(lines) == 5
    assert [json.loads(line)["status"] for line in lines] == [415] * 5
    assert {json.loads(line)["path"] for line in lines} == {"/predictions/tiny"}
    assert {json.loads(line)["request_id"] for line in lines} == {"a-1"}, "the gateway's id, which comes in the query"


def test_a_second_server_on_the_same_port_says_so(serving: Serving) -> None:
    port = serving.inference.rpartition(":")[2]
    ran = marina(serving.home, "serve", "--port", port)
    assert ran.code == 6
    assert port in ran.err and "fix: " in ran.err


def test_a_second_server_needs_three_ports_only(serving: Serving) -> None:
    """Where the supervisor's usual port is taken and nobody chose one, it takes another and says so."""
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.socket())
        with contextlib.suppress(OSError):  # taken by something else already: as good
            listener.bind(("127.0.0.1", 8083))
            listener.listen()
        arguments = [str(item) for item in processes.free_ports(3)]
        command = [sys.executable, "-m", "marina", "serve", "--port", arguments[0]]
        command += ["--management-port", arguments[1], "--metrics-port", arguments[2]]
        process = held.enter_context(
            subprocess.Popen(
                command,
                env=environment(serving.home),
                cwd=serving.home,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready ")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "port 8083 is taken" in errors


def test_a_changed_archive_is_not_served(serving: Serving, tmp_path: Path) -> None:
    home = project(tmp_path / "home")
    packed = archive.pack(
        write_artifact(home / "artifacts"), handlers=home / "handlers", destination=home / "model_store"
    )
    store.publish(home / "model_store", packed)
    data = bytearray(packed.path.read_bytes())
    data[len(data) // 2] ^= 1
    packed.path.write_bytes(data)
    ran = marina(home, "serve")
    assert ran.code == 5
    assert "was changed since it was packed" in ran.err


@pytest.mark.timeout(400)
def test_the_demonstration_twice(tmp_path: Path) -> None:
    """The main job of the project on its real data; the second time it reuses what is still valid."""
    home = project(tmp_path / "home")
    first = marina(home, "demo", "--json", timeout=300)
    assert first.code == 0, first.err
    assert first.json["http_accuracy"] == first.json["test_accuracy"] >= 0.985
    assert first.json["images"] >= 350
    again = marina(home, "demo", timeout=120)
    assert again.code == 0, again.err
    assert "accuracy over HTTP" in again.out and "train ·" not in again.err
    mine = [
        process for process in psutil.process_iter(["cmdline"]) if str(home) in " ".join(process.info["cmdline"] or [])
    ]
    assert mine == []
