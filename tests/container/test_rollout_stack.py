"""Rollouts from the host on two replicas behind the gateway, while clients keep asking: nobody gets a failed answer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from marina import archive, serving
from support import images
from support.artifacts import write_artifact
from support.commands import Ran, marina
from support.docker import Deployment, Load, inspect

TINY = "/predictions/tiny"


@pytest.fixture(scope="module")
def second(handlers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 2.0, outside the model store."""
    artifact = write_artifact(tmp_path_factory.mktemp("artifacts"), version="2.0", seed=1)
    return archive.pack(artifact, handlers=handlers, destination=tmp_path_factory.mktemp("built")).path


def _run(deployed: Deployment, *arguments: str) -> Ran:
    return marina(
        deployed.stack.home.root, *arguments, "--target", "compose", "--json", COMPOSE_PROJECT_NAME=deployed.project
    )


def _served(deployed: Deployment) -> dict[str, dict[str, tuple[bool, int]]]:
    """Replica -> version -> (default, ready workers)."""
    found: dict[str, dict[str, tuple[bool, int]]] = {}
    for model in _run(deployed, "status").json["models"]:
        found.setdefault(model["replica"], {})[model["version"]] = (bool(model["default"]), model["ready_workers"])
    return found


def _versions(load: Load) -> Counter[Any]:
    return Counter(json.loads(body)["version"] for status, body in load.answers if status == 200)


def test_deploy_rollback_and_scale_from_the_host_lose_nothing(two_ready: Deployment, second: Path) -> None:
    names = [item.name for item in two_ready.replicas()]
    with Load(two_ready, TINY, images.photo(0)) as load:
        # The second model is another one altogether: whether it agrees with the first is not what is tested here.
        deploy = _run(two_ready, "deploy", str(second), "--min-agreement", "0", "--max-p99-ratio", "1000")
        assert deploy.code == 0, deploy.err
        assert _served(two_ready) == {name: {"1.0": (False, 1), "2.0": (True, 1)} for name in names}
        load.wait_for(50)
        back = _run(two_ready, "rollback", "tiny")
        assert back.code == 0, back.err
        load.wait_for(50)
        assert _served(two_ready) == {name: {"1.0": (True, 1), "2.0": (False, 1)} for name in names}
        assert _run(two_ready, "retire", "tiny:2.0").code == 0
        assert _served(two_ready) == {name: {"1.0": (True, 1)} for name in names}
        assert _run(two_ready, "scale", "tiny", "2").code == 0
        assert _served(two_ready) == {name: {"1.0": (True, 2)} for name in names}
        assert _run(two_ready, "scale", "tiny", "1").code == 0
        assert _served(two_ready) == {name: {"1.0": (True, 1)} for name in names}
    assert load.failures() == []
    assert set(_versions(load)) == {"1.0", "2.0"}
    held = serving.read(two_ready.stack.home.store)
    assert held is not None and held.models["tiny"].default == "1.0"


def test_a_refused_archive_leaves_the_stack_as_it_was(two_ready: Deployment, second: Path, tmp_path: Path) -> None:
    broken = tmp_path / second.name
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    before = _served(two_ready)
    ran = _run(two_ready, "deploy", str(broken))
    assert ran.code == 5 and "is refused" in ran.json["error"]
    assert _served(two_ready) == before


def test_the_management_interface_stays_inside(two_ready: Deployment) -> None:
    for item in two_ready.replicas():
        assert not inspect(item.id)["NetworkSettings"]["Ports"].get("8081/tcp")
