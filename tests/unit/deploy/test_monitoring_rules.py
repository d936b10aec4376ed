"""Prometheus' own tool judges configuration and rules; every alert has its test, its runbook section and its words."""

from __future__ import annotations

import re
from typing import Any

import pytest

from support import prometheus
from support.prometheus import MONITORING, RULES, alerts, load, promtool

TESTS = MONITORING / "tests" / "alerts.test.yml"


def test_configuration_is_accepted() -> None:
    promtool("check", "config", "--lint=all", "--lint-fatal", MONITORING / "prometheus.yml")


def test_rules_are_accepted() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES)


def test_alerts_fire_on_their_fault_and_are_silent_without() -> None:
    promtool("test", "rules", TESTS)


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: str(alert["alert"]))
def test_alert_is_complete(alert: dict[str, Any]) -> None:
    name, words = alert["alert"], alert["annotations"]
    assert set(words) == {"summary", "description", "runbook"}
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert words["runbook"].startswith(f"runbook.md#{name.lower()}: ")
    assert "\n" not in words["runbook"]
    assert f"\n## {name}\n" in (MONITORING / "runbook.md").read_text()


def test_every_alert_is_expected_to_fire_in_a_test() -> None:
    asked = [asked for test in load(TESTS)["tests"] for asked in test["promql_expr_test"] if asked["exp_samples"]]
    firing = " ".join(one["expr"] + sample["labels"] for one in asked for sample in one["exp_samples"])
    elsewhere = {"MarinaDrift"}  # test_monitoring_drift.py, with sampled answers
    assert [alert["alert"] for alert in alerts() if alert["alert"] not in firing] == [*elsewhere]


def test_runbook_has_no_section_without_alert() -> None:
    sections = re.findall(r"^## (\w+)$", (MONITORING / "runbook.md").read_text(), re.MULTILINE)
    assert sections == [alert["alert"] for alert in alerts()]


def test_times_are_made_shorter_and_nothing_else() -> None:
    text = 'interval: 1m\n    for: 30s\n  {window: 5m}, expr: rate(x{le="0.5"}[5m]) > 14.4\n  keep_firing_for: 2h'
    expected = text.replace("interval: 1m", "interval: 1000ms").replace("for: 30s", "for: 500ms")
    expected = expected.replace("[5m]", "[5000ms]").replace("for: 2h", "for: 120000ms")
    assert prometheus.quickened(text, 60) == expected
