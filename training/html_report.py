"""One HTML file with everything about an evaluation: figures, plots, mistakes, recipe, data and environment.

It loads nothing from elsewhere and holds no times, so that equal runs give equal bytes.
"""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from handlerlib import imaging
from handlerlib.spec import ModelSpec, Task
from training import files, plots, task_report
from training.data import Sample
from training.evaluate import ConfusedPair, Evaluation, Prediction, confused
from training.html_template import PAGE

REPORT_FILE = "report.html"

_PAIRS = 9
_EXAMPLES = 3
_SIDE = 168
"""Longest side of a picture in pixels: twice what the page gives it, for dense screens."""
_SMALL = 64
"""Up to this side a picture stays as it is, and its pixels are drawn as squares."""
_EXCERPT = 240
"""Characters of a text."""
_OUTPUTS: dict[Task, str] = {"multi-class": "classes", "multi-label": "labels", "regression": "targets"}
_MOST_IN_TABLE = 30
"""Classes up to which the confusion matrix is a table too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How the weights came about."""

    history: Sequence[Mapping[str, float]]
    """One line per epoch: epoch, learning_rate, and loss and accuracy (or R²) of train and validation."""
    best_epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """An endpoint that was scored over HTTP."""

    facts: Sequence[tuple[str, str]]
    failures: Sequence[tuple[str, str]]
    """Sample and reason of each request without an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What the page is about, beside the figures; what is empty has no section."""

    title: str
    subtitle: str
    temperature: float = 1.0
    training: Training | None = None
    served: Served | None = None
    warnings: Sequence[str] = ()
    data: Sequence[tuple[str, str]] = ()
    recipe: Mapping[str, Any] | None = None
    environment: Sequence[tuple[str, str]] = ()


def describe(
    spec: ModelSpec,
    origin: Mapping[str, Any],
    *,
    threads: int,
    device: str,
    training: Training | None = None,
    notes: Sequence[str] = (),
) -> Subject:
    """A run or artifact: its spec and what `provenance.json` says; `notes` are the sentences about its data."""
    recipe, sizes = origin.get("recipe") or {}, origin.get("splits", {})
    source = recipe.get("data", {}).get("source", "unknown")
    return Subject(
        title=f"Report: {spec.name}",
        subtitle=f"{spec.architecture.name}, {len(spec.labels)} {_OUTPUTS[spec.task]}, run {origin.get('run', 'unknown')}",
        temperature=spec.temperature,
        training=training,
        data=(
            ("source", str(source)),
            ("digest (SHA-256)", str(origin.get("data_digest", "unknown"))),
            *((f"{split} split", f"{count} samples") for split, count in sizes.items()),
            *(("note", line) for line in notes),
        ),
        recipe=recipe,
        environment=(
            *((name, str(version)) for name, version in origin.get("versions", {}).items()),
            ("code", str(origin.get("git_revision", "unknown"))),
            ("system", f"{platform.system()} {platform.machine()}"),
            ("processor", _processor()),
            ("device", device),
            ("threads", str(threads)),
        ),
    )


def write(path: Path, subject: Subject, evaluation: Evaluation, samples: Iterable[Sample]) -> None:
    """Write the page. `samples` are those that were judged, for the pictures of mistakes."""
    files.write_text(path, render(subject, evaluation, samples))


def render(subject: Subject, evaluation: Evaluation, samples: Iterable[Sample]) -> str:
    """The page as text. `samples` are those that were judged; their content is shown for the worst mistakes only."""
    if evaluation.task != "multi-class":
        return _render_task(subject, evaluation, samples)
    pairs = confused(evaluation, pairs=_PAIRS, examples=_EXAMPLES)
    wanted = {one.name for pair in pairs for one in pair.worst}
    contents = {sample.name: sample.data for sample in samples if sample.name in wanted} if wanted else {}
    curved = any(row.roc_auc is not None for row in evaluation.per_class)
    training = subject.training
    pictures = {
        "curves": _uri(plots.curves_png(training.history, training.best_epoch)) if training else "",
        "confusion": _uri(plots.confusion_png(evaluation)),
        "curves_of_classes": _uri(plots.class_curves_png(evaluation)) if curved else "",
        "reliability": _uri(plots.reliability_png(evaluation.bins, evaluation.uncalibrated)),
    }
    blocks = _blocks(subject)
    return _page().render(
        task=evaluation.task,
        title=subject.title,
        subtitle=subject.subtitle,
        sections=_sections(subject, curved, blocks),
        warnings=subject.warnings,
        served=subject.served,
        cards=_cards(evaluation, subject.temperature),
        pictures=pictures,
        **_history(training),
        classes=_classes(evaluation),
        labels=evaluation.labels,
        matrix=evaluation.confusion if len(evaluation.labels) <= _MOST_IN_TABLE else (),
        confusion_alt=_said_confusion(evaluation, pairs),
        roc_alt=_said_areas(evaluation),
        calibration=_said_calibration(evaluation, subject.temperature),
        reliability_alt=f"Reliability diagram. {_said_calibration(evaluation, subject.temperature)}",
        bins=[
            {
                "range": f"{one.low:.3f} to {one.high:.3f}",
                "count": one.count,
                "confidence": f"{one.confidence:.3f}" if one.count else "–",
                "accuracy": f"{one.accuracy:.3f}" if one.count else "–",
            }
            for one in evaluation.bins
        ],
        pairs=[_pair(pair, contents) for pair in pairs],
        blocks=blocks,
    )


def _render_task(subject: Subject, evaluation: Evaluation, samples: Iterable[Sample]) -> str:
    """The same for labels or values."""
    panels = task_report.panels(evaluation)
    mistakes = task_report.mistakes(evaluation)
    wanted = {one.name for one in mistakes}
    contents = {sample.name: sample.data for sample in samples if sample.name in wanted} if wanted else {}
    training, blocks = subject.training, _blocks(subject)
    known = [
        *((("endpoint", "Endpoint"),) if subject.served is not None else ()),
        *((("training", "Training"),) if training is not None else ()),
        *((panel.id, panel.heading) for panel in panels),
        ("mistakes", "Worst mistakes"),
    ]
    curves = _uri(plots.curves_png(training.history, training.best_epoch)) if training else ""
    return _page().render(
        task=evaluation.task,
        title=subject.title,
        subtitle=subject.subtitle,
        sections=[*known, *((one["id"], one["heading"]) for one in blocks)],
        warnings=subject.warnings,
        served=subject.served,
        cards=[{"name": name, "value": value, "note": note} for name, value, note in task_report.cards(evaluation)],
        pictures={"curves": curves},
        **_history(training),
        panels=[
            {"id": one.id, "heading": one.heading, "picture": _uri(one.picture), "alt": one.alt, "caption": one.caption,
             "about": one.about, "columns": one.columns, "rows": one.rows}
            for one in panels
        ],
        shots=[_pictured(one.name, one.said, one.said, contents[one.name]) for one in mistakes if one.name in contents],
        blocks=blocks,
    )  # fmt: skip


def _page() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(PAGE)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


# ------------------------------------------------------------------------------------------------- words and numbers


def _sections(subject: Subject, curved: bool, blocks: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    known = [
        ("endpoint", "Endpoint", subject.served is not None),
        ("training", "Training", subject.training is not None),
        ("classes", "Classes", True),
        ("confusion", "Confusion matrix", True),
        ("roc", "ROC and precision-recall", curved),
        ("calibration", "Calibration", True),
        ("mistakes", "Most confused pairs", True),
    ]
    return [(key, heading) for key, heading, there in known if there] + [(one["id"], one["heading"]) for one in blocks]


def _cards(evaluation: Evaluation, temperature: float) -> list[dict[str, str]]:
    metrics = evaluation.metrics
    before = metrics.get("test_ece_uncalibrated")
    cards = [
        ("accuracy", f"{metrics['test_accuracy']:.2%}", f"of {metrics['test_images']:.0f} samples"),
        ("macro F1", f"{metrics['test_macro_f1']:.4f}", ""),
        ("macro precision", f"{metrics['test_macro_precision']:.4f}", ""),
        ("macro recall", f"{metrics['test_macro_recall']:.4f}", ""),
        ("mean ROC AUC", _number(metrics.get("test_roc_auc")), "one class against the rest"),
        ("mean average precision", _number(metrics.get("test_average_precision")), "one class against the rest"),
        ("loss", f"{metrics['test_loss']:.4f}", "nats"),
        (
            "calibration error",
            f"{metrics['test_ece']:.2%}",
            f"{before:.2%} before, temperature {temperature:g}" if before is not None else "",
        ),
    ]
    return [{"name": name, "value": value, "note": note} for name, value, note in cards]


def _history(training: Training | None) -> dict[str, Any]:
    if training is None:
        return {"history": [], "history_columns": [], "curves_alt": "", "curves_caption": ""}
    keys = [
        key
        for split in ("train", "validation")
        for key in (f"{split}_loss", f"{split}_accuracy", f"{split}_r2")
        if all(key in line for line in training.history)
    ]
    best = training.history[training.best_epoch - 1]
    said = ", ".join(f"{key.replace('_', ' ')} {best[key]:.4f}" for key in keys)
    return {
        "history": [[f"{line['epoch']:.0f}", *(f"{line[key]:.4f}" for key in keys)] for line in training.history],
        "history_columns": ["epoch", *(key.replace("_", " ") for key in keys)],
        "curves_caption": f"Loss and {'R²' if 'validation_r2' in keys else 'accuracy'} over the epochs",
        "curves_alt": f"Training curves over {len(training.history)} epochs. Epoch {training.best_epoch} was kept: {said}.",
    }


def _classes(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [
        {
            "label": row.label,
            "precision": f"{row.precision:.4f}",
            "recall": f"{row.recall:.4f}",
            "f1": f"{row.f1:.4f}",
            "roc_auc": _number(row.roc_auc),
            "average_precision": _number(row.average_precision),
            "images": row.images,
        }
        for row in evaluation.per_class
    ]


def _said_confusion(evaluation: Evaluation, pairs: Sequence[ConfusedPair]) -> str:
    right = sum(row[number] for number, row in enumerate(evaluation.confusion))
    worst = "; ".join(f"{pair.label} taken for {pair.predicted} {pair.count} times" for pair in pairs[:3])
    return f"{right} of {sum(map(sum, evaluation.confusion))} samples on the diagonal. {worst}."


def _said_areas(evaluation: Evaluation) -> str:
    areas = {row.label: row.roc_auc for row in evaluation.per_class if row.roc_auc is not None}
    if not areas:
        return ""
    low = min(areas, key=lambda label: areas[label])
    return (
        f"ROC and precision-recall curves per class. Mean ROC area {evaluation.metrics['test_roc_auc']:.4f}, mean average"
        f" precision {evaluation.metrics['test_average_precision']:.4f}; the smallest ROC area is {areas[low]:.4f} ({low})."
    )


def _said_calibration(evaluation: Evaluation, temperature: float) -> str:
    now = evaluation.metrics["test_ece"]
    before = evaluation.metrics.get("test_ece_uncalibrated")
    if before is None:
        return f"The expected calibration error is {now:.2%}; the probabilities are as the network gives them."
    sure = "too sure" if temperature > 1 else "not sure enough"
    return (
        f"The expected calibration error is {now:.2%}. Without the temperature {temperature:g}, which was fitted on the"
        f" validation split, it is {before:.2%}: the network alone is {sure}."
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _blocks(subject: Subject) -> list[dict[str, Any]]:
    found = [
        ("data", "Data", "What was trained and judged on", subject.data, ""),
        ("recipe", "Recipe", "", (), "\n".join(_lines(subject.recipe or {}))),
        ("environment", "Environment", "What it ran with", subject.environment, ""),
    ]
    return [
        {"id": key, "heading": heading, "caption": caption, "facts": facts, "text": text}
        for key, heading, caption, facts, text in found
        if facts or text
    ]


def _lines(values: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    """`section.key = value`, as --set takes it."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _lines(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key} = {str(value).lower() if isinstance(value, bool) else value}"


# ----------------------------------------------------------------------------------------------------------- pictures


def _pair(pair: ConfusedPair, contents: Mapping[str, bytes]) -> dict[str, Any]:
    shots = [_shot(one, contents[one.name]) for one in pair.worst if one.name in contents]
    return {"label": pair.label, "predicted": pair.predicted, "count": pair.count, "shots": shots}


def _shot(mistake: Prediction, data: bytes) -> dict[str, Any]:
    sure = f"{mistake.probability:.1%} sure"
    return _pictured(mistake.name, sure, f"{mistake.label}, taken for {mistake.predicted}, {sure}", data)


def _pictured(name: str, sure: str, alt: str, data: bytes) -> dict[str, Any]:
    """A picture of an image, or the beginning of a text."""
    shot = {"name": Path(name).name, "sure": sure, "picture": "", "small": False, "text": "", "alt": ""}
    if imaging.sniff(data) is None:
        text = data.decode("utf-8", "replace").strip()
        return shot | {"text": text if len(text) <= _EXCERPT else text[:_EXCERPT].rstrip() + "…"}
    try:
        picture, small = _thumbnail(data)
    except Exception:  # noqa: BLE001 - decoders raise anything; an illustration must not cost a finished training
        return shot
    return shot | {"picture": picture, "small": small, "alt": f"{name}: {alt}"}


def _thumbnail(data: bytes) -> tuple[str, bool]:
    """Its URI, and whether it is the image as it is."""
    with Image.open(io.BytesIO(data)) as opened:
        image = imaging.upright(opened).convert("RGB")
    small = max(image.size) <= _SMALL
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG")
    else:
        image.thumbnail((_SIDE, _SIDE))
        image.save(buffer, "JPEG", quality=82)
    return _uri(buffer.getvalue(), "png" if small else "jpeg"), small


def _uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
