"""What a model card says of a model for labels or values, in place of what it says of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handlerlib.spec import ModelSpec


def what(spec: ModelSpec, thing: str) -> str:
    """The first sentence: what the model does with an image or a text."""
    article = "an" if thing == "image" else "a"
    if spec.task == "regression":
        named = ", ".join(spec.labels)
        return f"Gives {article} {thing} {_count(len(spec.labels), 'value')}: {named}."
    if spec.task == "multi-label":
        return f"Gives {article} {thing} any number of {len(spec.labels)} labels, none included."
    return f"Assigns {article} {thing} to one of {len(spec.labels)} classes."


def limits(spec: ModelSpec, thing: str) -> str:
    """The sentence about what it does not know."""
    if spec.task == "regression":
        return f"It gives {thing}s of anything else a value too, near those of the training split."
    if spec.task == "multi-label":
        return f"It knows only its labels, and no {thing}s but of the kind that it was trained on."
    return f"It knows only its classes: {thing}s of anything else get one of these labels too."


def figures(spec: ModelSpec, metrics: Mapping[str, Any], thing: str) -> list[str]:
    """Tables of the figures on the test split."""
    return _values(spec, metrics, thing) if spec.task == "regression" else _labels(metrics, thing)


def _labels(metrics: Mapping[str, Any], thing: str) -> list[str]:
    shown = [
        ("macro F1", "test_macro_f1"),
        ("micro F1", "test_micro_f1"),
        ("macro precision", "test_macro_precision"),
        ("macro recall", "test_macro_recall"),
        ("mean average precision", "test_average_precision"),
        ("exact match", "test_exact_match"),
        ("loss (nats per label)", "test_loss"),
    ]
    return [
        *_table(metrics, shown),
        "",
        "A label is given from its threshold on, which is the one with the highest F1 on the validation split.",
        "",
        f"| label | threshold | precision | recall | F1 | average precision | {thing}s |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {_cell(row['label'])} | {row['threshold']:.3f} | {row['precision']:.3f} | {row['recall']:.3f} |"
            f" {row['f1']:.3f} | {_number(row['average_precision'])} | {row['images']} |"
            for row in metrics["per_label"]
        ),
        "",
    ]


def _values(spec: ModelSpec, metrics: Mapping[str, Any], thing: str) -> list[str]:
    several = len(spec.labels) > 1
    shown = [
        ("mean absolute error" + ", mean of targets" * several, "test_mae"),
        ("root mean squared error" + ", mean of targets" * several, "test_rmse"),
        ("R²" + ", mean of targets" * several, "test_r2"),
        ("mean squared error, standardised", "test_loss"),
    ]
    return [
        *_table(metrics, shown),
        "",
        f"| target | mean absolute error | root mean squared error | R² | standard deviation in training | {thing}s |",
        "|---|---|---|---|---|---|",
        *(
            f"| {_cell(row['label'])} | {row['mae']:.4g} | {row['rmse']:.4g} | {_number(row['r2'])} |"
            f" {scaling.scale:.4g} | {row['images']} |"
            for row, scaling in zip(metrics["per_target"], spec.scaling, strict=True)
        ),
        "",
    ]


def _table(metrics: Mapping[str, Any], shown: list[tuple[str, str]]) -> list[str]:
    rows = [f"| {name} | {metrics[key]:.4f} |" for name, key in shown if key in metrics]
    return ["| metric | value |", "|---|---|", *rows]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
