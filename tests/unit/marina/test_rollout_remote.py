"""Reaching the servers: which ones are chosen, and what comes back from inside a container. `docker` is a small script."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from marina import remote
from marina.client import ModelStatus, WorkerStatus
from marina.errors import ArchiveError, ClientError, ConfigError, Unreachable
from marina.replica import LocalReplica

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that notes its arguments, prints what the file `says` holds, and ends with what `ends` holds."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "docker"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {tmp_path}/says\nexit $(cat {tmp_path}/ends)\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    _says(tmp_path, "")
    return tmp_path


def _says(folder: Path, text: str, ends: int = 0) -> None:
    (folder / "says").write_text(text)
    (folder / "ends").write_text(str(ends))


def _local(tmp_path: Path) -> LocalReplica:
    return LocalReplica(store=tmp_path, inference_url=NOBODY, management_url=NOBODY, supervisor_url=NOBODY)


def _find(target: remote.Target, folder: Path) -> list[str]:
    found = remote.find_replicas(target, _local(folder), management_url=NOBODY, project=Path("/srv/marina"))
    return [item.name for item in found]


def test_the_containers_of_this_folder_in_order(docker: Path) -> None:
    _says(docker, "marina_torchserve_2\nmarina_torchserve_1\n")
    assert _find("auto", docker) == ["marina_torchserve_1", "marina_torchserve_2"]
    asked = (docker / "asked").read_text()
    assert "label=com.docker.compose.project.working_dir=/srv/marina" in asked
    assert "label=com.docker.compose.service=torchserve" in asked


def test_several_stacks_of_one_folder_are_told_apart(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPOSE_PROJECT_NAME", "second")
    _says(docker, "second_torchserve_1\n")
    assert _find("auto", docker) == ["second_torchserve_1"]
    assert "label=com.docker.compose.project=second" in (docker / "asked").read_text()


def test_the_store_is_the_one_that_is_mounted(docker: Path) -> None:
    mounts = [
        {"Source": "/srv/x", "Destination": "/tmp"},
        {"Source": "/srv/y/models", "Destination": "/opt/marina/model_store"},
    ]
    _says(docker, json.dumps(mounts))
    assert remote.ContainerReplica("box", docker="docker").store == Path("/srv/y/models")
    _says(docker, "[]")
    with pytest.raises(ClientError, match="box has no model_store mounted"):
        _ = remote.ContainerReplica("box", docker="docker").store


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("auto", "nothing listens at http://127.0.0.1:9, and no torchserve container of /srv/marina is running"),
        ("local", "nothing listens at http://127.0.0.1:9"),
        ("compose", "no torchserve container of /srv/marina is running"),
    ],
)
def test_nothing_to_talk_to_is_one_clear_line(docker: Path, target: remote.Target, reason: str) -> None:
    with pytest.raises(Unreachable) as caught:
        _find(target, docker)
    assert str(caught.value) == reason and caught.value.exit_code == 7
    assert "make up" in caught.value.remedy


def test_an_engine_that_does_not_answer_is_named(docker: Path) -> None:
    (docker / "bin" / "docker").write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
    with pytest.raises(Unreachable, match=r"^docker cannot list the containers: Cannot connect to the Docker daemon$"):
        _find("compose", docker)
    with pytest.raises(Unreachable, match=r"nothing listens at .*, and docker cannot list the containers: Cannot"):
        _find("auto", docker)


def test_no_docker_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert remote.containers(tmp_path) == []


def test_an_action_runs_inside_and_its_answer_comes_back(docker: Path) -> None:
    worker = WorkerStatus(id="9000", pid=7, ready=True, started="now", gpu=True)
    status = ModelStatus(
        name="m", version="1.0", archive="m-1.0.mar", min_workers=1, max_workers=1, batch_size=1, max_batch_delay_ms=1,
        workers=(worker,), pending=0, remaining_capacity=9, default=True,
    )  # fmt: skip
    _says(
        docker, "a warning of some library\n" + json.dumps({"done": "status", "models": [dataclasses.asdict(status)]})
    )
    replica = remote.ContainerReplica("box", docker="docker")
    assert replica.status() == (status,)
    replica.register("m:1.0", 2)
    replica.scale("m:1.0", 3)
    assert (docker / "asked").read_text().splitlines() == [
        "exec -i box marina replica status",
        "exec -i box marina replica register m:1.0 2",
        "exec -i box marina replica scale m:1.0 3",
    ]


def test_an_error_inside_keeps_its_words_remedy_and_exit_code(docker: Path) -> None:
    _says(docker, json.dumps({"error": "golden/0.png: wrong", "exit_code": 5, "remedy": "pack it again"}), ends=5)
    with pytest.raises(ArchiveError, match=r"^box: golden/0\.png: wrong$") as caught:
        remote.ContainerReplica("box", docker="docker").prove("m:1.0")
    assert caught.value.remedy == "pack it again"


def test_a_container_that_is_gone(docker: Path) -> None:
    _says(docker, "Error response from daemon: No such container: box\n", ends=1)
    with pytest.raises(Unreachable, match="box: retire: Error response from daemon: No such container"):
        remote.ContainerReplica("box", docker="docker").retire("m:1.0")


@pytest.mark.parametrize(("action", "arguments"), [("explode", []), ("prove", []), ("scale", ["m:1.0"])])
def test_only_known_actions_run(tmp_path: Path, action: str, arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"no action '{action}'"):
        remote.run_action(_local(tmp_path), action, arguments, "")


@pytest.mark.parametrize(("environment", "seconds"), [("PATH=/bin\nGATEWAY_QUEUE_TIMEOUT_MS=12000\n", 12.0), ("", 5.0)])
def test_the_front_knows_how_long_a_request_may_wait_in_the_gateway(
    docker: Path, environment: str, seconds: float
) -> None:
    mounts = json.dumps([{"Source": "/srv/gateway", "Destination": "/run/secrets/gateway"}])
    program = "#!/bin/sh\ncase \"$*\" in\n'ps '*) echo box ;;\n*Mounts*) echo '{}' ;;\n*) printf '{}' ;;\nesac\n"
    (docker / "bin" / "docker").write_text(program.format(mounts, environment))
    front = remote.find_front(Path("/srv/marina"))
    assert front is not None
    assert (front.splits, front.queue_seconds) == (Path("/srv/gateway/splits"), seconds)
