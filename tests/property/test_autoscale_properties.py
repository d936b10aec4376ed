"""What holds for the autoscaler's rule whatever it sees, and how it does in simulated hours of load."""

from __future__ import annotations

import itertools
import math
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from marina import autoscale
from marina.autoscale import Autoscale, Observation, State
from support.simulated_load import Moment, Simulated

QUICK = (Phase.explicit, Phase.reuse, Phase.generate)
"""An hour takes a second: what fails is shown as it is, not made smaller."""
POLICY = Autoscale(min=1, max=20)
POLICIES = st.builds(
    lambda low, span, **rest: Autoscale(min=low, max=max(1, low + span), **rest),
    st.integers(0, 8), st.integers(0, 40), utilisation=st.floats(0.05, 0.9), queue_ms=st.floats(1, 1e4),
    down_seconds=st.floats(0, 600), idle_seconds=st.floats(1, 600),
)  # fmt: skip
SEEN: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    workers=st.integers(0, 60), missing=st.integers(0, 3), utilisation=st.none() | st.floats(0, 1),
    wait=st.none() | st.floats(0, 1e3), clears_in=st.floats(0, 100) | st.just(math.inf), pending=st.integers(0, 1000),
    busy=st.booleans(), room=st.none() | st.integers(0, 5), may_sleep=st.booleans(), after=st.floats(0, 400),
)  # fmt: skip


@given(policy=POLICIES, seen=st.lists(SEEN, min_size=1, max_size=20), obeyed=st.booleans())
def test_every_decision_is_within_bounds_and_memory(
    policy: Autoscale, seen: list[dict[str, Any]], obeyed: bool
) -> None:
    """Also when somebody else sets other numbers in between, and when decisions are not carried out."""
    state, at, last = State(), 0.0, None
    for values in seen:
        at += values.pop("after")
        workers = last if obeyed and last is not None else values["workers"]
        ready = max(0, workers - values.pop("missing"))
        look = Observation(at=at, ready=ready, **{**values, "workers": workers})
        state, found = autoscale.decide(policy, state, look)
        last = found.workers
        if found.action == "hold":
            assert found.workers == workers
        elif found.action == "sleep":
            assert found.workers == 0 and policy.min == 0 and look.may_sleep and not look.pending and not look.busy
        elif found.action == "down":
            assert policy.awake <= found.workers < workers
        else:
            assert workers < found.workers <= policy.max
            assert look.room is None or found.workers <= workers + look.room
            if found.action == "up" and workers >= policy.awake:
                assert found.workers <= max(2 * workers, workers + autoscale.LEAST_STEP)


@given(workers=st.integers(1, 100), metric=st.floats(0, 100), target=st.floats(0.01, 100))
def test_the_number_that_is_wanted_meets_the_target(workers: int, metric: float, target: float) -> None:
    found = autoscale.wanted(workers, metric, target)
    if abs(metric / target - 1) <= autoscale.TOLERANCE:
        assert found == workers
    else:
        assert found * target >= workers * metric - 1e-6 * target
        assert found == 0 or (found - 1) * target < workers * metric + 1e-6 * target


@settings(max_examples=8, phases=QUICK)
@given(
    seed=st.integers(0, 2**32),
    period=st.sampled_from([300.0, 600.0, 1200.0, 3600.0]),
    mean=st.floats(10, 60),
    swing=st.floats(0, 0.95),
    noise=st.floats(0, 0.15),
)
def test_an_hour_of_sine_load_causes_no_oscillation(
    seed: int, period: float, mean: float, swing: float, noise: float
) -> None:
    """No step down follows a step up within the window, and the number turns as often as the load, not more."""

    def rate(at: float) -> float:
        return mean * (1 + swing * math.sin(2 * math.pi * at / period)) * (1 + noise * math.sin(at))

    moments = Simulated(POLICY, rate, workers=3, seed=seed).run(3600)
    steps = _steps(moments)
    turns = [(at, later) for (at, way), (later, other) in itertools.pairwise(steps) if (way > 0) != (other > 0)]
    assert len(turns) <= 2 * 3600 / period + 4, steps
    ups = [at for at, way in steps if way > 0]
    for at, way in steps:
        assert way > 0 or not [up for up in ups if at - POLICY.down_seconds < up < at], (at, steps)
    settled = [moment for moment in moments if moment.at > 60]
    late = sum(moment.wait > 1.0 for moment in settled) / len(settled)
    assert late < 0.02, f"{late:.1%} of the time a request waited for more than a second"


@settings(max_examples=10, phases=QUICK)
@given(seed=st.integers(0, 2**32), before=st.floats(1, 6), loading=st.floats(0.5, 4))
def test_ten_times_the_load_is_mastered_within_30_seconds(seed: int, before: float, loading: float) -> None:
    load = Simulated(
        Autoscale(min=1, max=16), lambda at: before if at < 120 else 10 * before, seed=seed, loading=loading
    )
    moments = load.run(240)
    after = [moment for moment in moments if moment.at >= 150]
    assert all(moment.wait <= 0.5 for moment in after), max(moment.wait for moment in after)
    assert sum(moment.wait <= 0.1 for moment in after) >= 0.95 * len(after)


@settings(max_examples=5, phases=QUICK)
@given(seed=st.integers(0, 2**32))
def test_what_there_is_memory_for_is_never_exceeded(seed: int) -> None:
    moments = Simulated(Autoscale(min=1, max=16), lambda _: 80.0, seed=seed, room=5).run(60)
    assert max(moment.workers for moment in moments) == 5


@settings(max_examples=5, phases=QUICK)
@given(seed=st.integers(0, 2**32))
def test_without_load_it_sleeps_and_wakes_for_the_first_request(seed: int) -> None:
    load = Simulated(Autoscale(min=0, max=4, idle_seconds=30), lambda at: 0.0 if 50 < at < 200 else 5.0, seed=seed)
    moments = load.run(300)
    assert {moment.workers for moment in moments if 90 < moment.at < 199} == {0}
    assert all(moment.workers >= 1 for moment in moments if moment.at > 204)
    assert moments[-1].wait <= 0.1


def _steps(moments: list[Moment]) -> list[tuple[float, int]]:
    """(when, by how much) of every change."""
    return [
        (after.at, after.workers - before.workers)
        for before, after in itertools.pairwise(moments)
        if after.workers != before.workers
    ]
