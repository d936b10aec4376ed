"""What a worker counts and sends, through TorchServe's own metrics cache with the repository's metrics.yaml."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from handlerlib import drift, telemetry
from handlerlib.drift import Bins
from handlerlib.errors import InferenceFailed, RequestError, SpecError, UnsupportedMedia
from handlerlib.spec import Baseline, ModelSpec
from marina.java import METRICS_CONFIG
from support.artifacts import write_artifact

# TorchServe leaves metrics.yaml open.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
# java's own, from org.pytorch.serve.metrics.Metric.
JAVA_LINE = re.compile(
    r"\s*([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)(\|#type:([^|,]+))?\|#hostname:([^,]+),([^,]+)(,(.*))?"
)
PROMETHEUS_TYPES = {"COUNTER": "counter", "GAUGE": "gauge"}


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return ModelSpec.load(write_artifact(tmp_path))


@pytest.fixture
def cache() -> MetricsCacheYamlImpl:
    made = MetricsCacheYamlImpl(str(METRICS_CONFIG))
    made.initialize_cache()
    return made


@pytest.fixture
def sent(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """Everything sent since the last call: {(name, labels): value}, read as java does."""
    caplog.set_level(logging.INFO)
    seen = 0

    def read() -> dict[tuple[str, tuple[str, ...]], float]:
        nonlocal seen
        found: dict[tuple[str, tuple[str, ...]], float] = {}
        new = caplog.messages[seen:]
        seen += len(new)
        for message in new:
            if not message.startswith("[METRICS]"):
                continue
            match = JAVA_LINE.fullmatch(message.removeprefix("[METRICS]"))
            assert match, message
            pairs = [part.split(":") for part in match[4].split(",")]
            assert all(len(pair) == 2 for pair in pairs), message
            declared = _declared()[match[1]]
            assert (PROMETHEUS_TYPES[match[6]], [pair[0] for pair in pairs]) == declared, message
            key = (match[1], tuple(pair[1] for pair in pairs[2:]))
            found[key] = found.get(key, 0) + float(match[3])
        return found

    yield read


def _declared() -> dict[str, tuple[str, list[str]]]:
    document = yaml.safe_load(Path(METRICS_CONFIG).read_text())["model_metrics"]
    return {metric["name"]: (kind, metric["dimensions"]) for kind, metrics in document.items() for metric in metrics}


def with_baseline(spec: ModelSpec, *answers: tuple[int, float]) -> ModelSpec:
    return dataclasses.replace(spec, baseline=drift.measure(answers, len(spec.labels)))


def test_counters_begin_at_zero_and_the_baseline_is_told(spec: ModelSpec, cache: Any, sent: Any) -> None:
    telemetry.Reporter(with_baseline(spec, (0, 0.995), (0, 0.45), (2, 0.995)), cache)
    found = sent()
    assert found["marina_baseline_answers", ("confidence", "0.99-1")] == 2
    assert found["marina_baseline_answers", ("class", "blue")] == 2
    assert found["marina_baseline_answers", ("class", "green")] == 0
    assert {key: value for key, value in found.items() if key[0] != "marina_baseline_answers" and value} == {}
    for outcome in ("ok", "inference-failed", "out-of-memory", "malformed-request"):
        assert ("marina_requests_total", (outcome,)) in found
    assert {key[1][1] for key in found if key[0] == "marina_answers_total" and key[1][0] == "class"} == {*spec.labels}


def test_a_batch_is_added_up(spec: ModelSpec, cache: Any, sent: Any) -> None:
    reporter = telemetry.Reporter(spec, cache)
    sent()
    stopwatch = telemetry.Stopwatch()
    stopwatch.seconds |= {"decode": 0.003, "inference": 0.02}
    answers = [(1, 0.9), (0, 0.5)]
    outcomes = ["ok", "unsupported-media-type", "ok"]
    reporter.record(stopwatch, arrivals=[stopwatch.began - 0.3, None, None], outcomes=outcomes, answers=answers)
    found: dict[Any, float] = {}
    deadline = time.monotonic() + 10
    while ("marina_batch_size_sum", ()) not in found:  # the last one that is sent
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
        found |= sent()
    assert found["marina_requests_total", ("ok",)] == 2
    assert found["marina_requests_total", ("unsupported-media-type",)] == 1
    assert found["marina_answers_total", ("confidence", "0.9-0.95")] == 1  # an edge belongs to the bin above it
    assert found["marina_answers_total", ("confidence", "0.5-0.6")] == 1
    assert found["marina_answers_total", ("class", "green")] == 1
    assert found["marina_batch_size_sum", ()] == 2
    assert ("marina_decode_seconds_bucket", ("0.0025",)) not in found
    assert found["marina_decode_seconds_bucket", ("0.005",)] == found["marina_decode_seconds_bucket", ("+Inf",)] == 1
    assert found["marina_inference_seconds_sum", ()] == pytest.approx(0.02)
    assert found["marina_queue_seconds_count", ()] == 1
    assert found["marina_queue_seconds_sum", ()] == pytest.approx(0.3)
    assert found["marina_request_seconds_count", ()] == 3
    reporter.flush()
    assert sent() == {}


def test_a_server_with_other_metrics_serves_without_them(spec: ModelSpec, tmp_path: Path, sent: Any) -> None:
    file = tmp_path / "metrics.yaml"
    file.write_text("model_metrics: {gauge: [{name: HandlerTime, unit: ms, dimensions: [Level]}]}")
    other = MetricsCacheYamlImpl(str(file))
    other.initialize_cache()
    reporter = telemetry.Reporter(spec, other)
    reporter.record(telemetry.Stopwatch(), arrivals=[None], outcomes=["ok"], answers=[(0, 1.0)])
    assert sent() == {}


def test_a_figure_that_breaks_does_not_hurt(spec: ModelSpec, cache: Any, caplog: pytest.LogCaptureFixture) -> None:
    reporter = telemetry.Reporter(spec, cache)
    reporter.record(telemetry.Stopwatch(), arrivals=[None], outcomes=["ok"], answers=[(99, 1.0)])
    assert "figures of a batch were lost" in caplog.text


@pytest.mark.parametrize(
    ("text", "seconds_ago"),
    [("t={:.0f}", 2.0), ("{:.0f}", None), ("t=-{:.0f}", None), ("t={:.0f}0", None), ("t=1", None), ("", None)],
)
def test_arrival_header(text: str, seconds_ago: float | None) -> None:
    now = time.time()
    found = telemetry.arrival({"x-request-start": text.format((now - 2) * 1e6)})
    assert found == (None if seconds_ago is None else pytest.approx(now - seconds_ago, abs=1e-3))
    assert telemetry.arrival({"x-request-start": f"t={(now - 7200) * 1e6:.0f}"}) is None
    assert telemetry.arrival({}) is None


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "0af7651916cd43dd8448eb211c80319c"),
        ("00-00000000000000000000000000000000-b7ad6b7169203331-01", None),
        ('00-0af7651916cd43dd8448eb211c80319c"-b7ad6b7169203331-01', None),
        ("", None),
    ],
)
def test_trace_id(header: str, expected: str | None) -> None:
    assert telemetry.trace_id({"traceparent": header}) == expected


def test_a_failure_is_one_line_with_its_cause(spec: ModelSpec, capsys: pytest.CaptureFixture[str]) -> None:
    error = InferenceFailed("the model failed on this input")
    error.__cause__ = ValueError('line one\nline "two"')
    telemetry.log_failure(error, request_id="r-1", trace_id=None, spec=spec)
    (text,) = capsys.readouterr().err.splitlines()
    line = json.loads(text)
    assert (line["request_id"], line["trace_id"], line["status"]) == ("r-1", None, 500)
    assert line["exception"] == 'ValueError: line one\nline "two"\n'


def test_outcome_is_the_first_error() -> None:
    assert telemetry.outcome([[0.1], UnsupportedMedia("x"), InferenceFailed("y")]) == "unsupported-media-type"
    assert telemetry.outcome([[0.1], [0.2]]) == "ok"
    codes = {error.code for error in RequestError.__subclasses__()}
    assert {"ok", *codes} == set(telemetry.OUTCOMES)


def test_labels_that_would_break_a_line_are_named_by_their_index() -> None:
    bins = Bins.of(["plain label", "a,b", "a|b", "a:b", "Äpfel", "line\nbreak", ""], None)
    assert bins.classes == ("plain label", "#1", "#2", "#3", "#4", "#5", "#6")


def test_at_most_a_hundred_bins_of_classes_and_the_frequent_ones_keep_theirs() -> None:
    labels = [f"l{index}" for index in range(1000)]
    baseline = drift.measure([(999, 0.5)] * 3 + [(500, 0.5)] * 2, len(labels))
    bins = Bins.of(labels, baseline)
    names = bins.names()["class"]
    assert len(names) == drift.MOST_BINS
    assert {"l999", "l500", drift.OTHER} <= {*names}
    assert bins.expected(baseline)["class", drift.OTHER] == 0
    assert sum(count for (kind, _), count in bins.expected(baseline).items() if kind == "class") == 5


def test_baseline_survives_the_spec_and_is_checked(spec: ModelSpec) -> None:
    complete = with_baseline(spec, (0, 0.7), (1, 1.0), (1, 0.0))
    assert ModelSpec.from_json(complete.to_json()) == complete
    assert ModelSpec.from_json(spec.to_json()).baseline is None
    edges = (0.5,)
    for wrong in (
        {"confidence_edges": (0.5, 0.5), "confidence": (1, 1, 1), "classes": (3, 0, 0)},
        {"confidence_edges": edges, "confidence": (1, 1, 1), "classes": (3, 0, 0)},
        {"confidence_edges": edges, "confidence": (1, 1), "classes": (3, 0, 0)},
        {"confidence_edges": edges, "confidence": (-1, 1), "classes": (0, 0, 0)},
    ):
        with pytest.raises(SpecError, match="baseline"):
            Baseline(**wrong)  # type: ignore[arg-type]
    text = complete.to_json().replace('"classes": [\n      1,', '"classes": [\n      0,\n      1,', 1)
    with pytest.raises(SpecError, match=r"baseline\.classes must be one per label"):
        ModelSpec.from_json(text)
