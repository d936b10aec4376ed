"""A worker that is asked to park keeps the describe request until it is let go; every other one it answers at once."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlerlib import parking


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temp folder of this process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path


def test_only_a_lone_describe_counts() -> None:
    assert parking.is_describe([{}], {"describe": "True"})
    assert not parking.is_describe([{}], {})
    assert not parking.is_describe([{}, {}], {"describe": "True"})


def test_not_asked_it_answers_at_once(folder: Path) -> None:
    (folder / f"park-{os.getpid() + 1}").touch()
    assert json.loads(parking.describe()) == {"parks": True}


def test_asked_it_answers_when_it_is_let_go(folder: Path) -> None:
    asked, parked = folder / f"park-{os.getpid()}", folder / f"parked-{os.getpid()}"
    asked.touch()
    answers: list[bytes] = []
    worker = threading.Thread(target=lambda: answers.append(parking.describe()))
    worker.start()
    deadline = time.monotonic() + 5
    while not parked.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert not asked.exists() and not answers
    parked.unlink()
    worker.join(5)
    assert [json.loads(answer) for answer in answers] == [{"parks": True}]
