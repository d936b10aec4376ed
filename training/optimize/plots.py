"""The picture of a ladder, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training import files

if TYPE_CHECKING:
    from training.optimize.ladder import Outcome

_TAKEN, _PASSED, _DROPPED = "#c44e00", "#1f5fa8", "#b8b8b8"


def ladder(outcomes: Sequence[Outcome], chosen: Outcome | None, path: Path, *, title: str) -> None:
    """Milliseconds per image of each rung that ran: one image on all cores, and the largest batch on one thread."""
    shown = [one for one in outcomes if one.trial is not None]
    figure = Figure(figsize=(11, 1.6 + 0.36 * len(shown)), layout="constrained")
    rows = np.arange(len(shown))[::-1]
    colours = [_TAKEN if one is chosen else _DROPPED if one.reason else _PASSED for one in shown]
    for axes, largest in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        figures = []
        for one in shown:
            assert one.trial is not None
            on_one = [m for m in one.trial.measurements if m.threads == 1]
            figures.append(max(on_one, key=lambda m: m.batch) if largest else one.trial.measurements[0])
        values = [m.milliseconds for m in figures]
        axes.barh(rows, values, color=colours)
        for row, value in zip(rows, values, strict=True):
            axes.text(value, row, f" {value:.2f}", va="center", fontsize=8)
        axes.set_yticks(rows, [one.rung for one in shown])
        axes.set_xlim(0, 1.12 * max(values))
        axes.set(xlabel="ms per image", title=f"batch {figures[0].batch}, {figures[0].threads} threads")
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(f"{title} (orange: taken, grey: dropped)", parse_math=False)
    FigureCanvasAgg(figure)
    files.write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None}))
