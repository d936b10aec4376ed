"""A student and its teacher."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from handlerlib import architectures
from handlerlib.spec import Architecture, ModelSpec, Preprocess
from training import pipeline
from training.compress import distil
from training.compress.distil import Learner, Teacher
from training.config import Distil, Recipe, load_recipe
from training.errors import RecipeError
from training.export import load_network
from training.progress import silent

WriteTree = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]
SHAPE = Architecture(name="tiny_cnn", channels=1, height=8, width=8, classes=3)
PREPROCESS = Preprocess(channels=1, height=8, width=8, mean=(0.5,), std=(0.25,))


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in logits)
    return [math.exp(value) / total for value in logits]


def test_the_loss_is_that_of_a_calculation_by_hand() -> None:
    student, teacher, label, temperature, alpha = [1.0, -0.5, 0.25], [2.0, 0.0, -1.0], 1, 3.0, 0.7
    p = softmax([value / temperature for value in teacher])
    q = softmax([value / temperature for value in student])
    soft = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    hard = -math.log(softmax(student)[label])
    got = distil.blend(torch.tensor([student]), torch.tensor([teacher]), torch.tensor([label]), temperature, alpha)
    assert float(got) == pytest.approx(alpha * soft + (1 - alpha) * hard, rel=1e-5)
    # The mean over the batch, not its sum.
    twice = distil.blend(
        torch.tensor([student] * 2), torch.tensor([teacher] * 2), torch.tensor([label] * 2), temperature, alpha
    )
    assert float(twice) == pytest.approx(float(got), rel=1e-5)


def taught_by(
    name: str, hints: tuple[tuple[str, str], ...], preprocess: Preprocess = PREPROCESS
) -> tuple[torch.nn.Module, distil.Loss]:
    torch.manual_seed(0)
    shape = dataclasses.replace(SHAPE, name=name, height=preprocess.height, width=preprocess.width)
    network = architectures.build(shape).eval().requires_grad_(False)
    spec = _Spec(shape, preprocess)
    teacher = Teacher(network, spec, "0" * 64)  # type: ignore[arg-type]
    settings = Distil(teacher="x", hints=hints)
    return distil.prepare(architectures.build(SHAPE), SHAPE, PREPROCESS, teacher, settings)


@dataclasses.dataclass
class _Spec:
    architecture: Architecture
    preprocess: Preprocess


def test_hints_train_a_projection_that_is_no_part_of_the_student() -> None:
    learner, loss = taught_by("cnn28", (("0", "0"), ("2", "3")))
    assert isinstance(learner, Learner)
    value, logits_BK = loss(learner.train(), torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
    value.backward()  # type: ignore[no-untyped-call]
    assert logits_BK.shape == (4, 3)
    assert [tuple(one.weight.shape) for one in learner.projections] == [(64, 32, 1, 1), (128, 64)]
    assert all(parameter.grad is not None for parameter in learner.parameters())
    mine = distil.student_weights(learner.state_dict())
    architectures.build(SHAPE).load_state_dict(mine, strict=True)


def test_a_teacher_of_another_size_and_normalisation_sees_the_same_image() -> None:
    theirs = Preprocess(channels=1, height=16, width=16, mean=(0.2,), std=(0.5,))
    adapt = distil._Adapter(PREPROCESS, theirs)
    grey = torch.full((1, 1, 8, 8), (0.6 - 0.5) / 0.25)
    assert torch.allclose(adapt(grey), torch.full((1, 1, 16, 16), (0.6 - 0.2) / 0.5))
    learner, loss = taught_by("cnn28", (), theirs)
    assert loss(learner.train(), torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))[1].shape == (4, 3)


@pytest.mark.parametrize(
    ("hints", "message"),
    [((("9", "0"),), "there is no layer '9'"), ((("0", "3"),), r"shape \(32, 4, 4\) cannot be compared with \(128,\)")],
)
def test_hints_that_cannot_be_are_explained(hints: tuple[tuple[str, str], ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        taught_by("cnn28", hints)


def test_a_recipe_with_a_teacher_trains_a_student(tree: WriteTree, folder_recipe: MakeRecipe, tmp_path: Path) -> None:
    root = tree(zero=15, one=15, two=15)
    teacher = pipeline.train(
        folder_recipe(root, "model.architecture=cnn28", "train.epochs=6", "name=teacher"),
        runs=tmp_path / "runs", artifacts=tmp_path / "artifacts", report=silent,
    )  # fmt: skip
    section = (f"distil.teacher={teacher.artifact}", "distil.alpha=1.0", 'distil.hints=[["0", "0"]]')
    recipe = folder_recipe(root, "train.epochs=8", *section)
    student = pipeline.train(recipe, runs=tmp_path / "runs", artifacts=tmp_path / "artifacts", report=silent)
    # alpha is 1: all that it knows of the labels, it knows from its teacher.
    assert student.metrics["test_accuracy"] >= 0.8
    provenance = json.loads((student.artifact / "provenance.json").read_text())
    assert provenance["compression"]["teacher"]["name"] == "teacher"
    assert str(tmp_path) not in json.dumps(provenance)
    assert "It learned from the answers of teacher 1.0" in (student.artifact / "MODEL_CARD.md").read_text()
    load_network(student.artifact, ModelSpec.load(student.artifact))
    assert pipeline.evaluate(student.artifact).metrics["test_loss"] == student.metrics["test_loss"]
    # Another teacher is another run; the same again is found.
    again = pipeline.train(recipe, runs=tmp_path / "runs", artifacts=tmp_path / "artifacts", report=silent)
    assert again.reused
    plain = folder_recipe(root, "train.epochs=8")
    surveyed = pipeline.data.survey(plain, threads=1, report=silent)
    assert pipeline.run_id(plain, surveyed, 1) != student.run.name


def test_a_teacher_of_other_classes_is_refused(tree: WriteTree, folder_recipe: MakeRecipe, tmp_path: Path) -> None:
    places = {"runs": tmp_path / "runs", "artifacts": tmp_path / "artifacts", "report": silent}
    teacher = pipeline.train(folder_recipe(tree(zero=6, one=6), "train.epochs=1"), **places)  # type: ignore[arg-type]
    other = folder_recipe(tree("others", five=6, six=6), f"distil.teacher={teacher.artifact}")
    with pytest.raises(RecipeError, match="knows the classes one, zero"):
        pipeline.train(other, **places)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="is no artifact"):
        pipeline.train(folder_recipe(tree(), f"distil.teacher={tmp_path}"), **places)  # type: ignore[arg-type]


def test_a_recipe_without_a_teacher_says_nothing_of_one() -> None:
    assert "distil" not in load_recipe("digits", []).identity()
    assert "teacher" not in load_recipe("digits", ["distil.teacher=somewhere"]).identity()["distil"]
