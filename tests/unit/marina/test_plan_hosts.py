"""Several hosts of one deploy.toml: each asked at once, sent only what it lacks, and watched in its own time.

Shell scripts stand for the Marina of another host; what they are asked is what is tested.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from marina import plan, plan_cli
from marina.plan import Desired
from marina.screen import Screen


def _desired(folder: Path, programs: Mapping[str, Path]) -> Desired:
    hosts = "".join(f'[hosts.{name}]\nprogram = ["/bin/sh", "{program}"]\n' for name, program in programs.items())
    text = '[models.m]\ndefault = "1.0"\nversions = { "1.0" = { workers = 1, archive = "m-1.0.mar" } }\n'
    return plan.parse(text + hosts, "deploy.toml", folder)


def _program(folder: Path, host: str, answer: Mapping[str, Any], *, first: str = "") -> Path:
    """Answers every command for `host` alike, and lists the commands in a file `asked`."""
    path = folder / f"{host}.sh"
    text = json.dumps({"hosts": {host: answer}, "archive": "/there/incoming/m-1.0.mar"})
    path.write_text(f"{first}\necho \"$1\" >> '{folder}/asked'\ncat > '{folder}'/given-$1\necho '{text}'\n")
    return path


def _each(desired: Desired, command: str) -> dict[str, dict[str, Any]]:
    return plan_cli._each(Screen(as_json=True), desired, command, lambda name, wanted: pytest.fail("it is elsewhere"))


def test_hosts_are_asked_at_once(tmp_path: Path) -> None:
    """Each answers only when the other one has been asked too."""
    waiting = (
        "touch '{here}'; tries=0; until [ -e '{there}' ]; do "
        "sleep 0.05; tries=$((tries + 1)); [ $tries -lt 400 ] || exit 1; done"
    )
    programs = {
        one: _program(tmp_path, one, {"actions": []}, first=waiting.format(here=tmp_path / one, there=tmp_path / other))
        for one, other in (("a", "b"), ("b", "a"))
    }
    assert _each(_desired(tmp_path, programs), "plan") == {"a": {"actions": []}, "b": {"actions": []}}


@pytest.mark.parametrize(
    ("actions", "holds", "asked"),
    [
        pytest.param([], {}, ["plan"], id="nothing differs"),
        pytest.param(["x"], {"m:1.0": "its own"}, ["plan", "apply"], id="held"),
        pytest.param(["x"], {"m:1.0": "other bytes"}, ["plan", "receive", "apply"], id="other bytes"),
        pytest.param(["x"], {}, ["plan", "receive", "apply"], id="lacking"),
    ],
)
def test_an_archive_travels_only_when_it_is_needed(
    tmp_path: Path, actions: list[str], holds: dict[str, str], asked: list[str]
) -> None:
    (tmp_path / "m-1.0.mar").write_bytes(b"packed")
    own = hashlib.sha256(b"packed").hexdigest()
    answer = {"actions": actions, "holds": {key: own if text == "its own" else text for key, text in holds.items()}}
    found = _each(_desired(tmp_path, {"far": _program(tmp_path, "far", answer)}), "apply")
    assert found["far"]["actions"] == actions
    assert (tmp_path / "asked").read_text().split() == asked
    if "receive" in asked:
        assert (tmp_path / "given-receive").read_bytes() == b"packed"
        assert "/there/incoming/m-1.0.mar" in (tmp_path / "given-apply").read_text()


def test_a_missing_archive_is_an_error_of_that_host_unless_it_is_held_there(tmp_path: Path) -> None:
    programs = {
        "far": _program(tmp_path, "far", {"actions": ["x"], "holds": {}}),
        "held": _program(tmp_path, "held", {"actions": ["x"], "holds": {"m:1.0": "whatever"}}),
    }
    found = _each(_desired(tmp_path, programs), "apply")
    assert "m-1.0.mar cannot be read: No such file" in found["far"]["error"]
    assert found["far"]["exit_code"] == 3 and found["far"]["remedy"]
    assert found["held"]["actions"] == ["x"]


def test_a_host_that_hangs_or_fails_delays_no_other() -> None:
    hangs, fails, well = (plan_cli._Watched() for _ in range(3))
    answers = threading.Event()

    def hang() -> dict[str, dict[str, Any]]:
        assert answers.wait(30)
        return {"hangs": {"actions": ["late"]}}

    with ThreadPoolExecutor() as pool:
        assert hangs.look(hang, pool, 0.0) == {}
        for _ in range(3):
            fails.due = 0.0
            assert fails.look(lambda: {"fails": {"error": "no"}}, None, 0.0) == {"error": "no"}
            assert well.look(lambda: {"well": {"actions": ["x"]}}, None, 0.0) == {"actions": ["x"]}
            assert hangs.look(hang, pool, 0.0) == {}, "it is asked once at a time"
        answers.set()
        assert hangs.running is not None and hangs.running.result(30)
        assert hangs.look(hang, pool, 0.0) == {"actions": ["late"]}
    assert fails.look(lambda: {"fails": {"actions": []}}, None, 0.0) == {}, "it is left alone for a while"
    assert (fails.failures, well.failures) == (3, 0)
