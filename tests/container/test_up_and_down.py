"""What `marina up` refuses, what it says when a server does not come up, and what `marina down` leaves."""

from __future__ import annotations

import json
import shutil
import socket
import zipfile
from pathlib import Path

import pytest
import requests

from marina import archive, compose, store, verify
from marina.errors import ArchiveError, ConfigError, MarinaError, NotReady, PortBusy, ServerError, StoreError
from marina.home import Home
from support import docker, images
from support.artifacts import write_artifact
from support.commands import marina

NOTHING: dict[str, list[str]] = {"containers": [], "networks": [], "volumes": []}


def refusal(home: Home, **extra: str) -> MarinaError:
    """What `marina up` says, which in no case leaves anything on the engine."""
    wanted = docker.environment(**extra)
    with pytest.raises(MarinaError) as refused:
        compose.up(home, "cpu", services=docker.SERVICES, build=False, environment=wanted)
    assert docker.leftovers(wanted["COMPOSE_PROJECT_NAME"]) == NOTHING
    assert "\n" not in str(refused.value)
    assert refused.value.remedy
    return refused.value


@pytest.fixture
def empty(images: None, tmp_path: Path) -> Home:
    """A project folder with nothing in its model store."""
    return docker.project(tmp_path)


@pytest.fixture
def fresh(home: Home, empty: Home) -> Home:
    """A project folder with a model and without secrets."""
    # Only this one: other tests deploy more into the shared store.
    add_to_index(Path(shutil.copy(home.store / "tiny-1.0.mar", empty.store)))
    return empty


def add_to_index(path: Path) -> None:
    """Whoever can write the store can write its index too; the archive's own record must still betray the change."""
    store.publish(path.parent, verify.identify(path, verify.Report(path, archive.sha256_of(path), ())))


def test_an_empty_model_store(empty: Home) -> None:
    error = refusal(empty)
    assert isinstance(error, StoreError)
    assert "no archive in" in str(error)


def test_an_archive_that_was_changed(fresh: Home) -> None:
    with (fresh.store / "tiny-1.0.mar").open("ab") as stream:
        stream.write(b"x")
    error = refusal(fresh)
    assert isinstance(error, StoreError)
    assert "was changed since it was packed" in str(error)


def test_a_port_that_is_taken(fresh: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refusal(fresh, GATEWAY_PORT=str(port))
    assert isinstance(error, PortBusy)
    assert str(port) in str(error)
    assert "GATEWAY_PORT" in error.remedy


def test_a_key_file_that_cannot_be_read(fresh: Home) -> None:
    (fresh.root / "secrets" / "inference.key").mkdir(parents=True)
    error = refusal(fresh)
    assert isinstance(error, ConfigError)
    assert "inference.key" in str(error)


def test_a_key_that_the_gateway_does_not_know(fresh: Home) -> None:
    (fresh.root / "secrets").mkdir()
    (fresh.root / "secrets" / "inference.key").write_text("lost\n")
    error = refusal(fresh)
    assert isinstance(error, ConfigError)
    assert "does not know the key" in str(error)


def test_a_grace_period_shorter_than_the_drain(fresh: Home) -> None:
    error = refusal(fresh, STOP_SECONDS="10", DRAIN_SECONDS="30")
    assert isinstance(error, ConfigError)
    assert "STOP_SECONDS" in str(error)


def test_a_value_that_compose_refuses(fresh: Home) -> None:
    error = refusal(fresh, GATEWAY_PORT="eighty")
    assert isinstance(error, ConfigError)


def test_an_image_that_is_not_there(fresh: Home) -> None:
    wanted = docker.environment(TORCHSERVE_IMAGE="marina-test-nowhere")
    try:
        with pytest.raises(ServerError, match="not started"):
            compose.up(fresh, "cpu", services=docker.SERVICES, build=False, environment=wanted)
    finally:
        compose.down(fresh, environment=wanted)


def test_an_archive_with_another_file_than_its_record_says(fresh: Home) -> None:
    path = fresh.store / "tiny-1.0.mar"
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr("added.py", "print('mine')")
    add_to_index(path)
    error = refusal(fresh)
    assert isinstance(error, ArchiveError)
    assert "added.py" in str(error)


def test_a_model_that_answers_otherwise_is_reported_in_the_servers_words_and_down_leaves_nothing(
    deployed: docker.Deployment, empty: Home, handlers: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    artifact = write_artifact(tmp_path_factory.mktemp("artifacts"))
    spec = json.loads((artifact / "model_spec.json").read_text())
    spec["golden"]["samples"][0]["probabilities"] = [0.25, 0.25, 0.5]
    (artifact / "model_spec.json").write_text(json.dumps(spec))
    packed = archive.pack(artifact, handlers=handlers, destination=empty.store)
    store.publish(empty.store, packed)
    wanted = docker.environment()
    try:
        with pytest.raises(NotReady, match="probability of") as refused:
            compose.up(empty, "cpu", services=docker.SERVICES, build=False, environment=wanted)
        assert "tiny" in str(refused.value)
        assert refused.value.remedy
    finally:
        compose.down(empty, environment=wanted)
    assert docker.leftovers(wanted["COMPOSE_PROJECT_NAME"]) == NOTHING


def test_tls_with_a_generated_certificate_and_a_down_that_keeps_the_volumes(
    deployed: docker.Deployment, fresh: Home
) -> None:
    wanted = docker.environment()
    try:
        running = compose.up(fresh, "cpu", services=docker.SERVICES, build=False, tls=True, environment=wanted)
        answer = requests.post(
            f"https://localhost:{wanted['GATEWAY_TLS_PORT']}/predictions/tiny",
            data=images.photo(0),
            headers={"Authorization": f"Bearer {running.key_file.read_text().strip()}"},
            verify=str(fresh.root / "secrets" / "gateway" / "tls.crt"),
            timeout=20,
        )
        assert answer.status_code == 200
        compose.down(fresh, keep_data=True, environment=wanted)
        left = docker.leftovers(wanted["COMPOSE_PROJECT_NAME"])
        assert left["containers"] == left["networks"] == []
        assert len(left["volumes"]) == 2
    finally:
        ran = marina(fresh.root, "down", **docker.settings(wanted))
    assert ran.code == 0, ran.err
    assert docker.leftovers(wanted["COMPOSE_PROJECT_NAME"]) == NOTHING
