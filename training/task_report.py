"""The parts of the report page that are a task's own: of labels and of values, in place of those of classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training import plots
from training.evaluate import Evaluation
from training.multilabel import LabelMetrics
from training.regression import TargetMetrics

_WORST = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One section: a picture with its words, and a table."""

    id: str
    heading: str
    picture: bytes = b""
    alt: str = ""
    caption: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    about: str = ""
    """Of the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """One of the answers that are furthest from the truth."""

    name: str
    said: str
    """What is wrong with it."""


def panels(evaluation: Evaluation) -> tuple[Panel, ...]:
    """The sections between training and mistakes."""
    return _of_values(evaluation) if evaluation.task == "regression" else _of_labels(evaluation)


def cards(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Name, value and note of each figure at the top."""
    metrics = evaluation.metrics
    samples = f"of {metrics['test_images']:.0f} samples"
    if evaluation.task == "regression":
        several = "mean of targets" if len(evaluation.labels) > 1 else evaluation.labels[0]
        return [
            ("mean absolute error", f"{metrics['test_mae']:.4g}", several),
            ("root mean squared error", f"{metrics['test_rmse']:.4g}", several),
            ("R²", _number(metrics.get("test_r2")), samples),
            ("loss", f"{metrics['test_loss']:.4f}", "mean squared error, standardised"),
        ]
    return [
        ("macro F1", f"{metrics['test_macro_f1']:.4f}", "the mean of the labels'"),
        ("micro F1", f"{metrics['test_micro_f1']:.4f}", "of all labels together"),
        ("exact match", f"{metrics['test_exact_match']:.2%}", samples),
        ("macro precision", f"{metrics['test_macro_precision']:.4f}", ""),
        ("macro recall", f"{metrics['test_macro_recall']:.4f}", ""),
        ("mean average precision", _number(metrics.get("test_average_precision")), "without a threshold"),
        ("mean ROC AUC", _number(metrics.get("test_roc_auc")), "without a threshold"),
        ("loss", f"{metrics['test_loss']:.4f}", "nats per label"),
    ]


def mistakes(evaluation: Evaluation) -> list[Mistake]:
    """The answers that are furthest off, the worst first: with the surest wrong label, or the largest error in the
    target's deviations. Empty when every answer is right."""
    if not len(evaluation.true_NK):
        return []
    if evaluation.task == "regression":
        spread_K = np.maximum(evaluation.true_NK.std(axis=0), 1e-12)
        off_NK = np.abs(evaluation.outputs_NK - evaluation.true_NK) / spread_K
    else:
        cuts_K = np.array([row.threshold for row in evaluation.per_label])
        wrong_NK = (evaluation.outputs_NK >= cuts_K) != (evaluation.true_NK > 0.5)
        off_NK = np.where(wrong_NK, np.abs(evaluation.outputs_NK - evaluation.true_NK), 0.0)
    worst_N = off_NK.max(axis=1)
    found = sorted(range(len(worst_N)), key=lambda n: (-worst_N[n], evaluation.predictions[n].name))[:_WORST]
    return [_mistake(evaluation, n, int(off_NK[n].argmax())) for n in found if worst_N[n] > 0]


def _mistake(evaluation: Evaluation, n: int, k: int) -> Mistake:
    label, true, got = evaluation.labels[k], float(evaluation.true_NK[n, k]), float(evaluation.outputs_NK[n, k])
    if evaluation.task == "regression":
        said = f"{label}: {got:.4g}, true {true:.4g}"
    else:
        said = f"{label} {'missed' if true else 'wrongly given'}, probability {got:.3f}"
    return Mistake(name=evaluation.predictions[n].name, said=said)


def _of_labels(evaluation: Evaluation) -> tuple[Panel, ...]:
    low = min(evaluation.per_label, key=lambda row: row.f1)
    found = [
        Panel(
            id="labels",
            heading="Labels",
            picture=plots.labels_png(evaluation),
            alt=f"Precision, recall and F1 per label. The lowest F1 is {low.f1:.4f} ({low.label}).",
            caption="F1 of each label as a bar, with precision and recall; in brackets how many samples have it.",
            columns=_headings(LabelMetrics, images="samples"),
            rows=[_cells(row) for row in evaluation.per_label],
            about="Figures per label. A label is given from its threshold on, which is the one with the highest F1 on the"
            " validation split (Yang, SIGIR 2001). ROC AUC and average precision ask for no threshold.",
        )
    ]
    if any(row.roc_auc is not None for row in evaluation.per_label):
        found.append(
            Panel(
                id="roc",
                heading="ROC and precision-recall",
                picture=plots.class_curves_png(evaluation),
                alt="ROC and precision-recall curves per label; the areas stand in the table of labels.",
                caption="Each label as the threshold on its probability falls. The areas of all labels stand in the table.",
            )
        )
    return tuple(found)


def _of_values(evaluation: Evaluation) -> tuple[Panel, ...]:
    said = "; ".join(f"{row.label}: mean absolute error {row.mae:.4g}" for row in evaluation.per_target)
    return (
        Panel(
            id="values",
            heading="Values",
            picture=plots.values_png(evaluation),
            alt=f"Answers over true values, and residuals. {said}.",
            caption="Above: the answer over the true value; right answers lie on the line. Below: what is left over, answer"
            " minus true value. A shape in it is something that the model has not learned.",
            columns=_headings(TargetMetrics, label="target", images="samples", mae="MAE", rmse="RMSE", r2="R²"),
            rows=[_cells(row) for row in evaluation.per_target],
            about="MAE = mean |y − f| and RMSE = (mean (y − f)²)^½ in the target's unit; R² = 1 − Σ(y − f)² / Σ(y − mean y)²"
            " (Draper and Smith, Applied Regression Analysis).",
        ),
    )


def _headings(kind: type[LabelMetrics] | type[TargetMetrics], **others: str) -> list[str]:
    return [others.get(field.name, field.name.replace("_", " ")) for field in dataclasses.fields(kind)]


def _cells(row: LabelMetrics | TargetMetrics) -> list[str]:
    values: Mapping[str, object] = dataclasses.asdict(row)
    return [_number(value) if isinstance(value, float | None) else str(value) for value in values.values()]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
