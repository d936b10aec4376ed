"""A worker's metrics become milliseconds per answer."""

import pytest

from benchmarks import stages

pytestmark = pytest.mark.unit

BEFORE = """# TYPE marina_decode_seconds_sum gauge
marina_decode_seconds_sum{model="m",version="1.0",Hostname="h",} 1.0
marina_decode_seconds_sum{model="m",version="1.0",Hostname="g",} 2.0
marina_inference_seconds_sum{model="m"} 4.0
marina_handle_seconds_sum{model="m"} 8.0
marina_batch_size_sum{model="m"} 100.0
marina_batch_size_count{model="m"} 50.0
marina_engine{model="m",version="1.0",engine="plain",} 0.0
marina_engine{model="m",version="1.0",engine="openvino-int8",} 1.0
ts_queue_latency_microseconds{model_name="m"} 7.0
"""
AFTER = BEFORE.replace(" 2.0\n", " 3.0\n").replace(" 4.0\n", " 12.0\n").replace(" 8.0\n", " 18.0\n").replace(
    " 100.0\n", " 1100.0\n"
).replace(" 50.0\n", " 300.0\n")  # fmt: skip


def test_workers_are_added_up():
    assert stages.totals(BEFORE)["marina_decode_seconds_sum"] == 3.0
    assert "ts_queue_latency_microseconds" not in stages.totals(BEFORE)


def test_what_came_between_two_readings_is_told_per_answer():
    found = stages.between(stages.totals(BEFORE), stages.totals(AFTER))
    assert found == pytest.approx(
        {"decode": 1.0, "preprocess": 0.0, "inference": 8.0, "postprocess": 0.0, "rest": 1.0, "mean_batch": 4.0}
    )


def test_nothing_between_two_readings_is_nothing():
    assert stages.between(stages.totals(BEFORE), stages.totals(BEFORE)) is None
    assert stages.between({}, {}) is None


def test_the_engine_that_answers_is_the_one_with_a_one():
    assert stages.engine(BEFORE) == "openvino-int8"
    assert stages.engine(BEFORE.replace(" 1.0\n", " 0.0\n")) is None
    assert stages.engine("") is None
