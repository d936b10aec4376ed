"""The drift rules on answers drawn from what a real model said, evaluated by promtool in Prometheus' own time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from support.prometheus import MONITORING, alerts, promtool

# The digits recipe's network on its 359 test images, and on the same images inverted, blurred and with noise:
# images per bin of confidence, and per predicted class.
BASELINE = {
    "confidence": (0, 1, 2, 3, 6, 6, 38, 58, 177, 68),
    "class": (36, 36, 35, 37, 36, 36, 36, 36, 35, 36),
}
SHIFTED = {
    "inverted": {"confidence": (1, 97, 86, 53, 46, 37, 28, 8, 3, 0), "class": (68, 11, 3, 21, 29, 15, 3, 20, 31, 158)},
    "blurred": {"confidence": (0, 71, 82, 69, 75, 46, 16, 0, 0, 0), "class": (23, 5, 37, 39, 35, 16, 36, 35, 105, 28)},
    # Nine of ten of these are still answered rightly: only the confidence tells.
    "noisy": {"confidence": (0, 15, 23, 28, 28, 52, 71, 78, 50, 14), "class": BASELINE["class"]},
}
STEP = 5
"""Seconds between two scrapes, as in prometheus.yml."""


def series(
    model: str, answers_per_step: list[tuple[dict[str, tuple[int, ...]], int]], seed: int
) -> list[dict[str, str]]:
    """Counters of a model whose answers are drawn from the given distribution, so many per step; and its baseline."""
    random = np.random.default_rng(seed)
    found = []
    for distribution, counts in BASELINE.items():
        drawn = [
            random.multinomial(n, np.divide(mix[distribution], sum(mix[distribution]))) for mix, n in answers_per_step
        ]
        totals = np.cumsum([np.zeros(len(counts), int), *drawn], axis=0)
        for bin_, count in enumerate(counts):
            labels = f'model="{model}", version="1", distribution="{distribution}", bin="{bin_}"'
            found.append({"series": f"marina_answers_total{{{labels}}}", "values": " ".join(map(str, totals[:, bin_]))})
            steady = f"{count}x{len(totals)}"
            found.append({"series": f"marina_baseline_answers{{{labels}}}", "values": steady})
    return found


def arrivals(rate: float, seconds: int, seed: int) -> list[int]:
    """Requests per step at a mean of `rate` per second."""
    return [int(n) for n in np.random.default_rng(seed).poisson(rate * STEP, seconds // STEP)]


def judge(
    folder: Path, inputs: list[dict[str, str]], questions: list[dict[str, Any]], *, evaluate_every: int = STEP
) -> None:
    """Only the rules that matter here are loaded: promtool takes its time for the others."""
    (alert,) = [alert for alert in alerts() if alert["alert"] == "MarinaDrift"]
    (folder / "alert.yml").write_text(yaml.safe_dump({"groups": [{"name": "alert", "rules": [alert]}]}))
    document = {
        "rule_files": [str(MONITORING / "rules" / "drift.yml"), "alert.yml"],
        "evaluation_interval": f"{evaluate_every}s",
        "tests": [{"interval": f"{STEP}s", "input_series": inputs, "promql_expr_test": questions}],
    }
    (folder / "drift.test.yml").write_text(yaml.safe_dump(document))
    promtool("test", "rules", folder / "drift.test.yml")


def test_an_hour_of_quiet_traffic_raises_nothing(tmp_path: Path) -> None:
    """At three rates, the slowest of which has barely enough answers for one window."""
    hour = 3600
    inputs = []
    for number, rate in enumerate((0.05, 1.0, 30.0)):
        steps = [(BASELINE, n) for n in arrivals(rate, hour, seed=number)]
        inputs += series(f"m{number}", steps, seed=10 + number)
    ever = 'count_over_time(ALERTS{alertname="MarinaDrift"}[1h])'
    # The rules did run: there is a figure for both distributions of each model.
    measured = "count(count by (model, distribution) (marina:psi))"
    judge(
        tmp_path,
        inputs,
        [
            {"expr": ever, "eval_time": "1h", "exp_samples": []},
            {"expr": measured, "eval_time": "1h", "exp_samples": [{"labels": "{}", "value": 6}]},
        ],
        evaluate_every=4 * STEP,
    )


@pytest.mark.parametrize("rate", [0.5, 5.0, 30.0])
def test_a_shift_raises_the_alert_within_500_requests(tmp_path: Path, rate: float) -> None:
    before = 600
    inputs, questions = [], []
    for number, (kind, shifted) in enumerate(SHIFTED.items()):
        quiet = [(BASELINE, n) for n in arrivals(rate, before, seed=number)]
        after, sent = [], 0
        while sent < 500:
            after.append((shifted, min(500 - sent, arrivals(rate, STEP, seed=1000 * number + len(after))[0])))
            sent += after[-1][1]
        inputs += series(kind, [*quiet, *after], seed=20 + number)
        asked = f'count by (alertstate) (ALERTS{{alertname="MarinaDrift", model="{kind}", distribution="confidence"}})'
        questions += [
            {"expr": asked, "eval_time": f"{before}s", "exp_samples": []},
            {
                "expr": asked,
                "eval_time": f"{before + STEP * len(after)}s",
                "exp_samples": [{"labels": '{alertstate="firing"}', "value": 1}],
            },
        ]
    judge(tmp_path, inputs, questions)


def test_too_few_answers_raise_nothing_whatever_they_are(tmp_path: Path) -> None:
    inputs = series("m", [(SHIFTED["inverted"], 1)] * 80, seed=1)
    asked = 'count_over_time(ALERTS{alertname="MarinaDrift"}[1h])'
    judge(tmp_path, inputs, [{"expr": asked, "eval_time": f"{STEP * 80}s", "exp_samples": []}])


def test_a_model_without_baseline_has_no_index(tmp_path: Path) -> None:
    inputs = [
        line for line in series("m", [(SHIFTED["inverted"], 20)] * 50, seed=1) if "answers_total" in line["series"]
    ]
    judge(tmp_path, inputs, [{"expr": "marina:psi", "eval_time": f"{STEP * 50}s", "exp_samples": []}])
