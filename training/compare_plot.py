"""The figure of a comparison."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from training import files

# Okabe & Ito's colours, told apart with any kind of colour vision; dashes follow when they are used up.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_Dash = Literal["-", "--", ":", "-."]
_DASHES: tuple[_Dash, ...] = ("-", "--", ":", "-.")
_LEGEND_LETTERS = 170
"""That fit beside each other below the panels."""

Curve = tuple[str, Sequence[Mapping[str, float]], int]
"""Name, lines of the history, best epoch (0: the training failed)."""


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Loss and accuracy (or R²) on the validation split against epochs and against time; thin lines are training's loss."""
    figure = Figure(figsize=(12, 8.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2, sharey="row")
    score = _score(curves)
    for row, what in enumerate(("loss", score)):
        for column, against in enumerate(("epoch", "seconds")):
            _panel(grid[row, column], curves, what, against)
        named = {"loss": "loss (standardised)" if score == "r2" else "loss (nats)", "r2": "R²"}
        grid[row, 0].set_ylabel(named.get(what, what))
    handles = [
        Line2D([], [], label=_label(curve), color=colour, linestyle=dash)
        for curve, (colour, dash) in zip(curves, _looks(), strict=False)
    ]
    columns = max(1, min(4, _LEGEND_LETTERS // (8 + max(len(_label(curve)) for curve in curves))))
    figure.suptitle("validation: the dot is the best epoch, × a failure; thin: training", fontsize=11)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    files.write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None}))


def _score(curves: Sequence[Curve]) -> str:
    """What is drawn beside the loss."""
    return "r2" if any("validation_r2" in line for _, lines, _ in curves for line in lines) else "accuracy"


def _looks() -> Iterator[tuple[str, _Dash]]:
    return itertools.cycle([(colour, dash) for dash in _DASHES for colour in _COLOURS])


def _panel(axes: Axes, curves: Sequence[Curve], what: str, against: str) -> None:
    for (_, lines, best), look in zip(curves, _looks(), strict=False):
        if not lines:
            continue
        times = list(itertools.accumulate(line["seconds"] for line in lines))
        where = [line["epoch"] for line in lines] if against == "epoch" else times
        values = [line[f"validation_{what}"] for line in lines]
        colour, dash = look
        axes.plot(where, values, linewidth=1.8, color=colour, linestyle=dash)
        if what == "loss":
            training = [line["train_loss"] for line in lines]
            axes.plot(where, training, linewidth=0.8, alpha=0.5, color=colour, linestyle=dash)
        at = best - 1 if best else len(lines) - 1
        axes.plot(where[at], values[at], marker="o" if best else "x", markersize=7, color=colour)
    axes.set(xlabel=against if against == "epoch" else "seconds of training")
    if against == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if what == "loss" and any(lines for _, lines, _ in curves):
        _keep_readable(axes, curves)
    axes.grid(alpha=0.3)


def _keep_readable(axes: Axes, curves: Sequence[Curve]) -> None:
    """One variant that runs away must not press the others flat: above three times the worst start the axis ends."""
    starts = [lines[0]["validation_loss"] for _, lines, _ in curves if lines]
    most = max(line["validation_loss"] for _, lines, _ in curves for line in lines)
    if most > 3 * max(1e-9, sorted(starts)[len(starts) // 2]):
        axes.set_ylim(0, 3 * sorted(starts)[len(starts) // 2])


def _label(curve: Curve) -> str:
    name, lines, best = curve
    shown = name if len(name) <= 44 else name[:43] + "…"
    return f"{shown} ({lines[best - 1][f'validation_{_score([curve])}']:.4f})" if best else f"{shown} (failed)"
