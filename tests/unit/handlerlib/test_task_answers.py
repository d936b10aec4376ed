"""What a model for labels or values answers, and what its spec must hold."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from handlerlib import answers, drift, tasks
from handlerlib.errors import SpecError
from handlerlib.spec import Architecture, Golden, GoldenSample, ModelSpec, Preprocess, Scaling

LABELS = ('say "cat"', "dog", "猫")
SCALING = (Scaling(mean=10.0, scale=2.0), Scaling(mean=0.0, scale=1e6), Scaling(mean=-1.0, scale=1.0))


def spec(task: Any = "multi-label", **changes: Any) -> ModelSpec:
    valued = task == "regression"
    sample = {"values" if valued else "probabilities": (0.5, 0.1, 0.9)}
    own: dict[str, Any] = {
        "multi-class": {},
        "multi-label": {"thresholds": (0.5, 0.05, 0.95)},
        "regression": {"scaling": SCALING},
    }[task]
    fields: dict[str, Any] = {
        "name": "m",
        "version": "1.0",
        "handler": "image_classifier",
        "architecture": Architecture(name="tiny_cnn", channels=1, height=8, width=8, classes=3),
        "preprocess": Preprocess(channels=1, height=8, width=8, mean=(0.5,), std=(0.25,)),
        "labels": LABELS,
        "task": task,
        "golden": Golden(tolerance=1e-4, samples=(GoldenSample(file="golden/0.png", label="dog", **sample),)),
    }
    return ModelSpec(**(fields | own | changes))


def document(renderer: answers.Renderer, rows: list[list[float]], top_k: int, *, given: bool) -> dict[str, Any]:
    ranked = renderer.rank(torch.tensor(rows), top_k)
    found: dict[str, Any] = json.loads(renderer.document([(one, renderer.wanted(top_k, given)) for one in ranked]))
    return found


def test_every_label_that_reaches_its_threshold_is_answered_the_most_probable_first() -> None:
    renderer = answers.renderer(spec())
    found = document(renderer, [[0.5, 0.75, 0.9], [0.0, 0.0, 0.0], [0.9, 0.04, 1.0]], 1, given=False)
    assert (found["model"], found["version"], found["task"]) == ("m", "1.0", "multi-label")
    names = [[item["label"] for item in row] for row in found["predictions"]]
    assert names == [["dog", LABELS[0]], [], ["猫", LABELS[0]]]
    assert found["predictions"][0][0] == {"label": "dog", "index": 1, "probability": 0.75, "threshold": 0.05}


def test_a_top_k_of_the_clients_own_is_what_it_gets() -> None:
    (found,) = document(answers.renderer(spec()), [[0.25, 0.0, 0.125]], 2, given=True)["predictions"]
    assert [(item["label"], item["probability"]) for item in found] == [(LABELS[0], 0.25), ("猫", 0.125)]


def test_all_labels_of_many_are_ranked_though_few_are_asked_for() -> None:
    labels = tuple(map(str, range(300)))
    renderer = answers.ThresholdRenderer("m", "1", labels, (0.5,) * 300)
    row = [0.9 if number % 3 == 0 else 0.1 for number in range(300)]
    (found,) = document(renderer, [row], 5, given=False)["predictions"]
    assert [item["index"] for item in found] == list(range(0, 300, 3))


def test_values_are_answered_in_the_targets_order_to_the_last_bit() -> None:
    rows = torch.tensor([[0.1, 16777217.0, -1e-7], [3.0, 2.0, 1.0]])
    found = document(answers.renderer(spec("regression")), rows.tolist(), 1, given=True)
    assert found["task"] == "regression"
    assert [[item["target"] for item in row] for row in found["predictions"]] == [list(LABELS)] * 2
    assert torch.equal(torch.tensor([[item["value"] for item in row] for row in found["predictions"]]), rows)


def test_the_last_step_by_task() -> None:
    z = torch.tensor([[0.0, 1.0, -2.0]])
    torch.testing.assert_close(tasks.finish(spec("multi-class"))(z).sum(1), torch.ones(1))
    torch.testing.assert_close(tasks.finish(spec())(z), 1 / (1 + (-z).exp()))
    torch.testing.assert_close(tasks.finish(spec("regression"))(z), torch.tensor([[10.0, 1e6, -3.0]]))


def test_values_are_counted_by_their_place_among_those_of_training() -> None:
    assert drift.position(10.0, SCALING[0]) == 0.5
    assert drift.position(12.0, SCALING[0]) == pytest.approx(0.8413, abs=1e-4)
    assert drift.position(-1e300, SCALING[0]) == 0.0 and drift.position(1e300, SCALING[0]) == 1.0
    baseline = drift.measure([(0, drift.position(value, SCALING[0])) for value in (-1e300, 10.0, 1e300)], 3)
    bins = drift.Bins.of(LABELS, baseline)
    assert bins.of_answer(0, 1.0)[0] == "0.99-1"
    renderer = answers.renderer(spec("regression"))
    assert renderer.first(renderer.rank(torch.tensor([[12.0, 5.0, 5.0]]), 1)[0]) == (
        0,
        drift.position(12.0, SCALING[0]),
    )


@pytest.mark.parametrize("task", ["multi-class", "multi-label", "regression"])
def test_a_spec_survives_its_file_and_holds_only_what_its_task_needs(task: Any) -> None:
    text = spec(task).to_json()
    assert ModelSpec.from_json(text) == spec(task)
    keys = set(json.loads(text))
    assert ("thresholds" in keys, "scaling" in keys) == (task == "multi-label", task == "regression")
    assert ("task" in keys) == (task != "multi-class")
    (sample,) = json.loads(text)["golden"]["samples"]
    assert set(sample) == {"file", "label", "values" if task == "regression" else "probabilities"}


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("multi-label", {"thresholds": (0.5,)}, "thresholds must be 3 for the task multi-label"),
        ("multi-label", {"thresholds": (0.5, 0.0, 0.5)}, r"thresholds must be in \(0, 1\)"),
        ("multi-label", {"temperature": 2.0}, "temperature must be 1 for the task multi-label"),
        ("multi-label", {"scaling": SCALING}, "scaling must be 0 for the task multi-label"),
        ("regression", {"scaling": SCALING[:2]}, "scaling must be 3 for the task regression"),
        ("multi-class", {"thresholds": (0.5, 0.5, 0.5)}, "thresholds must be 0 for the task multi-class"),
    ],
)
def test_a_spec_without_what_its_task_needs(task: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec(task, **changes)


def test_golden_samples_hold_what_the_task_answers() -> None:
    with pytest.raises(SpecError, match="one value per target"):
        dataclasses.replace(spec("regression"), golden=spec().golden)
    with pytest.raises(SpecError, match="one probability per label"):
        dataclasses.replace(spec(), golden=spec("regression").golden)
    with pytest.raises(SpecError, match=r"scaling\.scale must be positive"):
        Scaling(mean=0.0, scale=0.0)
