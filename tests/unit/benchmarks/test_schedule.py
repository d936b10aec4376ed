"""Every contender gets the same, in an order that no drift can favour."""

from collections import Counter

import pytest

from benchmarks import schedule
from benchmarks.schedule import PROFILES
from benchmarks.systems import PEERS, TITLES, Layout

pytestmark = pytest.mark.unit

RUNGS = ("plain", "openvino-bf16", "openvino-int8")


def plan(profile="standard", systems=tuple(TITLES), cores=2):
    return schedule.plan(PROFILES[profile], RUNGS, RUNGS[-1], systems, cores)


def test_every_contender_has_the_same_tuning_budget():
    sweeps = Counter(task.setup.system for task in plan() if task.kind == "sweep")
    assert set(sweeps) == {"marina", *PEERS}
    assert len(set(sweeps.values())) == 1
    tried = {
        system: {task.layout for task in plan() if task.kind == "sweep" and task.setup.system == system}
        for system in sweeps
    }
    assert all(layouts == set(schedule.layouts(2)) for layouts in tried.values())


def test_the_tuning_comes_before_everything_that_uses_it():
    kinds = [task.kind for task in plan()]
    assert max(i for i, kind in enumerate(kinds) if kind == "sweep") < kinds.index("visit")


def test_each_round_begins_at_another_system():
    first = {}
    for task in plan():
        if task.kind in ("visit", "limit"):
            first.setdefault(task.round, task.key.rpartition("|")[0])
    assert len(first) == 3
    assert len(set(first.values())) == 3


def test_the_limit_of_a_rung_is_measured_right_before_its_server():
    tasks = plan()
    for number, task in enumerate(tasks):
        if task.kind == "limit":
            following = tasks[number + 1]
            # A round that was moved on may begin with the server and end with the limit.
            assert following.kind != "visit" or following.setup.rung == task.rung or following.round != task.round


def test_keys_are_distinct_so_that_a_run_can_be_resumed():
    keys = [task.key for task in plan()]
    assert len(set(keys)) == len(keys)


def test_a_standard_run_fits_into_45_minutes_and_a_quick_one_into_7():
    for profile, minutes in (("standard", 45), ("quick", 7)):
        seconds = sum(schedule.seconds_of(task, PROFILES[profile]) for task in plan(profile))
        assert seconds <= minutes * 60


def test_a_part_of_the_systems_is_a_part_of_the_plan():
    some = plan(systems=("litserve",))
    assert {task.setup.system for task in some if task.setup} == {"litserve"}
    assert {task.key for task in some} <= {task.key for task in plan()}


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_layouts_use_every_core_once(cores):
    assert all(layout.workers * layout.threads == cores for layout in schedule.layouts(cores))
    assert schedule.default_layout(cores) in {Layout(cores, 1, batch) for batch in (4, 8, 16)}


def test_rotating_keeps_everything():
    assert schedule.rotated("abcd", 1) == ["b", "c", "d", "a"]
    assert schedule.rotated("abcd", 6) == ["c", "d", "a", "b"]
    assert schedule.rotated("", 3) == []
