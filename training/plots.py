"""The two pictures of a run, drawn without a display."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training import files
from training.evaluate import Evaluation

_MOST_NUMBERED = 30
"""Classes up to which every cell of the confusion matrix shows its count."""


def curves(history: Sequence[dict[str, float]], best_epoch: int, path: Path, *, title: str) -> None:
    """Loss and accuracy of training and validation over the epochs, the chosen epoch marked."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    epochs = [line["epoch"] for line in history]
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split, label, colour in (
            ("train", "train (augmented)", "#7f7f7f"),
            ("validation", "validation", "#1f5fa8"),
        ):
            values = [line[f"{split}_{what}"] for line in history]
            axes.plot(epochs, values, color=colour, label=label, marker="o" if len(epochs) < 3 else None)
        axes.axvline(best_epoch, color="#c44e00", linestyle=":", label=f"best epoch ({best_epoch})")
        axes.set(xlabel="epoch", ylabel=what if what == "accuracy" else "loss (nats)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(title, parse_math=False)
    _save(figure, path)


def confusion(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """True labels down, predicted labels across; colour is the share of the true class, numbers are images."""
    counts = np.array(evaluation.confusion)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes = len(evaluation.labels)
    side = min(max(4.5, 1.8 + 0.52 * classes), 20.0)
    cell = 0.85 * side * 72 / classes
    size = min(max(0.7 * cell, 5.0), 10.0)
    # Where the smallest readable letters are taller than a cell, every second (third, ...) class is named.
    named = range(0, classes, math.ceil(size / cell))
    figure = Figure(figsize=(1.08 * side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    # The root makes rare mistakes visible beside a full diagonal.
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    names = [label if len(label) <= 20 else label[:19] + "…" for label in evaluation.labels]
    tilt = 0 if max(map(len, names)) <= 3 else 45 if classes <= _MOST_NUMBERED else 90
    axes.set_xticks(
        named,
        [names[number] for number in named],
        fontsize=size,
        rotation=tilt,
        ha="right" if tilt == 45 else "center",
        rotation_mode="anchor" if tilt == 45 else "default",
        parse_math=False,
    )
    axes.set_yticks(named, [names[number] for number in named], fontsize=size, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title, parse_math=False)
    axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#e4e4e4", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    if classes <= _MOST_NUMBERED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[row, column] > 0.3 else "#1a1a1a"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=size - 1)
    figure.colorbar(image, ax=axes, shrink=0.8, fraction=0.04, pad=0.02, label="share of the true class")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A label in a script that the font lacks becomes boxes; the tables have it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    files.write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None}))
