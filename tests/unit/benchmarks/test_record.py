"""A run is resumed where it stopped, and never mixed with one that was measured under other conditions."""

import json

import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.record import Record

pytestmark = pytest.mark.unit

IDENTITY = {"boot": "b1", "profile": {"name": "quick"}, "photos": "p1"}


def test_what_was_finished_is_known_after_a_resume(tmp_path):
    path = tmp_path / "results" / "cpu.json"
    record = Record.start(path, IDENTITY)
    record.value["visits"].append({"setup": "marina/marina/plain"})
    record.finish("visit|marina/marina/plain||0")
    again = Record.resume(path, IDENTITY)
    assert again.done("visit|marina/marina/plain||0")
    assert not again.done("visit|marina/marina/plain||1")
    assert again.value["visits"] == [{"setup": "marina/marina/plain"}]


@pytest.mark.parametrize("name", IDENTITY)
def test_another_machine_start_profile_or_payload_is_refused_by_name(tmp_path, name):
    path = tmp_path / "cpu.json"
    Record.start(path, IDENTITY).save()
    with pytest.raises(BenchmarkError, match=f"another {name}"):
        Record.resume(path, IDENTITY | {name: "other"})


@pytest.mark.parametrize("text", [None, "{", ""])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, text):
    path = tmp_path / "cpu.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BenchmarkError, match=r"cpu\.json"):
        Record.resume(path, IDENTITY)


def test_a_save_leaves_nothing_but_the_file(tmp_path):
    path = tmp_path / "cpu.json"
    Record.start(path, IDENTITY).finish("a")
    assert [found.name for found in tmp_path.iterdir()] == ["cpu.json"]
    assert json.loads(path.read_text())["done"] == ["a"]
