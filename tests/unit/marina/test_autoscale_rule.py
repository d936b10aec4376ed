"""One decision at a time; what holds for all of them: tests/property/test_autoscale_properties.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from marina import autoscale
from marina.autoscale import Autoscale, Decision, Observation, State

POLICY = Autoscale(min=1, max=10, down_seconds=100)


def after(policy: Autoscale, *looks: dict[str, Any], state: State | None = None) -> tuple[State, Decision]:
    """The last decision after looks that are a second apart."""
    state, found = state or State(), None
    for second, values in enumerate(looks):
        given = {"at": float(second), "workers": 2, "wait": 0.0, **values}
        state, found = autoscale.decide(policy, state, Observation(**{"ready": given["workers"], **given}))
    assert found is not None
    return state, found


@pytest.mark.parametrize(
    ("workers", "metric", "target", "wanted"),
    [(50, 0.90, 0.75, 60), (4, 0.77, 0.7, 4), (4, 0.78, 0.7, 5), (4, 0.63, 0.7, 4), (4, 0.5, 0.7, 3), (7, 0.0, 0.7, 0)],
)
def test_kubernetes_formula_with_its_tolerance(workers: int, metric: float, target: float, wanted: int) -> None:
    """The first one is the example of Kubernetes' own documentation."""
    assert autoscale.wanted(workers, metric, target) == wanted


def test_up_at_once_and_by_the_larger_metric() -> None:
    _, found = after(POLICY, {"utilisation": 0.8, "wait": 0.25})
    assert (found.action, found.workers) == ("up", 5)
    assert found.reason == "utilisation 0.80 of 0.70, queue wait 250 of 100 ms"


def test_one_step_adds_as_many_as_there_are_or_four() -> None:
    assert after(POLICY, {"workers": 2, "wait": 9.0})[1].workers == 6
    assert after(Autoscale(min=1, max=99), {"workers": 20, "wait": 9.0})[1].workers == 40


def test_the_next_step_waits_until_the_last_one_is_loaded() -> None:
    _, found = after(POLICY, {"workers": 5, "ready": 3, "utilisation": 1.0})
    assert found.action == "hold" and "2 of 5 workers are not loaded yet" in found.reason


def test_a_queue_that_is_soon_empty_asks_for_nothing() -> None:
    waiting = {"utilisation": 0.7, "wait": 5.0, "pending": 40}
    assert after(POLICY, {**waiting, "clears_in": 3.0})[1].action == "hold"
    assert after(POLICY, {**waiting, "clears_in": 60.0})[1].action == "up"


def test_down_only_after_the_window_and_to_its_highest() -> None:
    quiet = {"workers": 6, "utilisation": 0.1}
    state, found = after(
        POLICY, {"workers": 6, "utilisation": 0.7}, *[quiet] * 50, {**quiet, "utilisation": 0.4}, *[quiet] * 48
    )
    assert found.action == "hold"
    _, found = after(POLICY, {**quiet, "at": 101.0}, state=state)
    assert (found.action, found.workers) == ("down", 4)
    assert found.reason == "utilisation 0.10 of 0.70, queue wait 0 of 100 ms; at most 4 wanted for 100 s"


def test_what_somebody_else_has_set_lasts_for_the_window() -> None:
    state, found = after(POLICY, {"workers": 2, "utilisation": 0.5})
    quiet = {"workers": 8, "utilisation": 0.1}
    state, found = after(POLICY, *[quiet] * 100, state=state)
    assert found.action == "hold"
    assert after(POLICY, {**quiet, "at": 101.0}, state=state)[1] == Decision(
        workers=2, action="down", reason="utilisation 0.10 of 0.70, queue wait 0 of 100 ms; at most 2 wanted for 100 s"
    )


@pytest.mark.parametrize(("workers", "action", "target"), [(12, "down", 10), (1, "up", 3)])
def test_back_into_the_bounds_at_once(workers: int, action: str, target: int) -> None:
    _, found = after(Autoscale(min=3, max=10), {"workers": workers, "utilisation": 0.7})
    assert (found.action, found.workers) == (action, target)


def test_without_knowing_how_busy_workers_are_none_is_taken_away() -> None:
    assert after(POLICY, *[{"workers": 5, "utilisation": None}] * 300)[1].action == "hold"
    assert after(POLICY, {"workers": 5, "utilisation": None, "wait": None})[1].reason == "not enough seen yet"


def test_as_many_as_there_is_memory_for() -> None:
    _, found = after(POLICY, {"utilisation": 1.0, "wait": 9.0, "room": 1})
    assert (found.action, found.workers, found.limit) == ("up", 3, "memory")
    _, found = after(POLICY, {"utilisation": 1.0, "room": 0})
    assert (found.action, found.workers, found.limit) == ("hold", 2, "memory")
    _, found = after(POLICY, {"workers": 10, "utilisation": 1.0})
    assert (found.action, found.workers, found.limit) == ("hold", 10, "max")


def test_sleep_and_the_first_request() -> None:
    policy = Autoscale(min=0, max=4, idle_seconds=10)
    idle = {"workers": 2, "utilisation": 0.0}
    state, found = after(policy, {**idle, "busy": True}, *[idle] * 9)
    assert found.action == "hold"
    state, found = after(policy, {**idle, "at": 10.0}, state=state)
    assert (found.action, found.workers, found.reason) == ("sleep", 0, "no request for 10 s")
    asleep = {"workers": 0, "wait": None}
    assert after(policy, asleep, state=state)[1].action == "hold"
    _, found = after(policy, {**asleep, "pending": 1}, state=state)
    assert (found.action, found.workers, found.reason) == ("wake", 1, "1 request waiting")
    _, found = after(policy, {**asleep, "pending": 1, "room": 0}, state=state)
    assert (found.action, found.limit) == ("hold", "memory")


def test_who_may_not_sleep() -> None:
    idle = [{"workers": 1, "utilisation": 0.0}] * 500
    policy = Autoscale(min=0, max=4, idle_seconds=10, down_seconds=10)
    assert after(policy, *[{**look, "may_sleep": False} for look in idle])[1].workers == 1
    assert after(policy.kept_awake(), *idle)[1].workers == 1
    assert after(policy.kept_awake(), {"workers": 0})[1].action == "wake", "a version that is kept was asleep"


def test_how_long_a_request_waits() -> None:
    assert autoscale.queue_wait([(0.0, 4, 100), (1.0, 6, 110), (2.0, 5, 120)]) == pytest.approx(0.5)
    assert autoscale.queue_wait([(0.0, 4, 100), (5.0, 4, 100)]) == pytest.approx(20.0), "nobody comes, nobody is served"
    assert autoscale.clears_in([(0.0, 9, 0), (1.0, 8, 0), (2.0, 6, 0)]) == pytest.approx(3.0)
    assert autoscale.clears_in([(0.0, 4, 0), (1.0, 6, 0)]) == math.inf
    assert autoscale.clears_in([(0.0, 4, 0), (1.0, 0, 0)]) == 0.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min": 3, "max": 2}, "min 3 is above max 2"),
        ({"min": -1, "max": 2}, "greater than or equal to 0"),
        ({"min": 0, "max": 0}, "greater than or equal to 1"),
        ({"min": 1, "max": 2, "utilisation": 0.95}, "less than or equal to 0.9"),
        ({"min": 1, "max": 2, "up_seconds": 3}, "Extra inputs are not permitted"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Autoscale(**values)
