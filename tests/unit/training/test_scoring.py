"""Labelled folders, answers as they come over HTTP, and when an endpoint's answers are others than its artifact's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from handlerlib.engine_spec import Accuracy, BuiltFor, EngineSpec
from handlerlib.spec import ModelSpec
from support.artifacts import write_artifact
from training import scoring, truth
from training.errors import DataError
from training.evaluate import Evaluation, answers, figures

LABELS = ("a", "b", "c")


def evaluation(rows: list[list[float]], true: str) -> Evaluation:
    log_NK = np.log(np.array(rows)).astype(np.float32)
    return figures(LABELS, [str(number) for number in range(len(rows))], list(true), log_NK)


def engine(precision: str, tolerance: float = 1e-4, budget: float = 0.5) -> EngineSpec:
    accuracy = Accuracy(
        split="test", images=100, reference=0.9, engine=0.9, loss_points=0.0, interval_points=(0.0, 0.0),
        budget_points=budget,
    )  # fmt: skip
    return EngineSpec(
        rung=f"torch-{precision}", engine="torch", precision=precision,  # type: ignore[arg-type]
        built_for=BuiltFor(device="cpu", machine="x86_64"), tolerance=tolerance, golden_difference=0.0,
        accuracy=accuracy,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- labelled folders


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    asked = scoring.labelled_folder(write(tmp_path, "cat/1.txt", "cat/2.txt", "dog/x.txt"))
    assert (asked.total, asked.labels) == (3, ("cat", "dog"))
    assert [(one.name, one.label, one.data) for one in asked.read()] == [
        ("cat/1.txt", "cat", b"cat/1.txt"),
        ("cat/2.txt", "cat", b"cat/2.txt"),
        ("dog/x.txt", "dog", b"dog/x.txt"),
    ]
    assert len(list(asked.read())) == 3


def test_of_a_divided_folder_the_test_side_is_taken(tmp_path: Path) -> None:
    asked = scoring.labelled_folder(write(tmp_path, "train/cat/1.txt", "train/dog/1.txt", "test/cat/2.txt"))
    assert [one.name for one in asked.read()] == ["test/cat/2.txt"]


def test_a_class_that_the_model_does_not_know_is_named(tmp_path: Path) -> None:
    asked = scoring.labelled_folder(write(tmp_path, "cat/1.txt", "wolf/1.txt"))
    with pytest.raises(DataError, match=r"the class 'wolf', which m 1\.0 does not know"):
        scoring.check_labels(asked, ("cat", "dog"), "m 1.0")


# ------------------------------------------------------------------------------------------------------------- answers


def test_answers_become_log_probabilities_in_the_labels_order() -> None:
    log_NK, complete = scoring.log_rows([{2: 0.5, 0: 0.3, 1: 0.2}], 3)
    assert complete
    np.testing.assert_allclose(np.exp(log_NK), [[0.3, 0.2, 0.5]], rtol=1e-6)


def test_labels_that_an_answer_leaves_out_share_the_rest() -> None:
    log_NK, complete = scoring.log_rows([{1: 0.7, 3: 0.2}], 4)
    assert not complete
    np.testing.assert_allclose(np.exp(log_NK), [[0.05, 0.7, 0.05, 0.2]], rtol=1e-6)


def test_a_probability_shown_as_zero_has_a_finite_loss() -> None:
    log_NK, _ = scoring.log_rows([{0: 1.0, 1: 0.0}], 2)
    assert log_NK[0, 1] == pytest.approx(np.log(5e-9))


# ---------------------------------------------------------------------------------------------------------- comparison


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec.load(write_artifact(tmp_path_factory.mktemp("spec")))


def test_answers_within_the_tolerance_do_not_differ(spec: ModelSpec) -> None:
    one, other = evaluation([[0.5, 0.3, 0.2]], "a"), evaluation([[0.50009, 0.29991, 0.2]], "a")
    found = scoring.compare(one, other, spec, None)
    assert not found.differs
    assert found.largest == pytest.approx(9e-5, rel=0.01)
    assert "0.0001 in any probability" in found.allowed


def test_one_probability_beyond_the_tolerance_differs(spec: ModelSpec) -> None:
    one, other = evaluation([[0.5, 0.3, 0.2]], "a"), evaluation([[0.5, 0.2995, 0.2005]], "a")
    found = scoring.compare(one, other, spec, None)
    assert found.differs
    assert found.changed == 0


def test_incomplete_answers_are_compared_by_their_first_labels(spec: ModelSpec) -> None:
    one, other = evaluation([[0.5, 0.3, 0.2]], "a"), evaluation([[0.5, 0.25, 0.25]], "a")
    assert not scoring.compare(one, other, spec, None, complete=False).differs


def test_an_engine_of_lower_precision_is_judged_by_its_accuracy(spec: ModelSpec) -> None:
    sure, doubting = [0.9, 0.05, 0.05], [0.6, 0.2, 0.2]
    one, other = evaluation([sure] * 200, "a" * 200), evaluation([doubting] * 200, "a" * 200)
    assert not scoring.compare(one, other, spec, engine("int8")).differs
    assert scoring.compare(one, other, spec, engine("fp32")).differs
    worse = evaluation([doubting] * 190 + [[0.2, 0.6, 0.2]] * 10, "a" * 200)
    found = scoring.compare(one, worse, spec, engine("int8"))
    assert found.differs
    assert (found.changed, found.lost_points) == (10, 5.0)
    assert not scoring.compare(one, worse, spec, engine("int8", budget=10)).differs


def test_an_engine_for_labels_is_judged_by_its_exact_matches(tmp_path: Path) -> None:
    labels = ModelSpec.load(write_artifact(tmp_path, task="multi-label"))
    names, true = [str(number) for number in range(200)], [truth.of_labels({labels.labels[0]}, labels.labels)] * 200

    def answered(*rows: list[float]) -> Evaluation:
        return answers(labels, names, true, np.array(rows * (200 // len(rows))))

    sure, doubting = answered([0.9, 0.1, 0.1]), answered([0.7, 0.3, 0.3])
    assert not scoring.compare(sure, doubting, labels, engine("int8")).differs
    assert scoring.compare(sure, doubting, labels, engine("fp32")).differs
    assert scoring.compare(sure, doubting, labels, None).differs
    found = scoring.compare(sure, answered([0.7, 0.3, 0.3], [0.3, 0.3, 0.3]), labels, engine("int8"))
    assert found.differs and found.lost_points == 50
    assert found.allowed == "0.5 points of exact matches, for the engine torch-int8"


def test_an_engine_for_values_is_held_to_its_own_tolerance(tmp_path: Path) -> None:
    values = ModelSpec.load(write_artifact(tmp_path, task="regression"))
    true_NK = np.array([[0.0, 10.0, 20.0], [1.0, 11.0, 21.0]])
    true = [truth.of_values(row) for row in true_NK.tolist()]
    one, other = (answers(values, ["a", "b"], true, true_NK + off) for off in (0.0, 0.001))
    assert scoring.compare(one, other, values, None).differs
    assert not scoring.compare(one, other, values, engine("fp32", tolerance=1e-3)).differs


def test_a_wrong_number_is_a_difference(spec: ModelSpec) -> None:
    one = evaluation([[0.5, 0.3, 0.2]], "a")
    broken = dataclasses.replace(one, log_NK=np.full((1, 3), np.nan, dtype=np.float32))
    assert scoring.compare(one, broken, spec, None).differs
