"""Raw rows -> the figures that targets are set for. Pure: the same record gives the same figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.systems import PLAIN

Figure = float | None | dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Target:
    """One row of the table: what it says, what must be reached, and whether more is better."""

    key: str
    says: str
    goals: Mapping[str, float]
    """By the part's name; a figure of one number has the part ``."""
    more_is_better: bool = True
    unit: str = "x"


TARGETS = (
    Target(
        "throughput_at_32_over_limit", "throughput at 32 connections / in-process limit of the same rung", {"": 0.93}
    ),
    Target("throughput_at_8_over_limit", "the same at 8 connections", {"": 0.90}),
    Target(
        "throughput_at_32_over_torchserve",
        "throughput at 32 / stock TorchServe",
        {"as_shipped": 30.0, "one_thread_per_worker": 5.5},
    ),
    Target("throughput_at_32_over_best_documented_peer", "throughput at 32 / best peer as documented", {"": 6.0}),
    Target(
        "throughput_over_best_optimised_peer",
        "throughput / best peer with the same optimised model inside",
        {"at_1": 1.0, "at_8": 1.1, "at_32": 1.15},
    ),
    Target(
        "p50_at_1_over_one_image_in_process",
        "p50 at 1 connection / in-process time of one image on all cores",
        {"": 1.3},
        more_is_better=False,
    ),
    Target(
        "echo_requests_per_second_at_64",
        "echo model, 784-byte body: requests per second at 64 connections",
        {"": 14_000.0},
        unit="1/s",
    ),
    Target("echo_p50_ms_at_1", "echo model: p50 at 1 connection", {"": 0.6}, more_is_better=False, unit="ms"),
    Target("text_at_64_over_echo", "text model at 64 connections / echo rate", {"": 0.6}),
    Target(
        "memory_gib_of_two_workers",
        "memory of two workers (PSS, whole process tree)",
        {"": 1.2},
        more_is_better=False,
        unit="GiB",
    ),
    Target(
        "start_seconds",
        "start of the process to READY with self-test and warm-up",
        {"": 8.0},
        more_is_better=False,
        unit="s",
    ),
)


@dataclass(frozen=True, slots=True)
class Summary:
    """One system at one number of connections: medians over the rounds, and their spread."""

    rounds: int
    requests_per_second: float
    lowest: float
    highest: float
    p50_ms: float
    p99_ms: float
    failed: int
    server_cpu_ms: float | None
    client_cpu_ms: float | None
    cores_busy: float
    pss_mib: float


def summaries(record: Mapping[str, Any]) -> dict[str, dict[int, Summary]]:
    """Setup key -> connections -> summary, of the measured visits (sweeps are not among them)."""
    gathered: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for visit in finals(record):
        for row in visit["rows"]:
            gathered.setdefault(visit["setup"], {}).setdefault(row["connections"], []).append(row)
    return {key: {count: _summary(rows) for count, rows in of.items()} for key, of in gathered.items()}


def finals(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The visits that count."""
    return [visit for visit in record["visits"] if visit["phase"] == "visit"]


def equal(record: Mapping[str, Any], key: str) -> bool:
    """Whether the system gave the expected answers each time that they were checked, and was checked at all."""
    verdicts = [visit["answers"] for visit in record["visits"] if visit["setup"] == key and visit["answers"]]
    return bool(verdicts) and all(verdict["equal"] for verdict in verdicts)


def fastest_rung(record: Mapping[str, Any]) -> str | None:
    """Marina's rung with the highest median throughput at the largest number of connections."""
    found = summaries(record)
    of = {key.split("/")[2]: rows for key, rows in found.items() if key.startswith("marina/") and equal(record, key)}
    return max(of, key=lambda rung: of[rung][max(of[rung])].requests_per_second, default=None)


def figures(record: Mapping[str, Any]) -> tuple[dict[str, Figure], dict[str, str]]:
    """One entry per target, and for those that are null the reason."""
    found: dict[str, Figure] = {target.key: None for target in TARGETS}
    reasons: dict[str, str] = dict(record.get("reasons", {}))
    rung = fastest_rung(record)
    if rung is not None:
        found |= _of_marina(record, rung)
    else:
        for target in TARGETS:
            reasons.setdefault(target.key, "Marina was not measured, or gave other answers than expected")
    found |= _of_echo(record)
    for target in TARGETS:
        if _missing(found[target.key]):
            reasons.setdefault(target.key, "not measured in this run")
        else:
            reasons.pop(target.key, None)
    return found, reasons


def limits(record: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Rung -> images per second of the in-process limit, CPU ms per image, p50 ms of one image on all cores; medians."""
    rungs = dict.fromkeys(row["rung"] for row in record["limits"])
    return {
        rung: (
            _median(row["images_per_second"] for row in record["limits"] if row["rung"] == rung),
            _median(row["cpu_ms_per_image"] for row in record["limits"] if row["rung"] == rung),
            _median(row["lone_p50_ms"] for row in record["limits"] if row["rung"] == rung),
        )
        for rung in rungs
    }


def best(record: Mapping[str, Any], form: str, connections: int, rung: str) -> tuple[str, float] | None:
    """The peer with the highest median throughput among those that compute the same; its key and the throughput."""
    rates = {
        key: rows[connections].requests_per_second
        for key, rows in summaries(record).items()
        if key.split("/")[1:] == [form, rung] and connections in rows and equal(record, key)
    }
    return max(rates.items(), key=lambda item: item[1], default=None)


def _of_marina(record: Mapping[str, Any], rung: str) -> dict[str, Figure]:
    rows = summaries(record)
    key = f"marina/marina/{rung}"
    own = {count: row.requests_per_second for count, row in rows[key].items()}
    limit, _, lone = limits(record).get(rung, (None, None, None))
    visits = [visit for visit in finals(record) if visit["setup"] == key]
    documented = best(record, "documented", 32, PLAIN)
    peers = {count: best(record, "optimised", count, rung) for count in (1, 8, 32)}
    one = rows[key].get(1)

    def stock(form: str) -> float | None:
        found = rows.get(f"torchserve/{form}/{PLAIN}", {}).get(32)
        trusted = found is not None and equal(record, f"torchserve/{form}/{PLAIN}")
        return _ratio(own.get(32), found.requests_per_second if found is not None and trusted else None)

    return {
        "throughput_at_32_over_limit": _ratio(own.get(32), limit),
        "throughput_at_8_over_limit": _ratio(own.get(8), limit),
        "throughput_at_32_over_torchserve": {
            "as_shipped": stock("shipped"),
            "one_thread_per_worker": stock("one-thread"),
        },
        "throughput_at_32_over_best_documented_peer": _ratio(own.get(32), documented[1] if documented else None),
        "throughput_over_best_optimised_peer": {
            f"at_{count}": _ratio(own.get(count), peer[1] if peer else None) for count, peer in peers.items()
        },
        "p50_at_1_over_one_image_in_process": _ratio(one.p50_ms if one else None, lone),
        "memory_gib_of_two_workers": _memory(record, key),
        "start_seconds": round(_median(visit["ready_seconds"] for visit in visits), 3),
    }


def _memory(record: Mapping[str, Any], key: str) -> float | None:
    """The largest of each start, after its bursts; the median of those. Of starts with two workers, tuning included."""
    of = [visit for visit in record["visits"] if visit["setup"] == key and visit["layout"]["workers"] == 2]
    peaks = [max([visit["ready_pss_mib"], *(row["pss_mib"] for row in visit["rows"])]) for visit in of]
    return round(_median(peaks) / 1024, 3) if peaks else None


def _of_echo(record: Mapping[str, Any]) -> dict[str, Figure]:
    rates = [row["requests_per_second"] for row in record["echo"] if row["connections"] == 64]
    lone = [row["p50_ms"] for row in record["echo"] if row["connections"] == 1]
    text = [row["requests_per_second"] for row in record["text"] if row["connections"] == 64]
    rate = _median(rates) if rates else None
    return {
        "echo_requests_per_second_at_64": round(rate, 1) if rate is not None else None,
        "echo_p50_ms_at_1": round(_median(lone), 3) if lone else None,
        "text_at_64_over_echo": _ratio(_median(text) if text else None, rate),
    }


def _summary(rows: Sequence[Mapping[str, Any]]) -> Summary:
    rates = [row["requests_per_second"] for row in rows]
    return Summary(
        rounds=len(rows),
        requests_per_second=_median(rates),
        lowest=min(rates),
        highest=max(rates),
        p50_ms=_median(row["p50_ms"] for row in rows),
        p99_ms=_median(row["p99_ms"] for row in rows),
        failed=sum(row["failed"] for row in rows),
        server_cpu_ms=_median_or_none(row["server_cpu_ms"] for row in rows),
        client_cpu_ms=_median_or_none(row["client_cpu_ms"] for row in rows),
        cores_busy=_median(row["cores_busy"] for row in rows),
        pss_mib=_median(row["pss_mib"] for row in rows),
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    return round(above / below, 3) if above is not None and below else None


def _missing(figure: Figure) -> bool:
    return figure is None or (isinstance(figure, dict) and any(part is None for part in figure.values()))


def _median(values: Any) -> float:
    return float(statistics.median(values))


def _median_or_none(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return _median(known) if known else None
