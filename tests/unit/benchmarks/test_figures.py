"""Raw rows become the figures that targets are set for, and nothing that cannot be trusted does."""

import json

import pytest

from benchmarks import figures
from benchmarks.figures import TARGETS

pytestmark = pytest.mark.unit


def row(connections, rate, p50=10.0, pss=900.0):
    return {
        "connections": connections, "seconds": 6.0, "requests_per_second": rate, "good": round(rate * 6), "failed": 0,
        "mean_ms": p50, "p50_ms": p50, "p90_ms": p50, "p99_ms": 2 * p50, "server_cpu_ms": 7.0, "cores_busy": 1.9,
        "client_cpu_ms": 0.1, "pss_mib": pss, "rss_mib": 1200.0, "processes": 4,
    }  # fmt: skip


def visit(setup, rates, *, phase="visit", round=0, equal=True, p50=10.0, pss=900.0, workers=2, ready=6.0):
    system = setup.split("/")[0]
    return {
        "setup": setup, "title": system, "phase": phase, "round": round, "ready_seconds": ready,
        "ready_pss_mib": 800.0, "answers": {"equal": equal},
        "layout": {"workers": workers, "threads": 1, "batch": 8},
        "rows": [row(count, rate, p50, pss) for count, rate in zip((1, 8, 32), rates, strict=True)],
    }  # fmt: skip


def limit(rung, rate, lone=5.0, round=0):
    return {"rung": rung, "round": round, "images_per_second": rate, "cpu_ms_per_image": 6.0, "lone_p50_ms": lone}


def record(visits, *, limits=(), echo=(), text=()):
    return {"visits": visits, "limits": list(limits), "echo": list(echo), "text": list(text), "reasons": {}}


FULL = record(
    [
        visit("marina/marina/plain", (20, 60, 62)),
        visit("marina/marina/int8", (100, 270, 300), p50=6.0, round=0),
        visit("marina/marina/int8", (110, 280, 320), p50=6.4, round=1),
        visit("marina/marina/int8", (105, 290, 310), p50=6.2, pss=1229.0, round=2),
        visit("marina/marina/int8", (999, 999, 999), phase="sweep", workers=1),
        visit("torchserve/shipped/plain", (30, 9, 10)),
        visit("torchserve/one-thread/plain", (30, 57, 62)),
        visit("fastapi/documented/plain", (50, 53, 51.667)),
        visit("litserve/documented/plain", (38, 43, 42)),
        visit("fastapi/optimised/int8", (120, 250, 210)),
        visit("litserve/optimised/int8", (80, 200, 250)),
    ],
    limits=[limit("plain", 70, 15), limit("int8", 340), limit("int8", 320, round=1), limit("int8", 330, round=2)],
    echo=[row(1, 1500, 0.5), row(64, 14000), row(64, 15000), row(64, 14500)],
)  # fmt: skip


def test_every_figure_from_known_rows():
    found, reasons = figures.figures(FULL)
    assert found == {
        "throughput_at_32_over_limit": round(310 / 330, 3),
        "throughput_at_8_over_limit": round(280 / 330, 3),
        "throughput_at_32_over_torchserve": {"as_shipped": 31.0, "one_thread_per_worker": 5.0},
        "throughput_at_32_over_best_documented_peer": 6.0,
        "throughput_over_best_optimised_peer": {"at_1": 0.875, "at_8": 1.12, "at_32": 1.24},
        "p50_at_1_over_one_image_in_process": 1.24,
        "echo_requests_per_second_at_64": 14500.0,
        "echo_p50_ms_at_1": 0.5,
        "text_at_64_over_echo": None,
        "memory_gib_of_two_workers": round(900 / 1024, 3),
        "start_seconds": 6.0,
    }
    assert set(reasons) == {"text_at_64_over_echo"}


def test_there_is_one_figure_per_target_and_all_of_it_is_json():
    found, _ = figures.figures(FULL)
    assert list(found) == [target.key for target in TARGETS]
    assert json.loads(json.dumps(found)) == found


def test_nothing_measured_gives_null_with_a_reason_for_each():
    found, reasons = figures.figures(record([]))
    assert set(reasons) == set(found)
    assert not [key for key, value in found.items() if value not in (None, {"": None})]


def test_a_peer_that_answers_otherwise_is_no_best_peer():
    cheat = visit("bentoml/optimised/int8", (500, 500, 500), equal=False)
    found, _ = figures.figures(FULL | {"visits": [*FULL["visits"], cheat]})
    assert found["throughput_over_best_optimised_peer"] == {"at_1": 0.875, "at_8": 1.12, "at_32": 1.24}


def test_one_wrong_round_spoils_a_system():
    spoilt = visit("fastapi/optimised/int8", (120, 250, 210), equal=False, round=1)
    found, _ = figures.figures(FULL | {"visits": [*FULL["visits"], spoilt]})
    assert found["throughput_over_best_optimised_peer"]["at_1"] == round(105 / 80, 3)


def test_marina_itself_counts_only_with_the_right_answers():
    visits = [one | {"answers": {"equal": False}} if "marina/" in one["setup"] else one for one in FULL["visits"]]
    found, reasons = figures.figures(FULL | {"visits": visits})
    assert found["throughput_at_32_over_limit"] is None
    assert "other answers" in reasons["throughput_at_32_over_limit"]


def test_peers_with_another_rung_inside_are_not_compared():
    found, reasons = figures.figures(
        FULL | {"visits": [one for one in FULL["visits"] if "optimised" not in one["setup"]]}
    )
    assert found["throughput_over_best_optimised_peer"] == {"at_1": None, "at_8": None, "at_32": None}
    assert "throughput_over_best_optimised_peer" in reasons


def test_memory_is_of_two_workers_or_of_nothing():
    visits = [one | {"layout": {"workers": 1, "threads": 2, "batch": 8}} for one in FULL["visits"]]
    found, reasons = figures.figures(FULL | {"visits": visits})
    assert found["memory_gib_of_two_workers"] is None
    assert "memory_gib_of_two_workers" in reasons


def test_a_summary_has_median_and_spread_over_the_rounds_without_the_sweep():
    summary = figures.summaries(FULL)["marina/marina/int8"][32]
    assert (summary.rounds, summary.requests_per_second, summary.lowest, summary.highest) == (3, 310, 300, 320)


def test_the_text_row_is_a_share_of_the_echo_rate():
    found, reasons = figures.figures(FULL | {"text": [row(1, 900), row(64, 9000)]})
    assert found["text_at_64_over_echo"] == round(9000 / 14500, 3)
    assert not reasons
