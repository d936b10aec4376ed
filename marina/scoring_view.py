"""A scored endpoint as the terminal, --json and a report show it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from marina.errors import ClientError, MarinaError
from marina.scoring import AnswersDiffer, Failure, Score
from marina.screen import Screen, shown

if TYPE_CHECKING:  # the training package comes with torch, which takes seconds
    from training.html_report import Subject


def fields(score: Score, url: str) -> dict[str, Any]:
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


def show(screen: Screen, score: Score, url: str) -> None:
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


def against(score: Score, url: str) -> MarinaError | None:
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


def said(score: Score) -> str:
    """The comparison as a sentence's part."""
    found = score.comparison
    assert found is not None
    return (
        f"{found.changed} of {found.samples} first labels differ, the largest difference of a probability is"
        f" {found.largest:.2g}, {found.lost_points:+.3f} points of accuracy are lost"
    )


def subject(score: Score, url: str) -> Subject:
    """What a report says beside the figures."""
    from training import html_report, pipeline

    answered = score.answered
    total = len(answered.names) + len(answered.failures)
    warnings = list(score.notes)
    if answered.failures:
        warnings.insert(0, f"{len(answered.failures)} of {total} samples got no answer.")
    if score.comparison is not None and score.comparison.differs:
        warnings.insert(0, f"The answers differ from those of {score.artifact}: {said(score)}.")
    facts = [
        ("address", url),
        ("model", f"{score.model} {score.version}"),
        ("samples", f"{total}, {score.asked.what}"),
        ("answered", f"{len(answered.names)}"),
    ]
    if score.comparison is not None:
        facts.append((f"beside {score.artifact}", said(score)))
    about = html_report.Subject(title="", subtitle="")
    if score.artifact is not None:
        about = pipeline.subject(score.artifact, score.asked)
    return dataclasses.replace(
        about,
        title=f"Report: {score.model} {score.version} as served",
        subtitle=f"{url}, {score.asked.what}",
        served=html_report.Served(facts=facts, failures=[(one.name, one.reason) for one in answered.failures]),
        warnings=warnings,
    )


def _by_reason(failures: tuple[Failure, ...]) -> list[tuple[object, ...]]:
    """How many samples share a reason, and three of them."""
    reasons: dict[str, list[str]] = {}
    for failure in failures:
        reasons.setdefault(failure.reason, []).append(failure.name)
    most = sorted(reasons.items(), key=lambda item: -len(item[1]))
    return [(len(names), reason, ", ".join(names[:3])) for reason, names in most]
