from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from marina import store
from marina.archive import Archive
from marina.errors import ArchiveError, StoreError


@pytest.fixture
def filled(packed: Archive, tmp_path: Path) -> Path:
    """Three versions of one name and one of another; the files are copies of one archive."""
    for name, version in (("tiny", "1.9"), ("tiny", "1.10"), ("tiny", "1.2"), ("other", "3")):
        path = tmp_path / f"{name}-{version}.mar"
        shutil.copyfile(packed.path, path)
        store.publish(tmp_path, dataclasses.replace(packed, path=path, name=name, version=version))
    return tmp_path


def keys(found: list[Archive]) -> list[str]:
    return [item.key for item in found]


def test_versions_are_ordered_as_numbers(filled: Path) -> None:
    assert keys(store.archives(filled)) == ["other:3", "tiny:1.2", "tiny:1.9", "tiny:1.10"]


def test_selection(filled: Path) -> None:
    assert keys(store.select(filled, [])) == ["other:3", "tiny:1.10"]
    assert keys(store.select(filled, ["tiny"])) == ["tiny:1.10"]
    assert keys(store.select(filled, ["tiny:1.2", "tiny", "tiny"])) == ["tiny:1.2", "tiny:1.10"]
    with pytest.raises(StoreError, match=r"model 'tina' is not in .*there are: other:3, tiny:1.2"):
        store.select(filled, ["tina"])


def test_the_newest_version_is_the_default(filled: Path) -> None:
    served = store.to_serve(store.archives(filled))
    assert [(model.name, model.version) for model in served if model.default] == [("other", "3"), ("tiny", "1.10")]


def test_empty_store_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no archive in") as caught:
        store.select(tmp_path, [])
    assert "marina pack" in caught.value.remedy


def test_changed_unknown_and_damaged(filled: Path) -> None:
    (item,) = store.select(filled, ["other"])
    assert store.to_serve([item])[0].config["batchSize"] == 32
    with item.path.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(StoreError, match="was changed since it was packed"):
        store.to_serve([item])
    shutil.copyfile(item.path, filled / "stranger-1.0.mar")
    with pytest.raises(StoreError, match=r"stranger-1\.0\.mar is not in index\.json"):
        store.archives(filled)
    (filled / "stranger-1.0.mar").unlink()
    (filled / "index.json").write_text(json.dumps({"archives": {"a": {}}}))
    with pytest.raises(StoreError, match=r"index\.json is damaged"):
        store.archives(filled)


@pytest.mark.parametrize("changes", [{"version": "v1"}, {"version": "1" * 5000}, {"name": "../x"}])
def test_what_would_make_the_index_unreadable_is_not_published(
    filled: Path, packed: Archive, changes: dict[str, str]
) -> None:
    before = (filled / "index.json").read_bytes()
    with pytest.raises(ArchiveError, match="must"):
        store.publish(filled, dataclasses.replace(packed, **changes))
    assert (filled / "index.json").read_bytes() == before


def _publish_many(folder: Path, packed: Archive, first: int) -> None:
    for number in range(first, first + 20):
        path = folder / f"m-{number}.mar"
        path.touch()
        store.publish(folder, dataclasses.replace(packed, path=path, name="m", version=str(number)))


def test_processes_that_publish_at_once_lose_nothing(packed: Archive, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_publish_many, args=(tmp_path, packed, first)) for first in (0, 20, 40)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(store.archives(tmp_path)) == 60
