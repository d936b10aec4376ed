"""A results file -> the tables and plots of `benchmarks/README.md`. No number in that file is typed by hand."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks import figures
from benchmarks.errors import BenchmarkError
from benchmarks.figures import TARGETS, Figure, Summary, Target
from benchmarks.systems import PLAIN, Layout

README = Path(__file__).with_name("README.md")
_COLOURS = {"marina": "#1b6ca8", "torchserve": "#b23a48", "optimised": "#6a994e", "documented": "#bc9c5a"}


def write(results: Path, readme: Path = README) -> None:
    """Replace what stands between the markers of this device, and draw its plots beside the results file."""
    results, readme = results.resolve(), readme.resolve()
    record = json.loads(results.read_text(encoding="utf-8"))
    device = record["identity"]["device"]
    plots = draw(record, results.parent, device)
    text = readme.read_text(encoding="utf-8")
    images = [f"![{title}]({path.relative_to(readme.parent)})" for title, path in plots.items()]
    body = "\n\n".join((*sections(record), *images))
    readme.write_text(between(text, device, body), encoding="utf-8")


def between(text: str, device: str, body: str) -> str:
    """`text` with `body` between its markers `<!-- DEVICE:begin -->` and `<!-- DEVICE:end -->`."""
    begin, end = f"<!-- {device}:begin -->", f"<!-- {device}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise BenchmarkError(f"README.md lacks the markers {begin} and {end}", remedy="put them back, each once")
    return f"{text.partition(begin)[0]}{begin}\n\n{body}\n\n{end}{text.partition(end)[2]}"


def sections(record: Mapping[str, Any]) -> list[str]:
    """The Markdown blocks, in order."""
    return [
        block
        for block in (
            _conditions(record),
            "### Figures\n\n" + table(("figure", "must reach", "measured"), figure_rows(record)),
            _missing(record),
            "### Every system\n\n" + _every_system(record),
            "### The limit without a server\n\n" + _limit_table(record),
            _stage_table(record),
            _answer_table(record),
            _layout_table(record),
            _absent(record),
            _growth_tables(record),
        )
        if block
    ]


def figure_rows(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """One row per number of the targets."""
    found: Mapping[str, Figure] = record["figures"]
    rows = []
    for target in TARGETS:
        for part, goal in target.goals.items():
            value = found[target.key]
            number = value.get(part) if isinstance(value, dict) else value
            name = f"{target.says}: {part.replace('_', ' ')}" if part else target.says
            if target.key == "text_at_64_over_echo":
                name += _text_layout(record)
            rows.append((name, _number(goal, target.unit), _judged(number, goal, target)))
    return rows


def _text_layout(record: Mapping[str, Any]) -> str:
    """` (1x2, batch 64)`; nothing for a record that does not say."""
    return next((f" ({Layout(**row['layout'])})" for row in record.get("text", ()) if "layout" in row), "")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; cells are made text as they are."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def draw(record: Mapping[str, Any], folder: Path, device: str) -> dict[str, Path]:
    """The plots, by title."""
    found = {}
    rows = figures.summaries(record)
    if rows:
        found["Throughput of every system"] = _draw_throughput(record, rows, folder / f"{device}-throughput.png")
        found["Latency against throughput"] = _draw_latency(record, rows, folder / f"{device}-latency.png")
    if record["growth"]:
        found["How cost grows"] = _draw_growth(record["growth"], folder / f"{device}-growth.png")
    return found


def _judged(value: float | None, goal: float, target: Target) -> str:
    if value is None:
        return "not measured"
    reached = value >= goal if target.more_is_better else value <= goal
    return f"{_number(value, target.unit)} {'✓' if reached else '✗'}"


def _number(value: float, unit: str) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text}x" if unit == "x" else f"{text} {unit}"


def _conditions(record: Mapping[str, Any]) -> str:
    machine, photos, model = record["machine"], record["photos"], record["model"]
    processor = f"{machine['processor']} (family {machine['family']}; {', '.join(machine['features']) or 'no AVX'})"
    gpus = f", {', '.join(machine['gpus'])}" if machine["gpus"] else ""
    versions = record["package_versions"] | record["versions"]
    lines = [
        f"Measured on {record['date']}, profile `{record['profile']}`"
        + (", **partial: not everything was measured**" if record["partial"] else "")
        + f". {machine['cores']} cores of {processor}, {machine['memory_gib']} GiB{gpus}; "
        f"{machine['system']}, Python {machine['python']}.",
        f"Model {model['artifact']} ({model['architecture']['name']} at {model['architecture']['height']} px); "
        f"{photos['count']} photos, mean {photos['mean_bytes'] / 1e3:.0f} kB, {photos['grey']} of them grey.",
        "Versions: "
        + ", ".join(f"{name.partition(':')[2] or name} {version}" for name, version in versions.items())
        + ".",
    ]
    if record["busy_cores_before"] > 0.3:
        lines.append(f"**Other programs kept {record['busy_cores_before']} cores busy: these figures do not hold.**")
    return "\n".join(lines)


def _missing(record: Mapping[str, Any]) -> str:
    keys = [target.key for target in TARGETS if target.key in record["reasons"]]
    says = {target.key: target.says for target in TARGETS}
    return "\n".join(f"- {says[key]}: {record['reasons'][key]}" for key in keys)


def _every_system(record: Mapping[str, Any]) -> str:
    rows = []
    for key, of in _ordered(figures.summaries(record)):
        for connections, row in sorted(of.items()):
            spread = f"{row.requests_per_second:.1f} ({row.lowest:.1f} to {row.highest:.1f}; {row.rounds})"
            cpu = "" if row.server_cpu_ms is None else f"{row.server_cpu_ms:.2f}"
            rows.append(
                (
                    _title(record, key), connections, spread, f"{row.p50_ms:.1f}", f"{row.p99_ms:.1f}", row.failed, cpu,
                    f"{row.cores_busy:.2f}", f"{row.pss_mib:.0f}",
                )
            )  # fmt: skip
    columns = (
        "system", "connections", "good answers per second (range; rounds)", "p50 ms", "p99 ms", "failed",
        "CPU ms per answer", "cores busy", "PSS MiB",
    )  # fmt: skip
    return table(columns, rows)


def _limit_table(record: Mapping[str, Any]) -> str:
    rows = [
        (rung, f"{rate:.1f}", f"{cpu:.2f}", f"{lone:.2f}") for rung, (rate, cpu, lone) in figures.limits(record).items()
    ]
    columns = ("rung", "images per second, one process per core", "CPU ms per image", "one image on all cores, ms")
    return table(columns, rows)


def _stage_table(record: Mapping[str, Any]) -> str:
    names = ("decode", "preprocess", "inference", "postprocess", "rest", "queue", "mean_batch")
    rows = []
    for key in dict.fromkeys(visit["setup"] for visit in figures.finals(record)):
        found: dict[int, list[Mapping[str, float]]] = {}
        for visit in figures.finals(record):
            for row in visit["rows"] if visit["setup"] == key else ():
                if row.get("stages"):
                    found.setdefault(row["connections"], []).append(row["stages"])
        for connections, of in sorted(found.items()):
            medians = (statistics.median(one.get(name, 0.0) for one in of) for name in names)
            rows.append((_title(record, key), connections, *(f"{value:.2f}" for value in medians)))
    if not rows:
        return ""
    head = (
        "### Where the time of Marina's workers goes\n\nMilliseconds per answer, from the workers' own metrics; `queue` is "
        "how long a request waited in java.\n\n"
    )
    return head + table(("system", "connections", *names[:-1], "mean batch"), rows)


def _answer_table(record: Mapping[str, Any]) -> str:
    worst: dict[str, Mapping[str, Any]] = {}
    for visit in figures.finals(record):
        verdict = visit["answers"]
        if verdict and (visit["setup"] not in worst or verdict["worst"] > worst[visit["setup"]]["worst"]):
            worst[visit["setup"]] = verdict
    rows = [
        (
            _title(record, key),
            "yes" if verdict["equal"] else "**no**",
            f"{verdict['same_label']} of {verdict['photos']}",
            verdict["refused"],
            f"{verdict['worst']:.1e}",
        )
        for key, verdict in worst.items()
    ]
    columns = ("system", "equal", "same first label", "photos refused", "largest difference of a probability")
    head = (
        "### Are the answers the same?\n\nEvery photo, before the clock runs, against the same rung in a process without "
        "a server. A system that answers otherwise is in no figure.\n\n"
    )
    return head + table(columns, rows) + _rung_accuracy(record)


def _rung_accuracy(record: Mapping[str, Any]) -> str:
    """What each rung loses on the test images, and how it answers the photos beside the plain weights."""
    rows = []
    for rung, item in record["model"]["rungs"].items():
        accuracy, photos = item.get("accuracy"), record["rungs_against_plain"].get(rung)
        if "reason" in item:
            rows.append((rung, f"takes no part: {item['reason']}", "", "", "", ""))
        elif accuracy and photos:
            test = (accuracy["images"], f"{accuracy['plain']:.4f}", f"{accuracy['engine']:.4f}")
            rows.append((rung, *test, f"{accuracy['loss_points']:.2f}", _photos_against_plain(photos)))
    columns = ("rung", "test images", "accuracy, plain", "accuracy, rung", "points lost", "the photos, against plain")
    return "\n\n" + table(columns, rows) if rows else ""


def _photos_against_plain(verdict: Mapping[str, Any]) -> str:
    return f"{verdict['same_label']} of {verdict['photos']} the same label, largest difference {verdict['worst']:.2f}"


def _layout_table(record: Mapping[str, Any]) -> str:
    tried: dict[str, dict[str, Sequence[float]]] = {}
    titles = {}
    for visit in record["visits"]:
        if visit["phase"] == "sweep":
            layout = "{workers}x{threads}, batch {batch}".format(**visit["layout"])
            tried.setdefault(visit["setup"], {})[layout] = [row["requests_per_second"] for row in visit["rows"]]
            titles[visit["setup"]] = visit["title"]
    if not tried:
        return ""
    layouts = list(dict.fromkeys(layout for of in tried.values() for layout in of))
    rows = []
    for key, of in tried.items():
        chosen = record["layouts"].get("/".join(key.split("/")[:2]))
        taken = "{workers}x{threads}, batch {batch}".format(**chosen) if chosen else ""
        cells = [" / ".join(f"{rate:.0f}" for rate in of[layout]) if layout in of else "-" for layout in layouts]
        rows.append(
            (
                titles[key],
                *(f"**{cell}**" if layout == taken else cell for cell, layout in zip(cells, layouts, strict=True)),
            )
        )
    head = (
        "### The tuning that each contender got\n\nAnswers per second at 1 / 8 / 32 connections for each layout (workers x "
        "threads, largest batch); the same layouts for the same time. The bold one, with the highest product of the "
        "three, is the one measured above.\n\n"
    )
    return head + table(("system", *layouts), rows)


def _absent(record: Mapping[str, Any]) -> str:
    absent = record["unavailable"]
    if not absent:
        return ""
    return "### Not measured\n\n" + "\n".join(
        f"- `{key}`: {' '.join(reason.split())}" for key, reason in absent.items()
    )


def _growth_tables(record: Mapping[str, Any]) -> str:
    if not record["growth"]:
        return ""
    says = {
        "image": "longer side of the photo, px",
        "batch": "photos in a batch",
        "workers": "workers of the server",
        "model": "network (plain float32, untrained)",
    }
    blocks = []
    for name, points in record["growth"].items():
        rows = [
            (
                point["value"],
                f"{point['images_per_second']:.1f}",
                f"{point['p50_ms']:.1f}",
                f"{point['memory_mib']:.0f}",
            )
            for point in points
        ]
        blocks.append(table((says[name], "images per second", "p50 ms", "memory MiB"), rows))
    return "### How cost grows\n\n" + "\n\n".join(blocks)


def _ordered(rows: Mapping[str, Mapping[int, Summary]]) -> list[tuple[str, Mapping[int, Summary]]]:
    """Fastest first, by the throughput at the most connections."""
    return sorted(rows.items(), key=lambda item: -item[1][max(item[1])].requests_per_second)


def _title(record: Mapping[str, Any], key: str) -> str:
    return next(str(visit["title"]) for visit in record["visits"] if visit["setup"] == key)


def _colour(key: str) -> str:
    system, form, _ = key.split("/")
    return _COLOURS.get(system) or _COLOURS[form]


def _draw_throughput(record: Mapping[str, Any], rows: Mapping[str, Mapping[int, Summary]], path: Path) -> Path:
    ordered = list(reversed(_ordered(rows)))
    counts = sorted({count for of in rows.values() for count in of})
    figure, axes = pyplot.subplots(1, len(counts), figsize=(5 * len(counts), 0.36 * len(ordered) + 1.4), sharey=True)
    limit = figures.limits(record)
    for axis, count in zip([axes] if len(counts) == 1 else list(axes), counts, strict=True):
        for position, (key, of) in enumerate(ordered):
            if count in of:
                row = of[count]
                error = [[row.requests_per_second - row.lowest], [row.highest - row.requests_per_second]]
                axis.barh(
                    position, row.requests_per_second, xerr=error, color=_colour(key), ecolor="#444444", capsize=2
                )
        for rung, (rate, _, _) in limit.items():
            axis.axvline(rate, color="#888888", linestyle=":" if rung == PLAIN else "--", linewidth=1)
        axis.set_title(f"{count} connection{'s' if count > 1 else ''}")
        axis.set_xlabel("good answers per second")
        axis.set_yticks(range(len(ordered)), [_title(record, key) for key, _ in ordered])
    figure.suptitle("Throughput, median and range; grey lines: the limit without a server, per rung", fontsize=10)
    return _save(figure, path)


def _draw_latency(record: Mapping[str, Any], rows: Mapping[str, Mapping[int, Summary]], path: Path) -> Path:
    figure, axis = pyplot.subplots(figsize=(8, 5.5))
    for key, of in _ordered(rows):
        points = sorted(of.values(), key=lambda row: row.p50_ms)
        style = "-" if key.startswith("marina/") else "--"
        axis.plot(
            [row.requests_per_second for row in points], [row.p99_ms for row in points], style, marker="o",
            markersize=3, linewidth=1, color=_colour(key), label=_title(record, key),
        )  # fmt: skip
    axis.set_yscale("log")
    axis.set_xlabel("good answers per second")
    axis.set_ylabel("p99, ms")
    axis.set_title("Latency against throughput at 1, 8 and 32 connections")
    axis.legend(fontsize=6, ncols=2)
    return _save(figure, path)


def _draw_growth(growth: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    figure, axes = pyplot.subplots(3, len(growth), figsize=(4 * len(growth), 8), squeeze=False)
    names = {"image": "longer side, px", "batch": "batch size", "workers": "workers", "model": "parameters, millions"}
    for column, (curve, points) in enumerate(growth.items()):
        across = [point["parameters"] / 1e6 if curve == "model" else point["value"] for point in points]
        for line, (what, label) in enumerate(
            (("images_per_second", "images per second"), ("p50_ms", "p50, ms"), ("memory_mib", "memory, MiB"))
        ):
            axis = axes[line][column]
            order = sorted(range(len(points)), key=lambda index: across[index])
            axis.plot([across[i] for i in order], [points[i][what] for i in order], "o-", color=_COLOURS["marina"])
            axis.set_ylim(bottom=0)
            axis.set_ylabel(label if column == 0 else "")
            if line == 2:
                axis.set_xlabel(names[curve])
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": ""})
    pyplot.close(figure)
    return path
