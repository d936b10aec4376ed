"""A scored endpoint as the terminal, --json and a report show it."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

from marina.errors import ClientError, MarinaError
from marina.scoring import AnswersDiffer, Asked, Beside, Failure, Figures, Score
from marina.screen import Screen, shown

_Score: TypeAlias = Score[Asked, Figures, Beside]


def fields(score: _Score, url: str) -> dict[str, Any]:
    """What --json says beside the figures."""
    answered, comparison = score.answered, score.comparison
    return {
        "url": url,
        "model": score.model,
        "version": score.version,
        "versions": dict(answered.versions),
        "samples": score.asked.what,
        "answered": len(answered.names),
        "seconds": answered.seconds,
        "failures": [dataclasses.asdict(failure) for failure in answered.failures],
        "artifact": None if score.artifact is None else str(score.artifact),
        "artifact_metrics": None if score.reference is None else score.reference.metrics,
        "comparison": None if comparison is None else dataclasses.asdict(comparison),
        "notes": list(score.notes),
    }


def show(screen: Screen, score: _Score, url: str) -> None:
    """The figures beside the artifact's own, what failed, and how far answers differ."""
    title = f"{score.model} {score.version} at {url}, {score.asked.what}"
    metrics = score.evaluation.metrics
    if score.reference is None:
        screen.table(("metric", "endpoint"), list(metrics.items()), title=title)
    else:
        own = score.reference.metrics
        screen.table(
            ("metric", "endpoint", "artifact here"), [(key, value, own.get(key, "–")) for key, value in metrics.items()],
            title=title,
        )  # fmt: skip
    answered = score.answered
    if answered.failures:
        screen.table(
            ("samples", "no answer because", "such as"), _by_reason(answered.failures), title="failed requests"
        )
    rate = len(answered.names) / answered.seconds
    screen.say(f"{len(answered.names)} answers, {rate:.1f} a second; {len(answered.failures)} samples got none")
    if score.artifact is not None and score.comparison is not None:
        screen.say(f"beside {shown(score.artifact)}: {said(score)}")
    for note in score.notes:
        screen.note(note)


def against(score: _Score, url: str) -> MarinaError | None:
    """What must not go unnoticed: answers that differ from the artifact's, or samples without an answer."""
    comparison, failures = score.comparison, score.answered.failures
    if comparison is not None and comparison.differs:
        return AnswersDiffer(
            f"{url} answers otherwise than {score.artifact}: {said(score)}; allowed is {comparison.allowed}",
            remedy="verify the archive and deploy it again; another device or engine on the server differs too,"
            " and there the comparison belongs",
        )
    if failures:
        total = len(score.answered.names) + len(failures)
        return ClientError(
            f"{len(failures)} of {total} samples got no answer, the first: {failures[0].name}: {failures[0].reason}",
            remedy="the figures leave them out; --json and --report list all of them",
        )
    return None


def said(score: _Score) -> str:
    """The comparison as a sentence's part."""
    found = score.comparison
    assert found is not None
    return found.said


def warnings(score: _Score) -> list[str]:
    """What a report says before anything else."""
    answered = score.answered
    found = list(score.notes)
    if answered.failures:
        total = len(answered.names) + len(answered.failures)
        found.insert(0, f"{len(answered.failures)} of {total} samples got no answer.")
    if score.comparison is not None and score.comparison.differs:
        found.insert(0, f"The answers differ from those of {score.artifact}: {said(score)}.")
    return found


def facts(score: _Score, url: str) -> list[tuple[str, str]]:
    """What a report says of the endpoint."""
    answered = score.answered
    total = len(answered.names) + len(answered.failures)
    found = [
        ("address", url),
        ("model", f"{score.model} {score.version}"),
        ("samples", f"{total}, {score.asked.what}"),
        ("answered", f"{len(answered.names)}"),
    ]
    if score.comparison is not None:
        found.append((f"beside {score.artifact}", said(score)))
    return found


def _by_reason(failures: tuple[Failure, ...]) -> list[tuple[object, ...]]:
    """How many samples share a reason, and three of them."""
    reasons: dict[str, list[str]] = {}
    for failure in failures:
        reasons.setdefault(failure.reason, []).append(failure.name)
    most = sorted(reasons.items(), key=lambda item: -len(item[1]))
    return [(len(names), reason, ", ".join(names[:3])) for reason, names in most]
