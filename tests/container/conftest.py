"""One running stack for all tests of the tier: two replicas of a tiny model, behind the gateway, watched by Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from marina import archive, store
from marina.engine import Engine
from marina.home import Home
from support import docker
from support.artifacts import write_artifact

HERE = Path(__file__).parent
TIMEOUT_S = 900
"""The first test waits for the image, which takes minutes on a machine that has no layer of it yet."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The engine, or a skip with the reason."""
    return docker.require_engine()


@pytest.fixture(scope="session")
def images(engine: Engine) -> None:
    """The proxies from Debian's packages."""
    docker.build(docker.HAPROXY_IMAGE, docker.ROOT / "deploy" / "debian-images" / "haproxy")
    docker.build(docker.PROMETHEUS_IMAGE, docker.ROOT / "deploy" / "debian-images" / "prometheus")


@pytest.fixture(scope="session")
def home(images: None, handlers: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A project folder whose model store holds the model `tiny` 1.0."""
    found = docker.project(tmp_path_factory.mktemp("project"))
    publish(found.store, handlers, tmp_path_factory.mktemp("artifacts"))
    return found


@pytest.fixture(scope="session")
def deployed(home: Home) -> Iterator[docker.Deployment]:
    """The running stack; a test that changes it puts it back to two ready replicas."""
    with docker.deployment(home, replicas=2, build=True) as running:
        yield running


@pytest.fixture
def two_ready(deployed: docker.Deployment) -> Iterator[docker.Deployment]:
    """The stack for a test that takes replicas away: all of them back again in the end."""
    deployed.wait_ready(2)
    yield deployed
    for item in deployed.replicas():
        if not item.running:
            docker.docker("start", item.id)
    deployed.wait_ready(2)


def publish(model_store: Path, handlers: Path, artifacts: Path, *, version: str = "1.0", seed: int = 0) -> Path:
    """Pack one version of the model `tiny` into a model store."""
    artifact = write_artifact(artifacts, version=version, seed=seed)
    packed = archive.pack(artifact, handlers=handlers, destination=model_store)
    store.publish(model_store, packed)
    return packed.path
