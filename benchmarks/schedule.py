"""Which measurement comes when: everything in turn, and the turn moved on each round, so that drift hits all alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from benchmarks.systems import PEERS, PLAIN, Layout, Setup

Item = TypeVar("Item")
Kind = Literal["sweep", "limit", "visit", "echo", "text", "growth"]
START_SECONDS = 12.0
"""A server's start, the proof of its answers and its stop, on average; only for telling how long a run will take."""


@dataclass(frozen=True, slots=True)
class Profile:
    """How long everything is looked at."""

    name: str
    contender_rounds: int
    """Of Marina, the limit, and the peers with Marina's model."""
    reference_rounds: int
    """Of the systems as documented and as shipped, which are several times slower: their noise matters less."""
    burst_seconds: float
    reference_seconds: float
    warm_up_seconds: float
    sweep_seconds: float
    """Per burst of a sweep; 0: no sweep, the default layout for all."""
    limit_seconds: float
    growth_seconds: float
    """Per point of the growth curves; 0: none."""


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("standard", 3, 2, 6.0, 5.0, 3.0, 3.0, 6.0, 2.0),
        Profile("quick", 1, 1, 2.0, 2.0, 1.0, 0.0, 3.0, 0.0),
    )
}
CONNECTIONS = (1, 8, 32)


@dataclass(frozen=True, slots=True)
class Task:
    """One measurement. `key` is what a resumed run knows it by."""

    kind: Kind
    round: int
    setup: Setup | None = None
    layout: Layout | None = None
    """Of a sweep; the layout of a visit is what the sweep found."""
    rung: str = ""

    @property
    def key(self) -> str:
        what = self.setup.key if self.setup is not None else self.rung
        return "|".join((self.kind, what, str(self.layout) if self.layout else "", str(self.round)))


def default_layout(cores: int, device: str = "cpu") -> Layout:
    """One worker with one thread per core; on a GPU two workers, so that one decodes while the other computes."""
    return Layout(workers=cores, threads=1, batch=8) if device == "cpu" else Layout(2, max(1, cores // 2), 32)


def layouts(cores: int, device: str = "cpu") -> tuple[Layout, ...]:
    """The tuning budget that every contender gets: the same layouts, for the same time."""
    if device != "cpu":
        return tuple(Layout(workers, max(1, cores // workers), 32) for workers in (1, 2, 4, 8))
    if cores == 1:
        return tuple(Layout(1, 1, batch) for batch in (4, 8, 16))
    return (Layout(1, cores, 8), *(Layout(cores, 1, batch) for batch in (4, 8, 16)))


def setups(rungs: Sequence[str], fastest: str, systems: Sequence[str]) -> tuple[list[Setup], list[Setup]]:
    """Contenders (tuned, most rounds) and references, of the chosen `systems`."""
    contenders = [Setup("marina", "marina", rung) for rung in rungs if "marina" in systems]
    contenders += [Setup(name, "optimised", fastest) for name in PEERS if name in systems]
    references = [Setup("torchserve", form, PLAIN) for form in ("shipped", "one-thread") if "torchserve" in systems]
    references += [Setup(name, "documented", PLAIN) for name in PEERS if name in systems]
    return contenders, references


def plan(
    profile: Profile,
    rungs: Sequence[str],
    fastest: str,
    systems: Sequence[str],
    cores: int,
    *,
    device: str = "cpu",
    text: bool = False,
) -> list[Task]:
    """Every task of a run, in order."""
    contenders, references = setups(rungs, fastest, systems)
    tuned = [setup for setup in contenders if setup.rung == fastest]
    tasks: list[Task] = []
    if profile.sweep_seconds:
        for number, layout in enumerate(layouts(cores, device)):
            tasks += [Task("sweep", number, setup, layout) for setup in rotated(tuned, number)]
    for number in range(max(profile.contender_rounds, profile.reference_rounds)):
        taking_part: list[Task] = []
        if number < profile.contender_rounds:
            for setup in contenders:
                if setup.system == "marina":
                    # The limit directly before the server that is compared with it.
                    taking_part.append(Task("limit", number, rung=setup.rung))
                taking_part.append(Task("visit", number, setup))
        if number < profile.reference_rounds:
            taking_part += [Task("visit", number, setup) for setup in references]
        tasks += rotated(taking_part, number * len(taking_part) // 3)
    if "marina" in systems:
        tasks += [Task("echo", number) for number in range(profile.contender_rounds)]
        tasks += [Task("text", 0)] if text else []
        tasks += [Task("growth", 0)] if profile.growth_seconds else []
    return tasks


def rotated(items: Sequence[Item], by: int) -> list[Item]:
    """The same items, begun at another one."""
    if not items:
        return []
    start = by % len(items)
    return [*items[start:], *items[:start]]


def seconds_of(task: Task, profile: Profile) -> float:
    """About how long a task takes."""
    if task.kind == "sweep":
        return START_SECONDS + profile.warm_up_seconds + len(CONNECTIONS) * profile.sweep_seconds
    if task.kind == "limit":
        return 1.5 * profile.limit_seconds + 8.0
    if task.kind == "visit":
        documented = task.setup is not None and task.setup.form in ("documented", "shipped", "one-thread")
        burst = profile.reference_seconds if documented else profile.burst_seconds
        return START_SECONDS + profile.warm_up_seconds + len(CONNECTIONS) * burst
    return {"echo": 30.0, "text": 30.0}.get(task.kind, 150.0 * profile.growth_seconds)
