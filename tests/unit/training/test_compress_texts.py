"""Smaller text models: fewer terms, fewer bits, and what does not apply."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from handlerlib import inputs, loading
from handlerlib.spec import WEIGHTS_FILE, ModelSpec
from support import texts
from training import pipeline
from training.compress import search, vocabulary
from training.compress.search import Options, Result
from training.errors import TargetError
from training.export import load_network
from training.optimize import ladder
from training.pipeline import Trained
from training.progress import silent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def parent(home: Path) -> Trained:
    return texts.train(home)


@pytest.fixture(scope="module")
def result(home: Path, parent: Trained) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        # Timing is not what is tested here.
        patch.setattr("training.compress.measure._BLOCK_SECONDS", 0.001)
        patch.setattr(search, "_RATIOS", (0.3,))
        return search.compress(
            parent.artifact, Options(budget=15.0), runs=home / "runs", artifacts=home / "artifacts", report=silent
        )


def test_what_applies_is_made_and_what_does_not_says_why(result: Result) -> None:
    rows = {row.name: row for row in result.rows}
    assert {"fp16", "int8", "int4", "prune-30", "prune-30+int8"} <= set(rows)
    reasons = {name: row.reason for name, row in rows.items() if row.status == "not tried"}
    assert set(reasons) == {"bf16", "qat", "sparse"}
    assert "fp16 takes the same bytes" in reasons["bf16"]
    sizes = {name: row.size.weights_bytes for name, row in rows.items() if row.size is not None}
    assert sizes["int4"] < sizes["int8"] < sizes["fp16"] < sizes["parent"]
    report = (result.folder / "report.md").read_text()
    assert f"on {result.images['validation']} validation texts" in report
    assert "weighed together with the vocabulary" in report
    assert sizes["prune-30+int8"] < sizes["prune-30"] < sizes["parent"]


def test_a_kept_form_evaluates_and_replays_as_recorded(result: Result) -> None:
    """What a worker answers is what the evaluation counted, and smaller files are what was asked for."""
    kept = [row for row in result.rows if row.artifact is not None]
    assert {"fp16", "int8", "prune-30"} <= {row.name for row in kept}
    for row in (row for row in kept if row.name in ("int8", "prune-30", "prune-30+int8")):
        assert row.artifact is not None
        judged = pipeline.evaluate(row.artifact)
        assert 100 * judged.metrics["test_accuracy"] == pytest.approx(row.accuracy)
        model = loading.load(row.artifact, torch.device("cpu"))
        reading = inputs.of(model.spec)

        def answer(data: bytes, model: loading.LoadedModel = model, reading: inputs.Inputs = reading) -> torch.Tensor:
            return model.probabilities(reading.stack([reading.load(data)]))[0]

        assert loading.self_test(model, answer, row.artifact) < 1e-6
        assert "test texts" in (row.artifact / "MODEL_CARD.md").read_text()
    parent = next(row for row in result.rows if row.name == "parent")
    int8 = next(row for row in result.rows if row.name == "int8")
    assert int8.artifact is not None and parent.size is not None
    assert (int8.artifact / WEIGHTS_FILE).stat().st_size < 0.6 * (result.parent / WEIGHTS_FILE).stat().st_size


def test_a_stored_form_can_be_a_parent_in_its_turn(result: Result, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.compress.measure._BLOCK_SECONDS", 0.001)
    row = next(row for row in result.rows if row.name == "int8")
    assert row.artifact is not None
    options = Options(budget=15.0, methods=("fp16",))
    again = search.compress(row.artifact, options, runs=home / "runs", artifacts=home / "again", report=silent)
    assert {found.name: found.accuracy for found in again.rows} == {"parent": row.accuracy, "fp16": row.accuracy}


def test_terms_that_matter_least_leave_with_their_rows(parent: Trained) -> None:
    spec = ModelSpec.load(parent.artifact)
    assert spec.text is not None
    network = load_network(parent.artifact, spec)
    # The term of row 2 is in every text and row 1's in one; none other is known to matter.
    scores = vocabulary.importance(network, [torch.tensor([1, 2], dtype=torch.int32), torch.tensor([2, 2, 0])])
    spread = network.table.max(1).values - network.table.min(1).values  # type: ignore[operator]
    assert float(scores[2]) == pytest.approx(2 * float((spread * network.importance)[2].detach()))  # type: ignore[operator]
    assert float(scores[1]) == pytest.approx(float((spread * network.importance)[1].detach()))  # type: ignore[operator]
    assert float(scores[3:].abs().max()) == 0
    fewer = vocabulary.without(network, spec, scores, 1.0)
    assert fewer.text.vocabulary == spec.text.vocabulary[:2]
    assert fewer.weights["table"].shape == (3, len(spec.labels))
    assert torch.equal(fewer.weights["table"], network.table[:3])  # type: ignore[index]
    assert fewer.shape.terms is not None
    assert fewer.shape.terms.rows == fewer.text.rows == 3


def test_models_whose_terms_cannot_leave_say_why(parent: Trained) -> None:
    spec = ModelSpec.load(parent.artifact)
    assert vocabulary.obstacle(spec) == ""
    cnn = dataclasses.replace(spec, architecture=dataclasses.replace(spec.architecture, name="text_cnn"))
    assert "no terms of text_cnn can be taken out alone" in vocabulary.obstacle(cnn)
    assert spec.text is not None
    hashed = dataclasses.replace(spec, text=dataclasses.replace(spec.text, buckets=spec.text.rows - 1, vocabulary=()))
    assert "its terms are hashed" in vocabulary.obstacle(hashed)


def test_a_faster_form_of_a_text_model_is_refused_by_name(parent: Trained, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="reads texts, whose network takes microseconds") as caught:
        ladder.run(parent.artifact, ladder.Settings(), runs=tmp_path, artifacts=tmp_path, report=silent)
    assert "marina compress news:1.0 makes it smaller" in caught.value.remedy
