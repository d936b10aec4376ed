"""What is checked and rendered before java starts."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from marina import java, processes
from marina.errors import ConfigError, MarinaError, NoDevice, ServerError
from marina.server import ServedModel, Server, model_snapshot
from marina.settings import ServeSettings


def served(version: str = "1.0", *, default: bool = True, folder: Path = Path("/store"), **config: Any) -> ServedModel:
    return ServedModel(
        name="m", version=version, archive_file=folder / f"m-{version}.mar", default=default, config=config
    )


def test_the_snapshot_says_everything_torchserve_needs() -> None:
    found = json.loads(model_snapshot([served(minWorkers=2, maxWorkers=4, batchSize=8, maxBatchDelay=3)]))
    assert found["modelCount"] == 1
    assert found["models"]["m"]["1.0"] == {
        "defaultVersion": True,
        "marName": "m-1.0.mar",
        "minWorkers": 2,
        "maxWorkers": 4,
        "batchSize": 8,
        "maxBatchDelay": 3,
        "responseTimeout": 60,
        "startupTimeout": 300,
    }


@pytest.mark.parametrize(("key", "value"), [("maxBatchDelay", 0), ("batchSize", "8"), ("minWorkers", True)])
def test_a_value_that_torchserve_would_ignore(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"m-1\.0\.mar: {key} in model-config\.yaml must be a whole number"):
        model_snapshot([served(**{key: value})])


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([served(), served("2.0")], "2 of the versions 1.0, 2.0 are marked as default"),
        ([served(default=False)], "0 of the versions 1.0 are marked as default"),
        ([served(), served()], "m 1.0 is given twice"),
    ],
)
def test_exactly_one_default_per_name(models: list[ServedModel], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model_snapshot(models)


@pytest.mark.parametrize(
    ("models", "changes", "environment", "kind", "words"),
    [
        ([], {}, {}, ConfigError, "there is nothing to serve"),
        ([served()], {}, {}, ConfigError, "/store/m-1.0.mar does not exist"),
        (
            [served(), served("2.0", default=False, folder=Path("/b"))],
            {},
            {},
            ConfigError,
            "the archives lie in several folders: /b, /store",
        ),
        ([served()], {"config": Path("/none")}, {}, ConfigError, "/none cannot be read"),
    ],
)
def test_refused_before_anything_starts(
    models: list[ServedModel],
    changes: dict[str, Any],
    environment: dict[str, str],
    kind: type[MarinaError],
    words: str,
) -> None:
    server = Server(models, ServeSettings(**changes), environment=environment)
    with pytest.raises(kind, match=words):
        server.start()
    assert not server.alive() and server.folder is None


@pytest.mark.parametrize(
    ("device", "environment", "words"),
    [
        ("gpu", {"PATH": ""}, "nvidia-smi lists none"),
        ("auto", {"PATH": "", "CUDA_VISIBLE_DEVICES": "GPU-8c2f"}, "TorchServe understands numbers only"),
    ],
)
def test_devices_are_checked(tmp_path: Path, device: Any, environment: dict[str, str], words: str) -> None:
    (tmp_path / "m-1.0.mar").touch()
    with pytest.raises(NoDevice, match=words):
        Server([served(folder=tmp_path)], ServeSettings(device=device), environment=environment).start()


def test_a_folder_left_behind_is_swept_and_one_in_use_is_not(tmp_path: Path) -> None:
    short = Path("/tmp")
    dead, lock = processes.private_folder(short)
    alive, other = processes.private_folder(short)
    os.close(lock)  # what the kernel does when the process is killed
    third, another = processes.private_folder(short)
    try:
        assert not dead.exists() and alive.exists()
    finally:
        processes.remove_folder(alive, other)
        processes.remove_folder(third, another)


def test_who_cleans_up_old_files_finds_the_folder_locked() -> None:
    """systemd-tmpfiles looks at the lock of a folder, not at those of the files in it."""
    folder, lock = processes.private_folder(Path("/tmp"))
    cleaner = os.open(folder, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(cleaner)
        processes.remove_folder(folder, lock)


def test_a_temp_folder_with_a_long_path_is_refused(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with pytest.raises(ServerError, match="too long a path for a Unix socket"):
        processes.private_folder(long)
    assert list(long.iterdir()) == []


def test_free_ports_differ() -> None:
    found = processes.free_ports(20, apart_from=[1])
    assert len(set(found)) == 20


def test_the_shipped_files_are_there() -> None:
    assert java.LOG_CONFIG.is_file() and java.METRICS_CONFIG.is_file()
