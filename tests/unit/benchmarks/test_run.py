"""One system that fails does not stop the run, and tuning picks what was best for all loads together."""

import pytest

from benchmarks import run, schedule
from benchmarks.__main__ import YARDSTICK, find_model
from benchmarks.errors import BenchmarkError
from benchmarks.record import Record
from benchmarks.run import Bench
from benchmarks.schedule import PROFILES, Task
from benchmarks.systems import PLAIN, Layout, Place, Setup
from marina.errors import ArchiveError

pytestmark = pytest.mark.unit

MARINA = Setup("marina", "marina")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def bench(tmp_path, said) -> Bench:
    """Of an artifact that does not exist."""
    return Bench(
        place=Place(tmp_path, tmp_path, {PLAIN: tmp_path / "missing"}), profile=PROFILES["quick"], photos=(b"x",),
        photo_folder=tmp_path, grey=0, generator="wrk", fastest=PLAIN, expected={PLAIN: []}, tolerances={PLAIN: 0.01},
        say=said.append,
    )  # fmt: skip


@pytest.fixture
def record(tmp_path) -> Record:
    return Record.start(tmp_path / "cpu.json", {"device": "cpu"})


def test_a_system_that_cannot_start_is_listed_once_and_the_run_goes_on(bench, record, said):
    tasks = [Task("visit", 0, MARINA), Task("visit", 1, MARINA), Task("limit", 0, rung="unknown")]
    run.carry_out(bench, tasks, record)
    assert all(record.done(task.key) for task in tasks)
    assert "model_spec.json" in record.value["unavailable"][MARINA.key]
    assert len([line for line in said if "not measured" in line]) == 2  # the second visit was not tried again
    assert "unknown" in record.value["failed"][tasks[2].key]


def test_what_a_resumed_run_has_done_is_not_done_again(bench, record, said):
    record.finish(Task("visit", 0, MARINA).key)
    run.carry_out(bench, [Task("visit", 0, MARINA)], record)
    assert said == []


def test_figures_are_there_even_when_nothing_could_be_measured(bench, record):
    run.publish(record, complete=False)
    assert record.value["partial"] is True
    assert set(record.value["figures"]) == set(record.value["reasons"])


def test_a_layout_that_is_good_at_one_load_only_does_not_win():
    def visit(*rates):
        return {"rows": [{"requests_per_second": rate} for rate in rates]}

    assert run.score(visit(50, 200, 250)) > run.score(visit(100, 100, 200))
    assert run.score(visit(50, 200, 0)) == 0


def test_a_tuned_layout_holds_for_every_rung_and_others_get_the_default(record):
    record.value["layouts"]["marina/marina"] = {"workers": 1, "threads": 2, "batch": 8}
    assert run.layout_of(Setup("marina", "marina", "openvino-int8"), record, "cpu") == Layout(1, 2, 8)
    cores = run.machine.cores()
    assert run.layout_of(Setup("litserve", "optimised"), record, "cpu") == schedule.default_layout(cores)


def test_a_rung_may_differ_from_itself_by_no_more_than_a_little_of_its_engine_s_tolerance():
    built = {PLAIN: {}, "bf16": {"tolerance": 0.02}, "int8": {"tolerance": 0.3}}
    assert run.tolerances(built) == {PLAIN: 0.01, "bf16": 0.02, "int8": 0.03}


def test_without_its_model_the_comparison_says_how_to_train_it(tmp_path):
    with pytest.raises(BenchmarkError) as caught:
        find_model(tmp_path, YARDSTICK)
    assert f"marina train {YARDSTICK}" in str(caught.value.remedy)
    with pytest.raises(ArchiveError, match="no artifact other"):
        find_model(tmp_path, "other")
