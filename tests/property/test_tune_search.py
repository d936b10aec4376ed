"""The tuner's choice against an exhaustive search, on simulated servers whose true values are known."""

from __future__ import annotations

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from marina.tune_search import Setting, Space, search
from support.simulated_server import Machine

SPACE = Space(archives=("m:1.0",), workers=(1, 2, 4), batch_sizes=(1, 4, 16), delays_ms=(1, 10), most_in_flight=48)
START = Setting(archive="m:1.0", workers=1, batch_size=16, delay_ms=1)

SLACK = 0.03
"""Three standard deviations of a measured latency."""

machines = st.builds(
    Machine,
    cores=st.sampled_from([1, 2, 4]),
    per_batch=st.floats(0.2, 20.0),
    per_item=st.floats(0.5, 30.0),
    efficiency=st.floats(0.1, 1.0),
    contention=st.floats(0.0, 0.3),
    noise=st.just(0.01),
    requests=st.just(150),
)


def every_setting(space: Space) -> list[Setting]:
    return [
        Setting(archive=archive, workers=workers, batch_size=batch, delay_ms=delay)
        for archive in space.archives
        for workers in space.workers
        for batch in space.batch_sizes
        for delay in space.delays_ms
    ]


@settings(max_examples=12, derandomize=True, phases=[Phase.generate])  # a whole grid per example is too dear to shrink
@given(machine=machines, objective_ms=st.floats(15.0, 400.0))
def test_the_choice_is_within_five_percent_of_an_exhaustive_search(machine: Machine, objective_ms: float) -> None:
    """The exhaustive search is held to an objective that a measurement cannot mistake for missed."""
    surely, perhaps = objective_ms * (1 - SLACK), objective_ms * (1 + SLACK)
    most = max(machine.true_value(item, surely, SPACE.in_flight) for item in every_setting(SPACE))
    outcome = search(SPACE, START, machine.probe, objective_ms)
    chosen = outcome.best.setting if outcome.best is not None else None
    got = machine.true_value(chosen, perhaps, SPACE.in_flight) if chosen is not None else 0.0
    assert outcome.complete
    assert got >= 0.95 * most, (got, most, chosen)
