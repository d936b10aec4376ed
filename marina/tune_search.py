"""Which settings give the highest throughput within a latency objective, found with few measurements.

A setting's value is its highest throughput over the number of requests in flight at which the 99th percentile stays
within the objective. As in Triton's Model Analyzer ("quick search", concurrency swept per configuration) three questions
are nested:

- how many requests in flight: Little's law says where the objective lies (latency grows with the number once the server
  is busy), so one measurement points to the next; two or three are enough;
- batch size for a number of workers: throughput first rises with the batch size and then falls, so a climb in both
  directions from the best known size ends soon. Workers and batch size are searched together, because a batch size as
  large as the queue lets one worker take all requests while the others idle: the best size differs with the workers;
- batch delay and archive: after that, at the best settings.

A candidate is dropped as soon as the upper end of its interval is below the lower end of the best one's ("racing": Maron and
Moore, Hoeffding races, NIPS 1993). What is left near the top is measured again, longer and in turn, because the highest of
many noisy values is too high (the optimiser's curse).

Nothing here knows a server: `measure` is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from marina.load_stats import Interval

TIE = 0.02
"""Settings whose throughputs differ by less are equal; the one with fewer workers is taken."""
FINALISTS = 3
ROUNDS = 2
"""Further measurements of each finalist."""
_MOST_PROBES = 6
_STEP = 4.0
"""By how much the number in flight changes at most from one measurement to the next."""
_SATURATED = 1.03
_COARSE = 1.3
_FINE = 1.0
"""Ratio of numbers in flight below which the next one is not tried."""
_REFINED = 5
"""Settings for which the exact number in flight is looked for before the finalists are chosen."""
_ROOM = 0.1
"""Throughput that finding the exact number in flight may still add to a setting."""
_PATIENCE = 2
"""Clearly worse values in a row after which a climb in one direction ends."""


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class Setting:
    """What is varied."""

    archive: str
    """NAME:VERSION."""
    workers: int
    batch_size: int
    delay_ms: int

    @property
    def text(self) -> str:
        """For people."""
        workers = f"{self.workers} worker{'s' * (self.workers != 1)}"
        return f"{self.archive}, {workers}, batch {self.batch_size}, delay {self.delay_ms} ms"


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """The grid. Every list ascends, without doubles."""

    archives: Sequence[str]
    workers: Sequence[int]
    batch_sizes: Sequence[int]
    delays_ms: Sequence[int]
    most_in_flight: int = 256

    @property
    def in_flight(self) -> list[int]:
        """Numbers of requests in flight that are tried: 1 2 3 4 5 6 8 10 12 16 20 24 32 ..."""
        scale = (2**exponent * step // 4 for exponent in range(20) for step in (4, 5, 6))
        return sorted({number for number in scale if 1 <= number <= self.most_in_flight})

    @property
    def size(self) -> int:
        """Settings in it."""
        return len(self.archives) * len(self.workers) * len(self.batch_sizes) * len(self.delays_ms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One measurement of one setting."""

    setting: Setting
    in_flight: int
    """Connections of the closed loop."""
    turn: int
    """0: while searching; 1 and more: again, as a finalist."""
    throughput: Interval
    """Good answers per second."""
    p50_ms: float
    p99_ms: Interval
    failed: int
    seconds: float
    at: float = 0.0
    """Seconds since the search began."""
    cpu_ms: float | None = None
    """The server's, per request."""
    pss_mib: float | None = None
    """The server's whole process tree."""

    def within(self, objective_ms: float) -> bool:
        """Whether it answered everything, in time."""
        return self.failed == 0 and self.p99_ms.value <= objective_ms


Measure = Callable[[Setting, int, int], Probe]
"""(setting, requests in flight, turn) -> what was measured. Raises OutOfTime."""


class OutOfTime(Exception):
    """The budget does not allow another measurement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """What a setting is worth."""

    setting: Setting
    probe: Probe | None
    """The measurement with the highest throughput within the objective; None when there is none."""
    confirmed: Interval | None = None
    """Throughput over all measurements of a finalist."""

    @property
    def throughput(self) -> Interval:
        """Per second; 0 when the objective was never met."""
        if self.confirmed is not None:
            return self.confirmed
        return self.probe.throughput if self.probe is not None else Interval(0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was found."""

    best: Value | None
    """None when no setting met the objective."""
    values: Sequence[Value]
    """Every setting that was measured, best first."""
    probes: Sequence[Probe]
    """In the order measured."""
    complete: bool
    """False when the budget ended before the search did."""


def search(space: Space, start: Setting, measure: Measure, objective_ms: float) -> Outcome:
    """The best setting of `space` as far as `measure` lets us see. `start` is what is served now.

    The search is a pure function of what `measure` answers: with remembered answers it goes on where it was.
    """
    return _Search(space, measure, objective_ms).run(start)


@dataclass(slots=True)
class _Search:
    space: Space
    measure: Measure
    objective_ms: float
    values: dict[Setting, Value] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)

    def run(self, start: Setting) -> Outcome:
        complete = True
        try:
            self._explore(start)
        except OutOfTime:
            complete = False
        try:
            self._confirm()
        except OutOfTime:
            complete = False
        ranked = sorted(self.values.values(), key=lambda value: -value.throughput.value)
        return Outcome(best=self._choose(), values=ranked, probes=tuple(self.probes), complete=complete)

    # ---- exploring

    def _explore(self, start: Setting) -> None:
        for archive in self.space.archives:
            batch = _nearest(self.space.batch_sizes, start.batch_size)
            delay = _nearest(self.space.delays_ms, start.delay_ms)
            worse = 0
            before = 0
            for workers in self.space.workers:
                # A queue shared by more workers gives each a smaller batch.
                batch = _nearest(self.space.batch_sizes, batch * before // workers if before else batch)
                first = Setting(archive=archive, workers=workers, batch_size=batch, delay_ms=delay)
                found = self._climb(first)
                before, batch = workers, found.setting.batch_size
                worse = worse + 1 if self._clearly_worse(found) else 0
                if worse >= _PATIENCE:
                    break
        self._try_delays()
        self._look_around()

    def _climb(self, first: Setting, patience: int = _PATIENCE) -> Value:
        """The best batch size for everything else as in `first`."""
        sizes = list(self.space.batch_sizes)
        middle = sizes.index(first.batch_size)
        best = self._value(first)
        for direction in (1, -1):
            at, worse = middle, 0
            while 0 <= at + direction < len(sizes) and worse < patience:
                at += direction
                found = self._value(dataclasses.replace(first, batch_size=sizes[at]))
                worse = worse + 1 if _is_worse(found, best) else 0
                best = max(best, found, key=lambda value: value.throughput.value)
        return best

    def _try_delays(self) -> None:
        """For every number of workers near the top, upwards until it is clearly worse: waiting pays only where batches
        are too small, and then other batch sizes may be the best ones.
        """
        for first in self._near_top(one_per=lambda setting: (setting.archive, setting.workers)):
            for delay in self.space.delays_ms:
                if delay != first.setting.delay_ms and delay < self.objective_ms:
                    found = self._climb(dataclasses.replace(first.setting, delay_ms=delay), patience=1)
                    if delay > first.setting.delay_ms and _is_worse(found, self._best()):
                        break

    def _look_around(self) -> None:
        """Every setting that is at most one step from the best in each direction, until the best has no better neighbour:
        what one change at a time does not find, two at once may.
        """
        seen: set[Setting] = set()
        while (best := self._best()) is not None and best.setting not in seen:
            seen.add(best.setting)
            for setting in self._neighbours(best.setting):
                self._value(setting)

    def _neighbours(self, setting: Setting) -> list[Setting]:
        """Those that need no other number of workers first: they may be had without loading more."""
        found = [
            Setting(archive=setting.archive, workers=workers, batch_size=batch, delay_ms=delay)
            for workers in _around(self.space.workers, setting.workers)
            for batch in _around(self.space.batch_sizes, setting.batch_size)
            for delay in _around(self.space.delays_ms, setting.delay_ms)
            if delay < self.objective_ms
        ]
        return sorted(found, key=lambda item: (abs(item.workers - setting.workers), item.batch_size, item.delay_ms))

    def _near_top(self, *, one_per: Callable[[Setting], object] = lambda setting: setting) -> list[Value]:
        """The best values that may yet be the best of all: their upper ends reach the top's lower end, with some room."""
        top = self._best()
        found: dict[object, Value] = {}
        for value in sorted(self.values.values(), key=lambda value: -value.throughput.value):
            if value.probe is not None and not _is_worse(value, top, room=_ROOM):
                found.setdefault(one_per(value.setting), value)
        return list(found.values())

    def _value(self, setting: Setting) -> Value:
        """Find about the number in flight that gives the most within the objective."""
        if setting not in self.values:
            top = self._best()
            if top is None or top.probe is None or setting.delay_ms > top.setting.delay_ms:
                start = setting.workers * setting.batch_size  # every batch full: what waiting is for
            else:
                start = top.probe.in_flight
            self._approach(setting, _nearest(self.space.in_flight, start), _COARSE, top)
        return self.values[setting]

    def _approach(self, setting: Setting, in_flight: int, step: float, top: Value | None) -> None:
        """Measure at numbers in flight that close in on the objective, until the next is within `step` of the last."""
        following: int | None = in_flight
        count = 0
        while following is not None and count < _MOST_PROBES:
            probe = self._probe(setting, following, 0)
            count += 1
            if self._hopeless(probe, top):
                break
            following = self._next(setting, probe, step)

    def _next(self, setting: Setting, latest: Probe, step: float) -> int | None:
        """Where the objective lies, going by latency in proportion to the number in flight; None when near enough."""
        known = [item for item in self.probes if item.setting == setting and item.turn == 0]
        fitting = [item for item in known if item.within(self.objective_ms)]
        inside = max((item.in_flight for item in fitting), default=0)
        outside = min((item.in_flight for item in known if item not in fitting), default=self.space.most_in_flight + 1)
        if step >= _COARSE and latest in fitting:
            fewer = max((item.throughput.value for item in fitting if item.in_flight < latest.in_flight), default=0.0)
            if latest.throughput.value < _SATURATED * fewer:
                return None  # more in flight only wait longer
        between = [number for number in self.space.in_flight if max(inside * step, inside + 0.5) <= number < outside]
        if not between:
            return None
        if latest.failed:
            aim = latest.in_flight / 2
        else:
            aim = latest.in_flight * self.objective_ms / max(latest.p99_ms.value, 1e-6)
        aim = min(max(aim, latest.in_flight / _STEP), latest.in_flight * _STEP)
        return max((number for number in between if number <= aim), default=between[0])

    def _hopeless(self, probe: Probe, top: Value | None) -> bool:
        """Whether no number in flight can bring this setting to the top: fewer in flight never give more throughput."""
        if top is None or top.setting == probe.setting:
            return False
        low, high = top.throughput.low, probe.throughput.high
        if low is None or high is None or high >= low:
            return False
        return not probe.within(self.objective_ms) or probe.p99_ms.value > self.objective_ms / 1.5

    # ---- deciding

    def _confirm(self) -> None:
        """Find the exact number in flight for what is near the top, and measure that again, in turn."""
        for value in self._near_top()[:_REFINED]:
            assert value.probe is not None
            following = self._next(value.setting, value.probe, _FINE)
            if following is not None:
                self._approach(value.setting, following, _FINE, None)
        racing = self._near_top()[:FINALISTS]
        for turn in range(1, ROUNDS + 1):
            # There and back: the one that is loaded need not be loaded again.
            for value in racing if turn % 2 else reversed(racing):
                assert value.probe is not None
                again = self._probe(value.setting, value.probe.in_flight, turn)
                if not again.within(self.objective_ms):
                    share = self.objective_ms / again.p99_ms.value if not again.failed else 0.5
                    fewer = int(value.probe.in_flight * min(0.95, share))
                    lower = [number for number in self.space.in_flight if number <= max(1, fewer)]
                    again = self._probe(value.setting, lower[-1], turn)
                self._judge(value, again)
            judged = [self.values[value.setting] for value in racing]
            best = max(judged, key=lambda value: value.throughput.value, default=None)
            racing = [value for value in judged if value.probe is not None and not _is_worse(value, best)]

    def _judge(self, value: Value, again: Probe) -> None:
        """What the later measurements say, which were not picked for being high."""
        later = [
            item
            for item in self.probes
            if item.setting == value.setting and item.turn > 0 and item.within(self.objective_ms)
        ]
        if not later:
            self.values[value.setting] = Value(setting=value.setting, probe=None)
            return
        latest = again if again.within(self.objective_ms) else later[-1]
        self.values[value.setting] = Value(setting=value.setting, probe=latest, confirmed=_mean(later))

    def _choose(self) -> Value | None:
        """The best, or an equal one that costs less memory and waits less."""
        confirmed = [value for value in self.values.values() if value.confirmed is not None]
        of_all = [value for value in (confirmed or self.values.values()) if value.probe is not None]
        if not of_all:
            return None
        most = max(value.throughput.value for value in of_all)
        equal = [value for value in of_all if value.throughput.value >= (1 - TIE) * most]
        return min(
            equal,
            key=lambda value: (value.setting.workers, value.setting.delay_ms, -value.throughput.value),
        )

    def _best(self) -> Value | None:
        found = [value for value in self.values.values() if value.probe is not None]
        return max(found, key=lambda value: value.throughput.value, default=None)

    def _clearly_worse(self, value: Value) -> bool:
        return _is_worse(value, self._best())

    def _probe(self, setting: Setting, in_flight: int, turn: int) -> Probe:
        probe = self.measure(setting, in_flight, turn)
        self.probes.append(probe)
        if turn == 0:
            known = self.values.get(setting, Value(setting=setting, probe=None))
            if probe.within(self.objective_ms) and probe.throughput.value > known.throughput.value:
                known = Value(setting=setting, probe=probe)
            self.values[setting] = known
        return probe


def _is_worse(value: Value, best: Value | None, *, room: float = 0.0) -> bool:
    """Beyond doubt: the intervals do not touch, even if `value` were larger by that share."""
    if best is None or best.setting == value.setting:
        return False
    high, low = value.throughput.high, best.throughput.low
    if high is None or low is None:
        return value.throughput.value * (1 + room) < (1 - 5 * TIE) * best.throughput.value
    return high * (1 + room) < low


def _mean(probes: Sequence[Probe]) -> Interval:
    values = [probe.throughput for probe in probes]
    count = len(values)
    mean = sum(item.value for item in values) / count
    halves = [item.high - item.value for item in values if item.high is not None]
    if not halves:
        return Interval(mean, None, None)
    # Of independent measurements; their own scatter counts where it is larger than what each says about itself.
    half = (sum(item**2 for item in halves) ** 0.5) / len(halves)
    spread = (max(item.value for item in values) - min(item.value for item in values)) / 2
    half = max(half, spread)
    return Interval(mean, max(0.0, mean - half), mean + half)


def _around(values: Sequence[int], middle: int) -> Sequence[int]:
    at = list(values).index(middle)
    return values[max(0, at - 1) : at + 2]


def _nearest(values: Sequence[int], wanted: int) -> int:
    """By ratio; the smaller one of two equally near."""
    return min(values, key=lambda value: (max(value, wanted, 1) / max(min(value, wanted), 1), value))
