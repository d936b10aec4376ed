"""What of the gateway's access log counts for or against a version. Lines of this file's own stand for a gateway's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from marina.canary import Canary, Front, Stages
from marina.gates import Gates


class Lines:
    """An access log whose lines all come at once."""

    def __init__(self, entries: Iterable[dict[str, object]]) -> None:
        self._lines = [json.dumps(entry, separators=(",", ":")) for entry in entries]
        self._lines += [line[: len(line) // 2] for line in self._lines]  # as a log driver cuts a long one off

    def lines(self) -> list[str]:
        found, self._lines = self._lines, []
        return found

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize(
    ("status", "replica", "answers", "errors"),
    [
        pytest.param(200, "10.0.0.1:8080", 4, 0, id="answered"),
        pytest.param(429, "10.0.0.1:8080", 4, 4, id="the version refuses"),
        pytest.param(429, "", 0, 0, id="the gateway refuses"),
        pytest.param(429, "-", 0, 0, id="the gateway refuses, seen as a dash"),
        pytest.param(-1, "", 0, 0, id="the client left"),
        pytest.param(401, "-", 0, 0, id="the gateway asks for a key"),
        pytest.param(414, "-", 0, 0, id="the gateway finds the path too long"),
        pytest.param(404, "10.0.0.1:8080", 4, 0, id="a replica's own word"),
        pytest.param(503, "", 4, 4, id="nobody answers"),
    ],
)
def test_what_counts(tmp_path: Path, status: int, replica: str, answers: int, errors: int) -> None:
    entry = {"model": "m", "version": "", "canary": "2.0", "status": status, "replica": replica}
    log = Lines([{**entry, "total_ms": 5, "request_ms": 0}] * 4)
    front = Front(splits=tmp_path / "splits", open_log=lambda: log)
    with Canary(front, "m", "2.0", gates=Gates(), stages=Stages(seconds=0.01, longest_seconds=0.02)) as running:
        verdict = running.stage(50)[0]
    assert f"{errors} of {answers} requests failed" in verdict.text and verdict.passed == (errors == 0)
