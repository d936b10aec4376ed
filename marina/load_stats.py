"""From counts to figures: percentiles and rates with 95 % intervals, and whether a server has warmed up.

Samples of one run are not independent: a garbage collection or a noisy neighbour slows many neighbouring requests. So the
intervals are made from batches of consecutive windows, not from single samples:

- throughput: batch means with Student's t (Law, Simulation Modeling and Analysis, chapter 9);
- percentiles: bootstrap over whole batches, percentile method (Künsch, The jackknife and the bootstrap for general
  stationary observations, Annals of Statistics 1989), never narrower than the distribution-free interval of two order
  statistics that independent samples would have (Le Boudec, Performance Evaluation of Computer and Communication Systems,
  theorem 2.1). Where that one has no upper end, because the sample is too small for the percentile, neither has ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from marina.load_engine import bucket_value

Histogram = Mapping[int, int]
CONFIDENCE = 0.95
BATCHES = 20
"""At most so many, each of neighbouring windows: few long batches depend less on each other than many short ones."""
_FEWEST_BATCHES = 6
_RESAMPLES = 400
_SEED = 20260101


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and where its true value lies with 95 % confidence; an end is None where the sample is too small for it."""

    value: float
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, float | None]:
        """As JSON shows it."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds over `count` requests."""

    count: int
    mean_ms: float
    p50: Interval
    p90: Interval
    p95: Interval
    p99: Interval
    p999: Interval
    max_ms: float

    def as_dict(self) -> dict[str, object]:
        """As JSON shows it."""
        names = ("p50", "p90", "p95", "p99", "p999")
        shares = {name: getattr(self, name).as_dict() for name in names}
        return {"count": self.count, "mean_ms": self.mean_ms, **shares, "max_ms": self.max_ms}


PERCENTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


def merged(histograms: Sequence[Histogram]) -> dict[int, int]:
    """The sum."""
    total: dict[int, int] = {}
    for item in histograms:
        for slot, count in item.items():
            total[slot] = total.get(slot, 0) + count
    return total


def percentile_ms(histogram: Histogram, share: float) -> float:
    """The smallest latency in ms that at least `share` of the samples do not exceed; NaN without samples."""
    return _at_rank(histogram, math.ceil(share * sum(histogram.values())))


def latency(
    windows: Sequence[Histogram], *, mean_ms: float | None = None, max_ms: float | None = None
) -> Latency | None:
    """Percentiles of all windows together with their intervals; None without any sample.

    Mean and maximum are given where they are known exactly, and taken from the buckets (to 0.1 %) otherwise.
    """
    total = merged(windows)
    count = sum(total.values())
    if count == 0:
        return None
    values = {slot: bucket_value(slot) / 1e3 for slot in total}
    ends = _bootstrap(_batched(windows))
    p50, p90, p95, p99, p999 = (
        _interval(total, count, share, end) for share, end in zip(PERCENTILES, ends, strict=True)
    )
    mean = sum(values[slot] * number for slot, number in total.items()) / count if mean_ms is None else mean_ms
    return Latency(count, mean, p50, p90, p95, p99, p999, max(values.values()) if max_ms is None else max_ms)


def rate(counts: Sequence[int], seconds: Sequence[float]) -> Interval:
    """Events per second over windows of the given lengths, with the interval of batch means."""
    total = sum(seconds)
    if total <= 0:
        return Interval(0.0, None, None)
    value = sum(counts) / total
    whole = len(counts)
    if whole > 1 and seconds[-1] < 0.5 * seconds[0]:
        whole -= 1  # a rest too short to be a sample; it counts in the value
    means = [sum(counts[a:b]) / sum(seconds[a:b]) for a, b in _groups(whole)]
    if len(means) < 2:
        return Interval(value, None, None)
    half = student_t(len(means) - 1) * stdev(means) / math.sqrt(len(means))
    return Interval(value, max(0.0, value - half), value + half)


def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile: exact for 1 and 2 degrees of freedom, else Cornish-Fisher (Abramowitz & Stegun 26.7.5),
    within 1 % from 3 degrees on.
    """
    p = 0.5 + confidence / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def order_statistics(count: int, share: float, confidence: float = CONFIDENCE) -> tuple[int | None, int | None]:
    """Ranks from 1 between which the percentile lies, whatever the distribution of `count` independent samples.

    By the normal approximation of the binomial distribution; an end is None when the sample has no such rank.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    spread = z * math.sqrt(count * share * (1 - share))
    low, high = math.floor(count * share - spread), math.ceil(count * share + spread) + 1
    return (low if low >= 1 else None), (high if high <= count else None)


def steady(rates: Sequence[float], times: Sequence[float], *, windows: int = 10, within: float = 0.05) -> bool:
    """Whether the latest values of throughput and mean latency, one per window, show no warming up any more.

    Each series is steady when its last `windows` values have a coefficient of variation of at most `within` (Georges,
    Buytaert and Eeckhout, Statistically rigorous Java performance evaluation, OOPSLA 2007). On a machine with noise above
    that it is steady too when, over twice as many values, the later half does not differ significantly from the earlier
    (Welch's test, 95 %): what is left then is noise, which the intervals of the measurement will show.
    """
    return all(_settled(values, windows, within) for values in (rates, times))


def _settled(values: Sequence[float], windows: int, within: float) -> bool:
    latest = values[-windows:]
    if len(latest) < windows or min(latest) <= 0:
        return False
    if stdev(latest) <= within * fmean(latest):
        return True
    early = values[-2 * windows : -windows]
    if len(early) < windows:
        return False
    difference = abs(fmean(latest) - fmean(early))
    error = math.sqrt((stdev(early) ** 2 + stdev(latest) ** 2) / windows)
    return difference <= student_t(windows - 1) * error


def _groups(count: int) -> list[tuple[int, int]]:
    """Neighbouring windows in at most BATCHES groups of equal size, the last one larger."""
    if count == 0:
        return []
    size = max(1, count // BATCHES)
    number = count // size
    return [(index * size, (index + 1) * size if index < number - 1 else count) for index in range(number)]


def _batched(windows: Sequence[Histogram]) -> list[dict[int, int]]:
    return [merged(windows[a:b]) for a, b in _groups(len(windows))]


def _at_rank(histogram: Histogram, rank: int) -> float:
    seen = 0
    for slot in sorted(histogram):
        seen += histogram[slot]
        if seen >= rank:
            return bucket_value(slot) / 1e3
    return math.nan


def _interval(total: Histogram, count: int, share: float, resampled: tuple[float, float] | None) -> Interval:
    value = _at_rank(total, math.ceil(share * count))
    low_rank, high_rank = order_statistics(count, share)
    low = _at_rank(total, low_rank) if low_rank is not None else None
    high = _at_rank(total, high_rank) if high_rank is not None else None
    if resampled is not None:
        low = min(low, resampled[0]) if low is not None else None
        high = max(high, resampled[1]) if high is not None else None
    return Interval(value, low, high)


def _bootstrap(batches: Sequence[Histogram]) -> list[tuple[float, float] | None]:
    """Per percentile the ends of its interval over resampled batches; None with too few batches."""
    filled = [item for item in batches if item]
    if len(filled) < _FEWEST_BATCHES:
        return [None] * len(PERCENTILES)
    import numpy as np

    slots = sorted(set().union(*filled))
    where = {slot: column for column, slot in enumerate(slots)}
    counts = np.zeros((len(filled), len(slots)))
    for row, item in enumerate(filled):
        for slot, number in item.items():
            counts[row, where[slot]] = number
    draws = np.random.default_rng(_SEED).multinomial(len(filled), [1 / len(filled)] * len(filled), size=_RESAMPLES)
    seen = np.cumsum(draws @ counts, axis=1)
    values = np.array([bucket_value(slot) / 1e3 for slot in slots])
    tail = (1 - CONFIDENCE) / 2
    ends: list[tuple[float, float] | None] = []
    for share in PERCENTILES:
        ranks = np.ceil(share * seen[:, -1])
        found = values[(seen < ranks[:, None]).sum(axis=1)]
        low, high = np.quantile(found, [tail, 1 - tail])
        ends.append((float(low), float(high)))
    return ends
