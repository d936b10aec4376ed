"""The figures of the load generator: buckets, percentiles, intervals, steadiness."""

from __future__ import annotations

import math
import random

import pytest

from marina import load_stats
from marina.load_engine import bucket, bucket_value
from marina.load_stats import order_statistics, percentile_ms, steady, student_t


def test_a_bucket_is_at_most_a_thousandth_wide() -> None:
    values = [0, 1, 999, 2047, 2048, 2049, 10**4, 123_456, 10**6, 59_999_999, 10**9]
    for value in values:
        assert bucket_value(bucket(value)) == pytest.approx(value, rel=1 / 1024, abs=0.5)
    slots = [bucket(value) for value in range(5000)]
    assert slots == sorted(slots)


def test_percentiles_are_those_of_the_sorted_samples() -> None:
    draw = random.Random(0)
    samples = sorted(int(draw.expovariate(1 / 20_000)) for _ in range(5000))
    counts: dict[int, int] = {}
    for sample in samples:
        counts[bucket(sample)] = counts.get(bucket(sample), 0) + 1
    for share in (0.5, 0.9, 0.99, 0.999, 1.0):
        exact = samples[math.ceil(share * len(samples)) - 1] / 1e3
        assert percentile_ms(counts, share) == pytest.approx(exact, rel=1e-3)


def test_the_quantiles_of_t_are_the_tables() -> None:
    table = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 19: 2.093, 30: 2.042, 100: 1.984}
    for freedom, value in table.items():
        assert student_t(freedom) == pytest.approx(value, rel=0.01)


def test_a_percentile_has_an_upper_end_only_where_the_sample_has_one() -> None:
    assert order_statistics(100, 0.5) == (40, 61)  # Le Boudec's table: 40 and 61
    assert order_statistics(100, 0.99)[1] is None
    low, high = order_statistics(10_000, 0.99)
    assert low is not None and high is not None and low < 9900 < high
    assert order_statistics(5, 0.5)[0] is None


def test_intervals_hold_the_true_value_as_often_as_they_say() -> None:
    """Windows of exponential latencies with a known 99th percentile, throughput by Poisson counts."""
    draw = random.Random(1)
    true_p99 = -math.log(0.01) * 10.0
    held_p99 = held_rate = 0
    rounds = 60
    for _ in range(rounds):
        windows = []
        for _ in range(20):
            counts: dict[int, int] = {}
            for _ in range(50):
                slot = bucket(int(draw.expovariate(1 / 10_000)))
                counts[slot] = counts.get(slot, 0) + 1
            windows.append(counts)
        found = load_stats.latency(windows)
        assert found is not None and found.p99.low is not None
        held_p99 += found.p99.low <= true_p99 and (found.p99.high is None or true_p99 <= found.p99.high)
        rate = load_stats.rate([sum(draw.random() < 0.5 for _ in range(60)) for _ in range(40)], [0.25] * 40)
        assert rate.low is not None and rate.high is not None
        held_rate += rate.low <= 120.0 <= rate.high
    assert held_p99 >= 0.9 * rounds
    assert held_rate >= 0.9 * rounds


def test_a_slow_phase_widens_the_interval() -> None:
    """A pause that slows neighbouring requests is one event, however many requests it slows."""
    even = [{1000: 193, 9000: 7} for _ in range(40)]
    together = [{1000: 200} for _ in range(36)] + [{1000: 130, 9000: 70} for _ in range(4)]
    narrow, wide = load_stats.latency(even), load_stats.latency(together)
    assert narrow is not None and wide is not None
    assert wide.p95.high is not None and narrow.p95.high is not None
    assert (narrow.p95.value, wide.p95.value) == (1.0, 1.0)
    assert wide.p95.high > narrow.p95.high


def test_without_samples_there_is_no_latency() -> None:
    assert load_stats.latency([{}, {}]) is None
    assert load_stats.rate([], []).value == 0


class TestSteady:
    def test_warming_up_is_not_steady_and_its_end_is(self) -> None:
        rates = [100 + 900 * (1 - math.exp(-index / 8)) for index in range(60)]
        times = [1e3 / rate for rate in rates]
        assert not steady(rates[:12], times[:12])
        assert not steady(rates[:16], times[:16])
        assert steady(rates, times)

    def test_a_few_windows_are_too_few(self) -> None:
        assert not steady([100.0] * 9, [1.0] * 9)
        assert steady([100.0] * 10, [1.0] * 10)

    def test_noise_without_a_trend_is_steady_after_twice_as_long(self) -> None:
        draw = random.Random(2)
        rates = [draw.gauss(100, 12) for _ in range(20)]
        assert not steady(rates[:10], rates[:10])
        assert steady(rates, rates)

    def test_noise_on_a_trend_is_not(self) -> None:
        draw = random.Random(3)
        rates = [draw.gauss(100 + 5 * index, 8) for index in range(20)]
        assert not steady(rates, rates)

    def test_no_answers_are_never_steady(self) -> None:
        assert not steady([0.0] * 40, [0.0] * 40)
