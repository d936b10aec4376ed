from __future__ import annotations

from pathlib import Path

import pytest

from marina import archive
from marina.archive import Archive
from support.artifacts import write_artifact


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def packed(artifact: Path, handlers: Path, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """One real archive; tests that change it work on a copy."""
    return archive.pack(artifact, handlers=handlers, destination=tmp_path_factory.mktemp("store"))
