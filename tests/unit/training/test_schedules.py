"""Each schedule of the learning rate against its formula."""

from __future__ import annotations

import math

import pytest

from training.config import load_recipe
from training.errors import RecipeError
from training.schedules import Position, learning_rate

UPDATES = 100
PER_EPOCH = 10


def rates(schedule: str, *overrides: str, warmup: int = 0) -> list[float]:
    """The rate of each of 100 updates in 10 epochs, with 0.1 as the recipe's."""
    own = (
        f"train.schedule={schedule}",
        "train.learning_rate=0.1",
        "train.epochs=10",
        f"train.warmup={warmup / PER_EPOCH}",
    )
    settings = [*own, *overrides]
    train = load_recipe("digits", settings).train
    positions = [Position(update, UPDATES, update / PER_EPOCH) for update in range(UPDATES)]
    return [learning_rate(train, position, warmup=warmup) for position in positions]


def test_constant_stays() -> None:
    assert set(rates("constant")) == {0.1}


def test_linear_falls_in_a_line_to_nothing() -> None:
    line = rates("linear")
    assert line == pytest.approx([0.1 * (1 - update / 100) for update in range(100)])
    assert rates("linear", warmup=20)[20:] == pytest.approx([0.1 * (1 - update / 80) for update in range(80)])


def test_cosine_falls_to_nothing() -> None:
    cosine = rates("cosine")
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[50] == pytest.approx(0.05)
    assert cosine[-1] == pytest.approx(0.1 * (1 + math.cos(0.99 * math.pi)) / 2)


def test_one_cycle_rises_for_three_tenths_and_falls() -> None:
    cycle = rates("one_cycle")
    assert cycle[0] == pytest.approx(0.1 / 25)
    assert cycle[30] == max(cycle) == pytest.approx(0.1)
    assert cycle[:31] == sorted(cycle[:31])
    assert cycle[30:] == sorted(cycle[30:], reverse=True)
    assert cycle[-1] == pytest.approx(0.1 / 25 / 10_000)


def test_step_falls_by_its_factor_every_so_many_epochs() -> None:
    stairs = rates("step", "train.decay=0.5", "train.decay_epochs=4")
    assert stairs == pytest.approx([0.1] * 40 + [0.05] * 40 + [0.025] * 20)


def test_inverse_time_and_exponential_follow_their_formula_by_epochs() -> None:
    assert rates("inverse_time", "train.decay=2")[25] == pytest.approx(0.1 / (1 + 2 * 2.5))
    assert rates("exponential", "train.decay=0.8")[25] == pytest.approx(0.1 * 0.8**2.5)


def test_plateau_falls_once_the_monitor_has_not_improved_for_longer_than_its_patience() -> None:
    train = load_recipe("digits", ["train.schedule=plateau", "train.learning_rate=0.1", "train.decay_epochs=1"]).train

    def after(*judged: float) -> float:
        return learning_rate(train, Position(0, 1, len(judged), judged))

    assert after() == 0.1
    assert after(0.5, 0.6, 0.6) == 0.1
    assert after(0.5, 0.6, 0.6, 0.6) == pytest.approx(0.01)
    # What comes next has as much patience again.
    assert after(0.5, 0.6, 0.6, 0.6, 0.6) == pytest.approx(0.01)
    assert after(0.5, 0.6, 0.6, 0.6, 0.6, 0.5) == pytest.approx(0.001)
    assert after(0.5, 0.6, 0.6, 0.7, 0.6) == 0.1


@pytest.mark.parametrize(
    "schedule", ["constant", "linear", "step", "inverse_time", "exponential", "cosine", "one_cycle", "plateau"]
)
def test_a_warm_up_rises_in_a_line_to_the_first_rate_of_any_schedule(schedule: str) -> None:
    warm = rates(schedule, warmup=20)
    first = rates(schedule)[0]
    assert warm[:20] == pytest.approx([first * (update + 1) / 21 for update in range(20)])
    assert warm[20] == pytest.approx(first, rel=1e-6)
    assert all(rate <= 0.1 for rate in warm)


@pytest.mark.parametrize("schedule", ["step", "inverse_time", "exponential"])
def test_after_a_warm_up_a_schedule_by_epochs_begins_with_its_first(schedule: str) -> None:
    settings = ("train.decay=0.5", "train.decay_epochs=3")
    assert rates(schedule, *settings, warmup=25)[25:] == pytest.approx(rates(schedule, *settings)[:75])


def test_epochs_of_a_warm_up_do_not_count_for_a_plateau() -> None:
    train = load_recipe("digits", ["train.schedule=plateau", "train.decay_epochs=1", "train.warmup=2"]).train
    judged = [0.9, 0.8, 0.5, 0.4]
    assert learning_rate(train, Position(40, 100, 4.0, judged), warmup=20) == train.learning_rate
    assert learning_rate(train, Position(50, 100, 5.0, [*judged, 0.3]), warmup=20) < train.learning_rate


def test_a_factor_that_would_raise_the_rate_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"a decay of 1.5 would raise the rate"):
        rates("exponential", "train.decay=1.5")
    assert rates("inverse_time", "train.decay=1.5")[10] == pytest.approx(0.1 / 2.5)


def test_a_warm_up_as_long_as_the_training_is_refused() -> None:
    with pytest.raises(RecipeError, match="a warm-up of 10 epochs leaves nothing of 10"):
        rates("cosine", "train.warmup=10")
