"""serving.json: what it accepts, how it is brought in line with a server, and how a supervisor follows it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from marina import serving, store
from marina.archive import Archive, sha256_of
from marina.client import ModelStatus, WorkerStatus
from marina.errors import StoreError
from marina.serving import ModelServing, Previous, Serving

CONFIG = "\n".join(
    f"{key}: 1"
    for key in (
        "minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout", "jobQueueSize",
        "maxRetryTimeoutInSec",
    )
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with two versions that the supervisor can read."""
    for version in ("1.0", "2.0"):
        path = tmp_path / f"m-{version}.mar"
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("model-config.yaml", CONFIG)
        store.publish(tmp_path, Archive(path, "m", version, sha256_of(path), path.stat().st_size))
    return tmp_path


def _seen(version: str, workers: int, *, default: bool = False, name: str = "m") -> ModelStatus:
    worker = WorkerStatus(id="9000", pid=1, ready=True, started="", gpu=False)
    return ModelStatus(
        name=name, version=version, archive="", min_workers=workers, max_workers=workers, batch_size=1,
        max_batch_delay_ms=1, workers=(worker,) * workers, pending=0, remaining_capacity=1, default=default,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "EOF"),
        ("[]", "object"),
        ('{"schema_version": 2, "models": {}}', "schema_version"),
        ('{"models": {"m": {"default": "1.0", "versions": {}}}}', "is not among the versions"),
        ('{"models": {"m": {"default": "1.0", "versions": {"1.0": 0}}}}', "greater than or equal to 1"),
        ('{"models": {"m": {"default": "1.0", "versions": {"1.0": 1.5}}}}', "integer"),
        ('{"models": {"../x": {"default": "1.0", "versions": {"1.0": 1}}}}', "pattern"),
        ('{"models": {"m": {"default": "1.0", "versions": {"1.0": 1}, "workers": 1}}}', "workers"),
        (
            '{"models": {"m": {"default": "1", "versions": {"1": 1}, "previous": {"version": "1", "workers": 1}}}}',
            "is the default itself",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / serving.SERVING_FILE).write_text(text)
    with pytest.raises(StoreError, match=r"serving\.json is damaged") as caught:
        serving.read(tmp_path)
    assert reason in str(caught.value) and "delete it" in caught.value.remedy


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert serving.read(tmp_path) is None
    state = Serving().with_version("m", "1.0", 2).with_version("m", "2.0", 1).with_default("m", "2.0")
    serving.write(tmp_path, state)
    assert serving.read(tmp_path) == state
    assert json.loads((tmp_path / serving.SERVING_FILE).read_text())["models"]["m"] == {
        "default": "2.0",
        "previous": {"version": "1.0", "workers": 2},
        "versions": {"1.0": 2, "2.0": 1},
    }


def test_the_server_wins_over_the_file() -> None:
    known = Serving(
        models={
            "m": ModelServing(default="2.0", versions={"2.0": 1}, previous=Previous(version="1.0", workers=3)),
            "elsewhere": ModelServing(default="1.0", versions={"1.0": 1}),
        }
    )
    found = serving.adopted(known, [_seen("2.0", 2, default=True), _seen("3.0", 1), _seen("4.0", 0)])
    assert found.models["m"] == ModelServing(
        default="2.0", versions={"2.0": 2, "3.0": 1}, previous=Previous(version="1.0", workers=3)
    )
    assert found.models["elsewhere"] == known.models["elsewhere"]
    assert serving.adopted(known, [_seen("1.0", 1, default=True)]).models["m"].previous is None
    assert serving.adopted(None, [_seen("1.0", 1, default=True)]).models["m"].default == "1.0"


def test_a_trial_of_the_tuner_is_never_meant_to_stay() -> None:
    trial = _seen("1.0", 1, default=True, name=f"m{serving.TRIAL_SUFFIX}")
    assert set(serving.adopted(None, [_seen("1.0", 1, default=True), trial]).models) == {"m"}


def test_a_start_takes_default_versions_and_workers_from_the_file(folder: Path) -> None:
    newest = [(item.version, item.default) for item in serving.at_start(folder)]
    assert newest == [(max(item.version for item in store.archives(folder)), True)]
    serving.write(folder, Serving(models={"m": ModelServing(default="1.0", versions={"1.0": 4, "2.0": 1})}))
    models = serving.at_start(folder)
    assert [(item.version, item.default, item.workers) for item in models] == [("1.0", True, 4), ("2.0", False, 1)]
    assert models[0].snapshot()["maxWorkers"] == 4
    (folder / "m-2.0.mar").unlink()
    with pytest.raises(StoreError, match=r"'m:2\.0' is not in"):
        serving.at_start(folder)


def test_a_start_adds_what_was_packed_under_another_name_since(folder: Path, tmp_path: Path) -> None:
    serving.write(folder, Serving(models={"m": ModelServing(default="1.0", versions={"1.0": 1})}))
    (item,) = [item for item in store.archives(folder) if item.version == "1.0"]
    other = Path(shutil.copy(item.path, folder / "n-1.0.mar"))
    store.publish(folder, dataclasses.replace(item, path=other, name="n"))
    assert [(model.name, model.version) for model in serving.at_start(folder)] == [("m", "1.0"), ("n", "1.0")]


def test_a_supervisor_follows_the_file_once_a_rollout_has_written_it(folder: Path) -> None:
    serving.write(folder, Serving(models={"m": ModelServing(default="1.0", versions={"1.0": 1})}))
    started_with = store.to_serve(store.select(folder, ["m:2.0"]))
    following = serving.Following(folder, started_with)
    assert list(following()) == started_with, "what was there before the start does not count"
    serving.write(folder, Serving(models={"m": ModelServing(default="2.0", versions={"1.0": 2, "2.0": 1})}))
    assert [(item.version, item.workers) for item in following()] == [("1.0", 2), ("2.0", 1)]
    (folder / serving.SERVING_FILE).write_text("{")
    assert len(following()) == 2, "a damaged file changes nothing"
    serving.write(folder, Serving(models={"m": ModelServing(default="2.0", versions={"2.0": 1})}))
    assert [item.version for item in following()] == ["2.0"]
    (folder / serving.SERVING_FILE).unlink()
    assert [item.version for item in following()] == ["2.0"]


def _in_the_way(path: Path) -> None:
    """What cannot be read by anybody, whoever runs the tests."""
    path.unlink()
    path.mkdir()


def _refused(path: Path) -> None:
    """Published as it lies there, with a configuration that is none."""
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("model-config.yaml", "minWorkers: many")
    store.publish(path.parent, Archive(path, "m", "2.0", sha256_of(path), path.stat().st_size))


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        pytest.param(serving.SERVING_FILE, _in_the_way, id="what is served"),
        pytest.param(store.INDEX_FILE, _in_the_way, id="index"),
        pytest.param("m-2.0.mar", _in_the_way, id="archive"),
        pytest.param("m-2.0.mar", _refused, id="configuration"),
    ],
)
def test_what_cannot_be_read_during_a_rollout_changes_nothing_until_it_can(
    folder: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    following = serving.Following(folder, store.to_serve(store.select(folder, ["m:1.0"])))
    serving.write(folder, Serving(models={"m": ModelServing(default="2.0", versions={"2.0": 1})}))
    kept = shutil.copytree(folder, folder / "kept")
    spoil(folder / name)
    assert [item.version for item in following()] == ["1.0"]
    if (folder / name).is_dir():
        (folder / name).rmdir()
    for file in (name, store.INDEX_FILE):
        shutil.copy(kept / file, folder / file)
    assert [item.version for item in following()] == ["2.0"]


def test_the_index_can_be_read_by_the_servers_own_user_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0o077)
    try:
        store.forget(folder, "m-1.0.mar")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / store.INDEX_FILE).stat().st_mode) == 0o644
