"""The tuner's report: a picture of every measurement and of the way to the choice, and the figures as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marina.load_stats import Interval
from marina.tune import Record, Task, Tuned
from marina.tune_search import Probe, Value

REPORT_FILE = "report.json"
PLOT_FILE = "tune.png"
_MOST_NAMED = 12


def fields(task: Task, tuned: Tuned, record: Record) -> dict[str, Any]:
    """What was found, as JSON shows it."""
    best = tuned.outcome.best
    sustained = tuned.sustained
    return {
        "model": task.name,
        "objective_p99_ms": task.objective_ms,
        "payloads": task.load.source,
        "measured_on": record.identity["machine"],
        "best": _value_fields(best) if best is not None else None,
        "served_now": dataclasses.asdict(task.start),
        "served_now_value": next(
            (_value_fields(value) for value in tuned.outcome.values if value.setting == task.start), None
        ),
        "sustained_at_random_arrivals": {
            "rate": sustained.rate,
            "share": sustained.share,
            "p99_ms": sustained.p99_ms.as_dict(),
        }
        if sustained is not None
        else None,
        "settings": [_value_fields(value) for value in tuned.outcome.values],
        "settings_in_grid": task.space.size,
        "measurements": len(tuned.outcome.probes),
        "remembered": tuned.remembered,
        "complete": tuned.outcome.complete,
        "seconds": tuned.seconds,
        "folder": str(record.folder),
    }


def write(folder: Path, report: Mapping[str, Any], task: Task, tuned: Tuned) -> None:
    """`report.json` and `tune.png` into the folder."""
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if tuned.outcome.probes:
        draw(folder / PLOT_FILE, task, tuned)


def draw(path: Path, task: Task, tuned: Tuned) -> None:
    """Left: throughput against p99 of every measurement, one line per setting. Right: the best so far, measurement by
    measurement.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    best = tuned.outcome.best
    for rank, value in enumerate(tuned.outcome.values):
        found = sorted((item for item in tuned.outcome.probes if item.setting == value.setting), key=_by_load)
        chosen = best is not None and value.setting == best.setting
        left.errorbar(
            [item.p99_ms.value for item in found],
            [item.throughput.value for item in found],
            yerr=[[_below(item.throughput) for item in found], [_above(item.throughput) for item in found]],
            marker="o",
            markersize=7 if chosen else 4,
            linewidth=2.5 if chosen else 0.8,
            color="black" if chosen else None,
            alpha=1.0 if chosen else 0.6,
            label=value.setting.text if chosen or rank < _MOST_NAMED else None,
        )
    left.axvline(task.objective_ms, color="firebrick", linestyle="--", label=f"objective {task.objective_ms:g} ms")
    left.set_xscale("log")
    left.set_xlabel("p99 latency, ms")
    left.set_ylabel("good answers per second (95 % interval)")
    left.set_title(f"{task.name}: every measurement, one line per setting")
    left.legend(fontsize=7)
    _draw_path(right, tuned.outcome.probes, task.objective_ms)
    figure.savefig(path, dpi=110)


def _draw_path(axes: Any, probes: Sequence[Probe], objective_ms: float) -> None:
    so_far, most = [], 0.0
    for item in probes:
        if item.within(objective_ms) and item.turn == 0:
            most = max(most, item.throughput.value)
        so_far.append(most)
    numbers = range(1, len(probes) + 1)
    for label, wanted, marker in (
        ("within the objective", True, "o"),
        ("over it, or with failures", False, "x"),
    ):
        shown = [
            (number, item)
            for number, item in zip(numbers, probes, strict=True)
            if item.within(objective_ms) == wanted and item.turn == 0
        ]
        axes.scatter([n for n, _ in shown], [i.throughput.value for _, i in shown], marker=marker, label=label, s=22)
    again = [(number, item) for number, item in zip(numbers, probes, strict=True) if item.turn > 0]
    axes.scatter(
        [number for number, _ in again],
        [item.throughput.value for _, item in again],
        marker="s",
        facecolors="none",
        edgecolors="black",
        label="the best, measured again",
        s=36,
    )
    axes.step(list(numbers), so_far, where="post", color="grey", label="best so far")
    axes.set_xlabel("measurement")
    axes.set_ylabel("good answers per second")
    axes.set_title("the way of the search")
    axes.legend(fontsize=8)


def _value_fields(value: Value) -> dict[str, Any]:
    probe = value.probe
    return {
        **dataclasses.asdict(value.setting),
        "throughput": value.throughput.as_dict(),
        "confirmed": value.confirmed is not None,
        "in_flight": probe.in_flight if probe is not None else None,
        "p50_ms": probe.p50_ms if probe is not None else None,
        "p99_ms": probe.p99_ms.as_dict() if probe is not None else None,
        "cpu_ms_per_request": probe.cpu_ms if probe is not None else None,
        "pss_mib": probe.pss_mib if probe is not None else None,
    }


def _by_load(probe: Probe) -> int:
    return probe.in_flight


def _below(item: Interval) -> float:
    return item.value - item.low if item.low is not None else 0.0


def _above(item: Interval) -> float:
    return item.high - item.value if item.high is not None else 0.0
