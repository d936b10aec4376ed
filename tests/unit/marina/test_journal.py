"""The journal of rollouts: what is unfinished, whatever a killed writer left, and what a starting server makes of it."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from marina import journal, serving, store
from marina.archive import Archive, sha256_of
from marina.errors import StoreError
from marina.journal import JOURNAL_FILE, Journal
from marina.serving import ModelServing, Serving

OLD = ModelServing(default="1.0", versions={"1.0": 1})
NEW = ModelServing(default="2.0", versions={"1.0": 1, "2.0": 2})


def _begin(folder: Path, **changes: Any) -> Journal:
    values: dict[str, Any] = {
        "before": OLD.model_dump(mode="json"), "after": NEW.model_dump(mode="json"), "published": "m-2.0.mar", **changes
    }  # fmt: skip
    found = Journal(folder)
    found.begin("deploy", "m", **values)
    return found


def test_what_has_begun_is_unfinished_until_it_ends(tmp_path: Path) -> None:
    assert Journal(tmp_path).unfinished() is None
    writer = _begin(tmp_path)
    writer.start("load m:2.0", "local")
    begun = Journal(tmp_path).unfinished()
    assert begun is not None and not begun.committed
    assert begun.words == "deploy of m (at: load m:2.0 local)"
    assert (begun.before, begun.after) == (OLD.model_dump(mode="json"), NEW.model_dump(mode="json"))
    writer.commit()
    begun = Journal(tmp_path).unfinished()
    assert begun is not None and begun.committed
    writer.end("done")
    assert Journal(tmp_path).unfinished() is None


def test_steps_outside_a_rollout_are_not_written(tmp_path: Path) -> None:
    Journal(tmp_path).start("look", "")
    assert not (tmp_path / JOURNAL_FILE).exists()


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_torn_last_line_counts_as_never_written(tmp_path: Path, cut: int) -> None:
    writer = _begin(tmp_path)
    writer.commit()
    path = tmp_path / JOURNAL_FILE
    path.write_bytes(path.read_bytes()[:-cut])
    begun = Journal(tmp_path).unfinished()
    assert begun is not None and not begun.committed
    writer.end("reverted")
    assert Journal(tmp_path).unfinished() is None
    assert all(json.loads(line) for line in path.read_text().splitlines()), "the torn line is gone"


def test_a_damaged_journal_is_named_with_its_line(tmp_path: Path) -> None:
    _begin(tmp_path).end("done")
    path = tmp_path / JOURNAL_FILE
    path.write_text(path.read_text().replace('"event": "end"', '"event" "end"'))
    with pytest.raises(StoreError, match=r"rollouts\.jsonl is damaged in line 2"):
        Journal(tmp_path).unfinished()


@pytest.mark.parametrize("room", [0, 20], ids=["none", "for a part of the line"])
def test_a_line_that_finds_no_room_is_an_error_and_leaves_the_journal_as_it_was(tmp_path: Path, room: int) -> None:
    writer = _begin(tmp_path)
    path = tmp_path / JOURNAL_FILE
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
    try:
        with pytest.raises(StoreError, match=r"rollouts\.jsonl cannot be written: ") as refused:
            writer.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "make room" in refused.value.remedy
    begun = Journal(tmp_path).unfinished()
    assert begun is not None and not begun.committed
    writer.end("reverted")
    assert Journal(tmp_path).unfinished() is None


def test_a_long_journal_makes_room_and_forgets_nothing_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MOST_BYTES", 2000)
    for _ in range(20):
        _begin(tmp_path).end("done")
    _begin(tmp_path)
    assert (tmp_path / JOURNAL_FILE).stat().st_size < 4000
    assert (tmp_path / journal.OLDER_FILE).exists()
    assert Journal(tmp_path).unfinished() is not None


@pytest.fixture
def killed(tmp_path: Path) -> Journal:
    """A store where a deploy of m 2.0 beside 1.0 was killed after its archive was published; `n` is served as ever."""
    for name, version in (("m", "1.0"), ("m", "2.0"), ("n", "1.0")):
        path = tmp_path / f"{name}-{version}.mar"
        path.write_text(version)
        store.publish(tmp_path, Archive(path, name, version, sha256_of(path), 3))
    serving.write(tmp_path, Serving(models={"m": NEW, "n": OLD}))
    return _begin(tmp_path)


def _at_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str, bool]]:
    monkeypatch.setattr(store, "_read_config", lambda item: {"minWorkers": 1})
    return {(model.name, model.version, model.default) for model in serving.at_start(folder)}


def test_a_server_starts_without_what_was_not_committed(
    killed: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _at_start(tmp_path, monkeypatch) == {("m", "1.0", True), ("n", "1.0", True)}
    assert serving.read(tmp_path) == Serving(models={"m": NEW, "n": OLD}), (
        "nothing is written: the store may be read-only"
    )


def test_a_server_starts_with_what_was_committed(
    killed: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.write(tmp_path, Serving(models={"m": OLD, "n": OLD}))
    killed.commit()
    assert _at_start(tmp_path, monkeypatch) == {("m", "1.0", False), ("m", "2.0", True), ("n", "1.0", True)}


def test_while_a_rollout_is_at_work_the_file_holds(
    killed: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that restarts in the middle of a canary has to come back with both versions."""
    with serving.rollout_lock(tmp_path):
        assert serving.in_progress(tmp_path)
        assert ("m", "2.0", True) in _at_start(tmp_path, monkeypatch)
    assert not serving.in_progress(tmp_path)


def test_a_first_archive_that_was_never_proved_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m-2.0.mar"
    path.write_text("2.0")
    store.publish(tmp_path, Archive(path, "m", "2.0", sha256_of(path), 3))
    _begin(tmp_path, before=None)
    with pytest.raises(StoreError, match=r"the only archive in .* is m-2\.0\.mar, which a rollout left unproved"):
        _at_start(tmp_path, monkeypatch)
