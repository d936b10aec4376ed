"""What a search found, as a table and as two pictures: accuracy against latency, accuracy against size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from training import files

COLUMNS = (
    "form", "result", "validation loss", "test %", "test loss [95 %]", "params", "non-zero %", "MACs",
    "weights kB", "deflated kB", "ms b1", "ms/img b8", "x b1", "x b8",
)  # fmt: skip
"""Losses in percentage points; b1 and b8 are batch sizes; x is how many times as fast as the parent."""
BRIEF = ("form", "result", "validation loss", "test loss [95 %]", "weights kB", "ms b1", "ms/img b8", "x b1", "x b8")
"""The columns that fit a terminal."""
_COLOURS = {"parent": "#1a1a1a", "kept": "#1f5fa8", "refused": "#c44e00"}
_MARKERS = {"parent": "D", "kept": "o", "refused": "X"}
_WEIGHED = {
    "image": "",
    "text": "Weights are weighed together with the vocabulary, and latency is the network's, without reading the text. ",
}
_Form = Mapping[str, Any]


def _thing(fields: Mapping[str, Any]) -> str:
    """What the model takes."""
    return "text" if fields["texts"] else "image"


def cells(fields: Mapping[str, Any]) -> list[list[str]]:
    """One row of text per form, under `COLUMNS`."""
    return [_cells(form) for form in fields["forms"]]


def brief(fields: Mapping[str, Any]) -> list[list[str]]:
    """The same under `BRIEF`."""
    return [[row[COLUMNS.index(column)] for column in BRIEF] for row in cells(fields)]


def table(fields: Mapping[str, Any]) -> str:
    """`report.md`."""
    images, thing = fields["images"], _thing(fields)
    lines = [
        f"# {_title(fields)} compressed",
        "",
        f"Budget: {fields['budget_points']:g} points. Forms were chosen on {images['validation']} validation {thing}s and"
        f" those within the budget asked once about {images['test']} test {thing}s; intervals are 95 %, of paired"
        f" differences. {_WEIGHED[thing]}Latency: milliseconds per {thing} on"
        f" {fields['threads']} thread{'' if fields['threads'] == 1 else 's'} ({fields['device']}), all forms in turns"
        " within one run; x is how many times as fast as the parent, in torch's eager float32.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in cells(fields)),
        "",
    ]
    for form in fields["forms"]:
        if form["description"]:
            made = "" if form["base"] == "parent" else f" Made from {form['base']}."
            lines.append(f"- **{form['name']}**: {form['description']}.{made}{gain(form)}")
        if form["reason"]:
            lines.append(f"- **{form['name']}**: {form['status']}: {form['reason']}.")
    return "\n".join([*lines, "", "![accuracy against latency and size](frontier.png)", ""])


def gain(form: _Form) -> str:
    """A sentence where people expect a gain in speed that is not there; empty elsewhere."""
    ratios = [one["speed_up"] for one in form["latency"].values()]
    if not ratios or max(ratios) >= 1.1:
        return ""
    return " No gain in speed on this hardware."


def draw(fields: Mapping[str, Any], path: Path) -> None:
    """Write the two pictures side by side as one PNG; the numbers of its points are explained beside it."""
    shown = [form for form in fields["forms"] if form["latency"]]
    reference = float(shown[0]["test_accuracy"])
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    left, right, key = figure.subplots(1, 3, width_ratios=[1, 1, 0.42])
    lowest = _floor(shown, reference, fields["budget_points"])
    for axes, value, label in (
        (left, _milliseconds, f"milliseconds per {_thing(fields)}, batch 1"),
        (right, _kilobytes, "weights that the worker loads (kB)"),
    ):
        _scatter(axes, shown, value, reference, lowest)
        axes.axhline(reference - fields["budget_points"], color="#7f7f7f", linestyle=":")
        axes.set(xlabel=label, ylabel="accuracy (%)", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.margins(x=0.12)
    _explain(key, shown, reference, lowest)
    images, thing = fields["images"], _thing(fields)
    title = (
        f"{_title(fields)}: accuracy on {images['test']} test {thing}s with 95 % intervals of the difference"
        f" to the parent\nrefused on validation: the parent's test accuracy less the loss on"
        f" {images['validation']} validation {thing}s; dotted: the budget of {fields['budget_points']:g} points"
    )
    figure.suptitle(title, parse_math=False, fontsize=10)
    FigureCanvasAgg(figure)
    files.write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None}))


def _scatter(
    axes: Axes, shown: Sequence[_Form], value: Callable[[_Form], float], reference: float, lowest: float
) -> None:
    for number, form in enumerate(shown):
        x, real = value(form), _accuracy(form, reference)
        y, colour = max(real, lowest), _COLOURS[form["status"]]
        interval = form["test"] or form["validation"]
        if interval is not None and real >= lowest:
            spread = [[interval["high"] - interval["loss"]], [interval["loss"] - interval["low"]]]
            axes.errorbar([x], [y], yerr=spread, color=colour, alpha=0.35, linewidth=1, zorder=1)
        marker = _MARKERS[form["status"]] if real >= lowest else "v"
        axes.scatter([x], [y], color=colour, marker=marker, s=36, zorder=3)
        # Forms of one size or speed lie on one another: their numbers go around the point.
        offset = ((6, 5), (6, -11), (-13, 5), (-13, -11))[number % 4]
        axes.annotate(str(number), (x, y), xytext=offset, textcoords="offset points", fontsize=8, color=colour)
    span = max(_accuracy(form, reference) for form in shown) - lowest
    axes.set_ylim(lowest - 0.08 * span, lowest + 1.12 * span)


def _explain(axes: Axes, shown: Sequence[_Form], reference: float, lowest: float) -> None:
    """Number, name and verdict of each point."""
    axes.axis("off")
    step = min(0.06, 0.98 / len(shown))
    for number, form in enumerate(shown):
        below = _accuracy(form, reference) < lowest
        text = f"{number}  {form['name']}" + (f"  ({_accuracy(form, reference):.1f} %)" if below else "")
        axes.text(0, 1 - step * number, text, color=_COLOURS[form["status"]], fontsize=9, va="top", parse_math=False)
    for row, (status, colour) in enumerate(_COLOURS.items()):
        y = 1 - step * (len(shown) + 1 + row)
        axes.text(0, y, f"■ {status}", color=colour, fontsize=9, va="top")


def _floor(shown: Sequence[_Form], reference: float, budget: float) -> float:
    """Where the accuracy axis begins: forms far below are drawn as arrows on it, or nobody could tell the others apart."""
    values = [_accuracy(form, reference) for form in shown]
    return max(min(values), min([reference - max(4 * budget, 2.0), *_kept(shown, reference)])) - 0.2


def _kept(shown: Sequence[_Form], reference: float) -> list[float]:
    return [_accuracy(form, reference) for form in shown if form["status"] == "kept"]


def _accuracy(form: _Form, reference: float) -> float:
    if form["test_accuracy"] is not None:
        return float(form["test_accuracy"])
    return reference - float(form["validation"]["loss"])


def _milliseconds(form: _Form) -> float:
    return float(form["latency"]["1"]["milliseconds"])


def _kilobytes(form: _Form) -> float:
    return float(form["size"]["weights_bytes"]) / 1000


def _title(fields: Mapping[str, Any]) -> str:
    return f"{fields['name']} {fields['version']}"


def _cells(form: _Form) -> list[str]:
    if form["size"] is None:
        return [form["name"], form["status"], *[""] * (len(COLUMNS) - 2)]
    size, test, validation = form["size"], form["test"], form["validation"]
    one, eight = form["latency"]["1"], form["latency"]["8"]
    where = f" ({_refused_by(form)})" if form["status"] == "refused" else ""
    return [
        form["name"],
        form["status"] + where,
        f"{validation['loss']:+.2f}" if validation else "",
        f"{form['test_accuracy']:.2f}" if form["test_accuracy"] is not None else "not asked",
        f"{test['loss']:+.2f} [{test['low']:+.2f}, {test['high']:+.2f}]" if test else "",
        _short(size["parameters"]),
        f"{100 * size['nonzero'] / size['parameters']:.0f}",
        _short(size["multiply_adds"]),
        f"{size['weights_bytes'] / 1000:.0f}",
        f"{size['compressed_bytes'] / 1000:.0f}",
        _milli(one["milliseconds"]),
        _milli(eight["milliseconds"]),
        f"{one['speed_up']:.2f}",
        f"{eight['speed_up']:.2f}",
    ]


def _refused_by(form: _Form) -> str:
    if form["test"] is None:
        return "validation"
    return "golden" if "golden" in form["reason"] else "test"


def _milli(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _short(number: int) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)
