"""What a new version must keep to while it takes over: errors, latency, and agreement with the old version."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from marina.errors import ArchiveError

Name = Literal["error rate", "p99", "agreement"]
_ONE_SIDED_95 = 1.645
_DOUBT = 0.001
"""Chance that a sound version fails the p99 gate at one stage, when its answers are independent. A rollout judges at up
to five stages, and answers that share one pause are slow together, so the usual 5 % would stop many a sound version."""


class GateFailed(ArchiveError):
    """A new version kept not to a gate; the message says which one and by how much."""


class Gates(BaseModel):
    """The limits. Rates and shares are between 0 and 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_error_rate: float = Field(default=0.01, ge=0, le=1)
    """Share of the new version's requests that may fail, when the old version's own share is not larger."""
    max_p99_ratio: float = Field(default=2.0, ge=1)
    """The new version's p99 latency over the old one's."""
    p99_slack_ms: float = Field(default=10.0, ge=0)
    """A p99 that is larger by no more than this passes at any ratio."""
    min_agreement: float = Field(default=0.8, ge=0, le=1)
    """Share of the same inputs to which both versions give the same first label (labels, values: `marina.shadow.alike`)."""
    min_compared: int = Field(default=20, ge=1)
    """Inputs below which agreement is told and not judged: a handful says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """What one version did with its share of the requests."""

    answers: int
    """All of them, failed ones too."""
    errors: int
    latencies_ms: tuple[float, ...]
    """Of those that were answered."""

    @property
    def error_rate(self) -> float:
        """0 without answers."""
        return self.errors / self.answers if self.answers else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One gate at one stage."""

    stage: str
    """`shadow`, or `canary 5 %`."""
    gate: Name
    passed: bool
    measured: float
    limit: float
    text: str
    """With the figures, for people."""


def judge(
    gates: Gates, stage: str, old: Arm, new: Arm, agreement: tuple[int, int] | None = None
) -> tuple[Verdict, ...]:
    """Every gate that can be judged from these figures. `agreement` is (inputs answered alike, inputs compared)."""
    found = [_errors(gates, stage, old, new)]
    if old.latencies_ms and new.latencies_ms:
        found.append(_p99(gates, stage, old.latencies_ms, new.latencies_ms))
    if agreement is not None:
        found.append(_agreement(gates, stage, *agreement))
    return tuple(found)


def require(name: str, version: str, verdicts: Sequence[Verdict]) -> None:
    """Raises GateFailed for the first verdict that is not passed."""
    for verdict in verdicts:
        if not verdict.passed:
            raise GateFailed(
                f"{name} {version} failed the gate '{verdict.gate}' at {verdict.stage}: {verdict.text}",
                remedy="look at the new version; where the difference is meant, set the gate: see marina deploy --help",
            )


def _errors(gates: Gates, stage: str, old: Arm, new: Arm) -> Verdict:
    limit = max(gates.max_error_rate, old.error_rate)
    return Verdict(
        stage=stage,
        gate="error rate",
        passed=new.error_rate <= limit,
        measured=new.error_rate,
        limit=limit,
        text=f"{new.errors} of {new.answers} requests failed ({new.error_rate:.2%}), at most {limit:.2%} may; "
        f"the old version: {old.errors} of {old.answers}",
    )


def _p99(gates: Gates, stage: str, old: Sequence[float], new: Sequence[float]) -> Verdict:
    """Fails only beyond doubt: when a version whose p99 is the limit would show so many answers above it less than once
    in a thousand times, so that a few slow ones among a few do not stop a rollout."""
    limit = max(gates.max_p99_ratio * upper_bound(old, 0.99), p99(old) + gates.p99_slack_ms)
    slow = sum(value > limit for value in new)
    measured, before = p99(new), p99(old)
    ratio = measured / before if before else math.inf
    return Verdict(
        stage=stage,
        gate="p99",
        passed=chance_of(slow, len(new), 0.01) >= _DOUBT,
        measured=measured,
        limit=limit,
        text=f"p99 {measured:.1f} ms of {len(new)} answers, the old version's {before:.1f} ms of {len(old)}: "
        f"{ratio:.2f} times, at most {gates.max_p99_ratio:g} times (+{gates.p99_slack_ms:g} ms) may be; "
        f"{slow} beyond {limit:.1f} ms",
    )


def _agreement(gates: Gates, stage: str, alike: int, compared: int) -> Verdict:
    share = alike / compared if compared else 1.0
    judged = compared >= gates.min_compared
    few = "" if judged else f"; not judged below {gates.min_compared}"
    return Verdict(
        stage=stage,
        gate="agreement",
        passed=not judged or share >= gates.min_agreement,
        measured=share,
        limit=gates.min_agreement,
        text=f"{alike} of {compared} inputs got the old version's answer ({share:.1%}), at least "
        f"{gates.min_agreement:.1%} must{few}",
    )


def p99(latencies: Sequence[float]) -> float:
    """The 99th percentile by nearest rank."""
    return _ranked(latencies, math.ceil(0.99 * len(latencies)))


def upper_bound(values: Sequence[float], quantile: float) -> float:
    """A 95 % one-sided upper confidence bound of a quantile: an order statistic, by the binomial's normal approximation
    (Conover, Practical Nonparametric Statistics, 3.2)."""
    count = len(values)
    spread = _ONE_SIDED_95 * math.sqrt(count * quantile * (1 - quantile))
    return _ranked(values, math.ceil(quantile * count + spread))


def chance_of(hits: int, count: int, share: float) -> float:
    """The chance of at least so many hits among `count` independent draws when each hits with probability `share`: the
    exact upper tail of the binomial distribution (Clopper and Pearson, Biometrika 26, 1934)."""

    def chance(number: int) -> float:
        ways = math.lgamma(count + 1) - math.lgamma(number + 1) - math.lgamma(count - number + 1)
        return math.exp(ways + number * math.log(share) + (count - number) * math.log1p(-share))

    if hits <= count * share:  # the longer tail: by its complement
        return 1.0 - math.fsum(chance(number) for number in range(hits))
    total = 0.0
    for number in range(hits, count + 1):
        added = chance(number)
        total += added
        if added < total * 1e-12:  # beyond the mean the terms only fall
            break
    return total


def _ranked(values: Sequence[float], rank: int) -> float:
    """The value of a rank from 1, kept within the sample."""
    return sorted(values)[min(max(rank, 1), len(values)) - 1]
