"""The README's tables say what the results file says."""

import json
from pathlib import Path

import pytest

from benchmarks import figures, report
from benchmarks.errors import BenchmarkError

pytestmark = pytest.mark.unit

README = (
    "# Title\n\ntyped\n\n<!-- cpu:begin -->\nold\n<!-- cpu:end -->\n\nmore\n<!-- cuda:begin -->\n<!-- cuda:end -->\n"
)


def row(connections, rate):
    return {
        "connections": connections, "requests_per_second": rate, "failed": 0, "p50_ms": 10.0, "p99_ms": 20.0,
        "server_cpu_ms": 7.0, "cores_busy": 1.9, "client_cpu_ms": 0.1, "pss_mib": 900.0,
        "stages": {"decode": 1.25, "preprocess": 0.5, "inference": 8.0, "postprocess": 0.05, "rest": 0.1, "mean_batch": 3.5},
    }  # fmt: skip


def visit(setup, title, rates, phase="visit", batch=8):
    verdict = {"equal": True, "same_label": 64, "photos": 64, "refused": 0, "worst": 1e-4}
    return {
        "setup": setup, "title": title, "phase": phase, "round": 0, "ready_seconds": 5.0, "ready_pss_mib": 800.0,
        "answers": verdict, "layout": {"workers": 2, "threads": 1, "batch": batch},
        "rows": [row(count, rate) for count, rate in zip((1, 8, 32), rates, strict=True)],
    }  # fmt: skip


@pytest.fixture
def record():
    found = {
        "identity": {"device": "cpu"},
        "visits": [
            visit("marina/marina/plain", "Marina, plain", (20, 60, 62)),
            visit("marina/marina/plain", "Marina, plain", (21, 61, 40), "sweep", 4),
            visit("litserve/optimised/plain", "LitServe with Marina's model", (18, 50, 51.25)),
        ],
        "limits": [{"rung": "plain", "images_per_second": 70.0, "cpu_ms_per_image": 28.0, "lone_p50_ms": 9.0}],
        "echo": [], "text": [], "reasons": {}, "partial": True, "date": "2026-01-31", "profile": "quick",
        "layouts": {"marina/marina": {"workers": 2, "threads": 1, "batch": 4}},
        "unavailable": {"pytriton/documented/plain": "its stub needs Python 3.11.2\nfound none"},
        "versions": {"litserve:litserve": "0.2.19"}, "package_versions": {"torch": "2.14.1"}, "busy_cores_before": 0.0,
        "machine": {"processor": "a CPU", "family": "25.1", "features": ["avx2"], "cores": 2, "memory_gib": 24.0,
                    "gpus": [], "system": "Linux", "python": "3.11.7"},
        "rungs_against_plain": {"openvino-int8": {"same_label": 60, "photos": 64, "worst": 0.125}},
        "photos": {"count": 64, "mean_bytes": 113_168, "grey": 2},
        "model": {"artifact": "m 1.0", "architecture": {"name": "resnet18", "height": 224}, "rungs": {
            "openvino-int8": {"accuracy": {"images": 2000, "plain": 0.9, "engine": 0.899, "loss_points": 0.1}}}},
        "growth": {
            "image": [{"value": 250, "images_per_second": 100.0, "p50_ms": 9.0, "memory_mib": 500.0}],
            "model": [{"value": "resnet18", "images_per_second": 70.0, "p50_ms": 14.0, "memory_mib": 510.0,
                       "parameters": 11_000_000}],
        },
    }  # fmt: skip
    found["figures"], found["reasons"] = figures.figures(found)
    return found


def test_what_stands_outside_the_markers_is_kept():
    text = report.between(README, "cpu", "new")
    assert text.startswith("# Title\n\ntyped\n")
    assert "new" in text and "old" not in text
    assert text.endswith("more\n<!-- cuda:begin -->\n<!-- cuda:end -->\n")


def test_writing_twice_changes_nothing():
    once = report.between(README, "cpu", "body")
    assert report.between(once, "cpu", "body") == once


@pytest.mark.parametrize("text", ["no markers", "<!-- cpu:end --><!-- cpu:begin -->", README + "<!-- cpu:end -->"])
def test_missing_or_doubled_markers_are_refused(text):
    with pytest.raises(BenchmarkError, match="cpu:begin"):
        report.between(text, "cpu", "body")


def test_each_number_of_the_targets_has_a_row_with_its_verdict(record):
    rows = {name: (goal, measured) for name, goal, measured in report.figure_rows(record)}
    assert len(rows) == sum(len(target.goals) for target in figures.TARGETS)
    assert rows["throughput at 32 connections / in-process limit of the same rung"] == ("0.93x", "0.886x ✗")
    assert rows["throughput / best peer with the same optimised model inside: at 32"] == ("1.15x", "1.21x ✓")
    assert rows["memory of two workers (PSS, whole process tree)"] == ("1.2 GiB", "0.879 GiB ✓")
    assert rows["echo model: p50 at 1 connection"] == ("0.6 ms", "not measured")


def test_the_text_row_says_with_which_layout(record):
    record["text"] = [{"connections": 64, "layout": {"workers": 1, "threads": 2, "batch": 64}}]
    names = [name for name, _, _ in report.figure_rows(record)]
    assert "text model at 64 connections / echo rate (1x2, batch 64)" in names


def test_the_document_holds_every_system_and_every_absence(record):
    text = "\n\n".join(report.sections(record))
    assert "| Marina, plain | 32 | 62.0 (62.0 to 62.0; 1) |" in text
    assert "`pytriton/documented/plain`: its stub needs Python 3.11.2 found none" in text
    assert "**partial" in text
    assert "| Marina, plain | 8 | 1.25 | 0.50 | 8.00 | 0.05 | 0.10 | 0.00 | 3.50 |" in text
    assert "**21 / 61 / 40**" in text
    assert (
        "| openvino-int8 | 2000 | 0.9000 | 0.8990 | 0.10 | 60 of 64 the same label, largest difference 0.12 |" in text
    )


def test_a_run_beside_other_programs_says_so(record):
    assert "do not hold" not in report.sections(record)[0]
    assert "do not hold" in report.sections(record | {"busy_cores_before": 1.2})[0]


def test_tables_and_plots_are_written_from_the_file(record, tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results" / "cpu.json"
    results.parent.mkdir()
    readme.write_text(README)
    results.write_text(json.dumps(record))
    report.write(results, readme)
    text = readme.read_text()
    for name in ("throughput", "latency", "growth"):
        assert f"(results/cpu-{name}.png)" in text
        assert (results.parent / f"cpu-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_results_file_may_be_named_from_where_one_stands(record, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    report.write(Path("results/cpu.json"), tmp_path / "README.md")
    assert "](results/cpu-throughput.png)" in (tmp_path / "README.md").read_text()
