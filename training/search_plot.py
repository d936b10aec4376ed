"""The figure of a search."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training import files

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8a8a8a"
_MOST_PANELS = 6


def draw(found: Mapping[str, Any], path: Path, *, logarithmic: Collection[str]) -> None:
    """Above: values in the order of trials, and what explains them; below: values over each key, by importance."""
    complete = [one for one in found["trials"] if one["state"] == "complete"]
    keys = _keys(found)[:_MOST_PANELS]
    columns = max(2, min(3, len(keys)))
    rows = 1 + -(-len(keys) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns)
    _progress(figure.add_subplot(grid[0, : columns - 1]), found, complete)
    _importance(figure.add_subplot(grid[0, columns - 1]), found["importance"])
    for number, key in enumerate(keys):
        axes = figure.add_subplot(grid[1 + number // columns, number % columns])
        _slice(axes, key, found, log=key in logarithmic)
    files.write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None}))


def _keys(found: Mapping[str, Any]) -> list[str]:
    every = {key: None for one in found["trials"] for key in one["values"]}
    return list(dict.fromkeys([*found["importance"], *every]))


def _progress(axes: Axes, found: Mapping[str, Any], complete: Sequence[Mapping[str, Any]]) -> None:
    pruned = [one for one in found["trials"] if one["state"] == "pruned" and one["value"] is not None]
    better = min if found["monitor"] == "loss" else max
    axes.plot([one["number"] for one in pruned], [one["value"] for one in pruned], "x", color=_GREY, label="pruned")
    numbers, values = [one["number"] for one in complete], [one["value"] for one in complete]
    axes.plot(numbers, values, "o", color=_BLUE, label="complete")
    if values:
        axes.step(numbers, list(itertools.accumulate(values, better)), where="post", color=_ORANGE, label="best so far")
    axes.set(xlabel="trial", ylabel=f"validation {found['monitor'].replace('_', ' ')}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _importance(axes: Axes, importance: Mapping[str, float]) -> None:
    names = list(importance)[::-1]
    axes.barh([name.partition(".")[2] or name for name in names], [importance[name] for name in names], color=_BLUE)
    axes.set(xlabel="importance", xlim=(0, 1))
    axes.grid(alpha=0.3, axis="x")
    if not importance:
        axes.set_title("too few complete trials to tell", fontsize=9)


def _slice(axes: Axes, key: str, found: Mapping[str, Any], *, log: bool) -> None:
    chosen = [one for one in found["trials"] if key in one["values"] and one["value"] is not None]
    places: list[Any] = [one["values"][key] for one in chosen]
    if any(isinstance(place, str | bool) for place in places):
        places = [str(place) for place in places]
    elif log:
        axes.set_xscale("log")
    for place, one in zip(places, chosen, strict=True):
        whole = one["state"] == "complete"
        best = whole and (one["value"], one["values"]) == (found["value"], found["values"])
        colour = _ORANGE if best else _BLUE if whole else _GREY
        axes.plot([place], [one["value"]], "o" if whole else "x", color=colour, markersize=9 if best else 6, alpha=0.8)
    axes.set_xlabel(key, parse_math=False)
    axes.grid(alpha=0.3)
