"""The pictures of a run, drawn without a display.

Colours are Okabe and Ito's, which people with colour-blindness can tell apart; lines differ in their dashes too.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import precision_recall_curve, roc_curve

from training import files
from training.calibrate import Bin, expected_error
from training.evaluate import ClassMetrics, Evaluation
from training.multilabel import LabelMetrics

_MOST_NUMBERED = 30
"""Classes up to which every cell of the confusion matrix shows its count."""
_MOST_COLOURED = 10
"""Classes up to which each has a colour of its own in ROC and PR curves; beyond it the worst five."""
_WORST = 5
_MOST_TARGETS = 4
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.")


def curves(history: Sequence[Mapping[str, float]], best_epoch: int, path: Path, *, title: str) -> None:
    """Loss and accuracy of training and validation over the epochs, the chosen epoch marked."""
    _save(_curves(history, best_epoch, title), path)


def judged(evaluation: Evaluation, folder: Path, *, title: str) -> None:
    """The picture of a run's answers: `confusion_matrix.png`, of labels `labels.png`, of values `values.png`."""
    if evaluation.task == "multi-label":
        _save(_labels(evaluation, title), folder / "labels.png")
    elif evaluation.task == "regression":
        _save(_values(evaluation, title), folder / "values.png")
    else:
        confusion(evaluation, folder / "confusion_matrix.png", title=title)


def labels_png(evaluation: Evaluation) -> bytes:
    """Precision, recall and F1 of each label, the labels in the order of F1; of many labels the worst."""
    return _png(_labels(evaluation, ""))


def values_png(evaluation: Evaluation) -> bytes:
    """Per target: the answers over the true values, and below what is left over, answer minus true value."""
    return _png(_values(evaluation, ""))


def confusion(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """True labels down, predicted labels across; colour is the share of the true class, numbers are images."""
    _save(_confusion(evaluation, title), path)


def curves_png(history: Sequence[Mapping[str, float]], best_epoch: int) -> bytes:
    """What `curves` writes, without a title."""
    return _png(_curves(history, best_epoch, ""))


def confusion_png(evaluation: Evaluation) -> bytes:
    """What `confusion` writes, without a title."""
    return _png(_confusion(evaluation, ""))


def class_curves_png(evaluation: Evaluation) -> bytes:
    """ROC and precision-recall curves, each class against the rest; it needs one class at least that has both sides."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    roc, recall = figure.subplots(1, 2)
    several = evaluation.task == "multi-label"
    rows: Sequence[ClassMetrics | LabelMetrics] = evaluation.per_label if several else evaluation.per_class
    names_N = np.array([one.label for one in evaluation.predictions])
    score_NK = evaluation.outputs_NK if several else evaluation.log_NK
    judged = [(k, row) for k, row in enumerate(rows) if row.roc_auc is not None]
    styles = _styles([row for _, row in judged])
    for k, row in judged:
        true_N = evaluation.true_NK[:, k] > 0.5 if several else names_N == row.label
        colour, dash, named = styles[row.label]
        label = {axes: f"{_short(row.label)} ({area:.3f})" if named else None
                 for axes, area in ((roc, row.roc_auc), (recall, row.average_precision))}  # fmt: skip
        look = {"color": colour, "linestyle": dash, "linewidth": 1.6 if named else 0.6, "zorder": 3 if named else 2}
        false, true, _ = roc_curve(true_N, score_NK[:, k])
        roc.plot(false, true, label=label[roc], **look)
        precise, found, _ = precision_recall_curve(true_N, score_NK[:, k])
        recall.step(found, precise, where="post", label=label[recall], **look)
    roc.plot([0, 1], [0, 1], color="#8a8a8a", linewidth=0.8, linestyle=":", zorder=1)
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC (area)")
    recall.set(xlabel="recall", ylabel="precision", title="precision-recall (average precision)")
    for axes in (roc, recall):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.grid(alpha=0.3)
        legend = axes.legend(frameon=False, fontsize=8, loc="lower left" if axes is recall else "lower right")
        for text in legend.get_texts():
            text.set_parse_math(False)
    return _png(figure)


def reliability_png(after: Sequence[Bin], before: Sequence[Bin] = ()) -> bytes:
    """Share of right answers over their probability, with the number of answers below; `before` calibration at its left."""
    panels = [("before", before), ("after", after)] if before else [("", after)]
    figure = Figure(figsize=(5.4 * len(panels), 5.6), layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False, height_ratios=(4, 1), sharex=True)
    for column, (when, bins) in enumerate(panels):
        _diagram(grid[0, column], bins, f"{when} calibration: " if when else "")
        counts = grid[1, column]
        counts.bar(
            [one.low for one in bins], [one.count for one in bins], width=1 / len(bins), align="edge", color="#9db8d2"
        )
        counts.set(xlabel="probability of the first label", ylabel="answers", xlim=(0, 1))
        counts.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    return _png(figure)


def _diagram(axes: Axes, bins: Sequence[Bin], when: str) -> None:
    filled = [one for one in bins if one.count]
    lows, width = [one.low for one in filled], 1 / len(bins)
    axes.bar(
        lows, [one.accuracy for one in filled], width=width, align="edge", color="#1f5fa8", edgecolor="white",
        label="share right",
    )  # fmt: skip
    axes.bar(
        lows,
        [one.confidence - one.accuracy for one in filled],
        bottom=[one.accuracy for one in filled],
        width=width,
        align="edge",
        color="none",
        edgecolor="#D55E00",
        linewidth=1,
        hatch="//",
        label="gap to the probability",
    )
    axes.plot([0, 1], [0, 1], color="#4a4a4a", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of right answers")
    axes.set_title(f"{when}expected error {expected_error(bins):.2%}")
    axes.legend(loc="upper left", framealpha=0.95, edgecolor="none")


def _styles(rows: Sequence[ClassMetrics | LabelMetrics]) -> dict[str, tuple[str, str, bool]]:
    """Colour, dashes and whether it is named, per class."""
    worst = sorted(rows, key=lambda row: row.roc_auc or 0.0)[:_WORST]
    named = rows if len(rows) <= _MOST_COLOURED else worst
    looks = {
        row.label: (_COLOURS[n % len(_COLOURS)], _DASHES[n // len(_COLOURS) % len(_DASHES)], True)
        for n, row in enumerate(named)
    }
    return {row.label: looks.get(row.label, ("#c4cbd3", "-", False)) for row in rows}


def _short(label: str) -> str:
    return label if len(label) <= 20 else label[:19] + "…"


def _curves(history: Sequence[Mapping[str, float]], best_epoch: int, title: str) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    epochs = [line["epoch"] for line in history]
    second = "accuracy" if "validation_accuracy" in history[0] else "r2"
    for axes, what in zip(figure.subplots(1, 2), ("loss", second), strict=True):
        for split, label, colour in (
            ("train", "train (augmented)", "#7f7f7f"),
            ("validation", "validation", "#1f5fa8"),
        ):
            if f"{split}_{what}" not in history[0]:
                continue
            values = [line[f"{split}_{what}"] for line in history]
            axes.plot(epochs, values, color=colour, label=label, marker="o" if len(epochs) < 3 else None)
        axes.axvline(best_epoch, color="#c44e00", linestyle=":", label=f"best epoch ({best_epoch})")
        named = {"loss": "loss (nats)" if second == "accuracy" else "loss (standardised)", "r2": "R²"}
        axes.set(xlabel="epoch", ylabel=named.get(what, what))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def _labels(evaluation: Evaluation, title: str) -> Figure:
    rows = sorted(evaluation.per_label, key=lambda row: -row.f1)[-_MOST_NUMBERED:]
    figure = Figure(figsize=(8, max(2.5, 1.2 + 0.38 * len(rows))), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(rows))[::-1]
    for what, mark, colour in (("precision", ">", _COLOURS[1]), ("recall", "<", _COLOURS[2])):
        axes.scatter(
            [getattr(row, what) for row in rows], places, marker=mark, color=colour, label=what, zorder=3, s=28
        )
    axes.barh(places, [row.f1 for row in rows], height=0.6, color="#9db8d2", label="F1")
    axes.set_yticks(places, [f"{_short(row.label)} ({row.images})" for row in rows], parse_math=False)
    axes.set(xlim=(0, 1.02), xlabel="share")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.5 / len(rows)), ncols=3)
    axes.set_title(title, parse_math=False)
    return figure


def _values(evaluation: Evaluation, title: str) -> Figure:
    rows = evaluation.per_target[:_MOST_TARGETS]
    figure = Figure(figsize=(max(5.5, 4.2 * len(rows)), 6.4), layout="constrained")
    grid = figure.subplots(2, len(rows), squeeze=False, height_ratios=(2, 1), sharex="col")
    for k, row in enumerate(rows):
        true_N, answer_N = evaluation.true_NK[:, k], evaluation.outputs_NK[:, k]
        above, below = grid[0, k], grid[1, k]
        ends = [float(true_N.min()), float(true_N.max())]
        for axes, found_N, line in ((above, answer_N, ends), (below, answer_N - true_N, [0.0, 0.0])):
            axes.scatter(true_N, found_N, s=9, alpha=0.4, color=_COLOURS[0], linewidths=0)
            axes.plot(ends, line, color="#4a4a4a", linestyle="--", linewidth=1)
            axes.grid(alpha=0.3)
        above.set(ylabel="answer")
        below.set(xlabel="true value", ylabel="residual")
        r2 = "" if row.r2 is None else f", R² {row.r2:.3f}"
        above.set_title(f"{_short(row.label)}: mean absolute error {row.mae:.3g}{r2}", fontsize=10, parse_math=False)
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def _confusion(evaluation: Evaluation, title: str) -> Figure:
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
    names = [_short(label) for label in evaluation.labels]
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
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    _draw(figure, lambda: figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None}))
    return buffer.getvalue()


def _save(figure: Figure, path: Path) -> None:
    _draw(figure, lambda: _write(figure, path))


def _draw(figure: Figure, write: Callable[[], object]) -> None:
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A label in a script that the font lacks becomes boxes; the tables have it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        write()


def _write(figure: Figure, path: Path) -> None:
    files.write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None}))
