"""From recipe to artifact: what is written, reused, judged and exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from handlerlib import imaging
from handlerlib.spec import ModelSpec
from training import export as exporting
from training import pipeline
from training.config import Recipe, load_recipe
from training.errors import DataError, RecipeError, TargetError
from training.pipeline import Trained
from training.progress import Step, silent

WriteTree = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]

RunRecipe = Callable[..., Trained]


@pytest.fixture
def run(tmp_path: Path) -> RunRecipe:
    def start(recipe: Recipe, place: str = "out", **options: object) -> Trained:
        options = {"report": silent} | options
        folder = tmp_path / place
        return pipeline.train(recipe, runs=folder / "runs", artifacts=folder / "artifacts", **options)  # type: ignore[arg-type]

    return start


@pytest.fixture
def small(tree: WriteTree, folder_recipe: MakeRecipe) -> Recipe:
    return folder_recipe(tree(zero=15, one=15, two=15))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------ what is written


def test_a_run_folder_and_an_artifact_hold_what_they_promise(small: Recipe, run: RunRecipe) -> None:
    trained = run(small)
    assert trained.run.name.startswith("small-")
    assert len(trained.run.name) == len("small-") + 8
    assert {path.name for path in trained.run.iterdir() if path.name[0] != "."} == {
        "recipe.json",
        "data_report.json",
        "history.jsonl",
        "metrics.json",
        "curves.png",
        "confusion_matrix.png",
        "report.html",
        "weights.safetensors",
        "model_spec.json",
        "golden",
        "provenance.json",
    }
    assert set(files(trained.artifact)) == {
        "weights.safetensors",
        "model_spec.json",
        "metrics.json",
        "provenance.json",
        "MODEL_CARD.md",
        "report.html",
        "golden/0.png",
        "golden/1.png",
        "golden/2.png",
    }
    for picture in ("curves.png", "confusion_matrix.png"):
        assert (trained.run / picture).read_bytes().startswith(b"\x89PNG")


def test_the_resolved_recipe_can_be_trained_from(small: Recipe, run: RunRecipe) -> None:
    from training.config import parse

    recorded = json.loads((run(small).run / "recipe.json").read_text())
    assert parse(recorded, where="recorded") == small
    assert recorded["train"]["momentum"] == 0.9


def test_metrics_are_flat_numbers_and_agree_everywhere(small: Recipe, run: RunRecipe) -> None:
    trained = run(small)
    assert {"test_accuracy", "test_loss", "test_macro_f1", "validation_accuracy", "data_unreadable"} <= set(
        trained.metrics
    )
    assert all(type(value) is float for value in trained.metrics.values())
    assert json.loads((trained.artifact / "metrics.json").read_text()) == trained.metrics
    full = json.loads((trained.run / "metrics.json").read_text())
    assert sum(map(sum, full["confusion_matrix"])) == full["test_images"] == 9
    assert [row["label"] for row in full["per_class"]] == ["one", "two", "zero"]


def test_the_spec_says_what_was_trained(small: Recipe, run: RunRecipe) -> None:
    spec = ModelSpec.load(run(small).artifact)
    assert (spec.name, spec.version, spec.handler) == ("small", "1.0", "image_classifier")
    assert spec.labels == ("one", "two", "zero")
    assert (spec.architecture.name, spec.architecture.channels, spec.architecture.height) == ("tiny_cnn", 1, 8)
    assert spec.golden.tolerance == 1e-4


def test_limits_and_tolerance_of_the_recipe_reach_the_spec(small: Recipe, run: RunRecipe, tmp_path: Path) -> None:
    recipe = small.model_copy(update={"serve": small.serve.model_copy(update={"max_bytes": 5000, "tolerance": 1e-3})})
    spec = ModelSpec.load(run(recipe).artifact)
    assert spec.limits.max_bytes == 5000
    assert spec.golden.tolerance == 1e-3


def test_no_path_and_no_time_in_the_artifact(small: Recipe, run: RunRecipe, tmp_path: Path) -> None:
    trained = run(small)
    for name, content in files(trained.artifact).items():
        assert str(tmp_path).encode() not in content, name
    provenance = json.loads((trained.artifact / "provenance.json").read_text())
    assert set(provenance) == {"recipe", "data_digest", "git_revision", "run", "versions", "splits"}
    assert provenance["run"] == trained.run.name
    assert provenance["splits"] == {"train": 30, "validation": 6, "test": 9}
    assert set(provenance["versions"]) == {"python", "torch", "torchvision", "marina"}


def test_golden_samples_replay(small: Recipe, run: RunRecipe) -> None:
    artifact = run(small).artifact
    spec = ModelSpec.load(artifact)
    network = exporting.load_network(artifact, spec)
    assert {sample.label for sample in spec.golden.samples} == set(spec.labels)
    for sample in spec.golden.samples:
        x_BCHW = imaging.batch([(artifact / sample.file).read_bytes()], spec.preprocess, spec.limits)
        x_BCHW = imaging.normalise(x_BCHW, spec.preprocess)
        with torch.no_grad():
            probabilities = network(x_BCHW).softmax(dim=1)[0]
        assert float((probabilities - torch.tensor(sample.probabilities)).abs().max()) < 1e-6
        assert sum(sample.probabilities) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("architecture", "size"), [("resnet9", 16), ("mobilenet_v3_small", 32), ("resnet18", 32)])
def test_networks_with_batch_norm_export_what_they_learned(
    architecture: str, size: int, tree: WriteTree, folder_recipe: MakeRecipe, run: RunRecipe
) -> None:
    root = tree(zero=9, one=9)
    size_and_name = (f"model.architecture={architecture}", f"data.image_size={size}")
    trained = run(folder_recipe(root, *size_and_name, "train.epochs=1"))
    spec = ModelSpec.load(trained.artifact)
    assert spec.architecture.name == architecture
    judged = pipeline.evaluate(trained.artifact)
    assert judged.metrics["test_loss"] == trained.metrics["test_loss"]


def test_more_classes_than_golden_samples(
    folder_recipe: MakeRecipe, run: RunRecipe, digit_images: dict[str, list[bytes]], tmp_path: Path
) -> None:
    flat = [image for images in digit_images.values() for image in images]
    for label in range(20):
        folder = tmp_path / "many" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(4):
            (folder / f"{number}.png").write_bytes(flat[label * 7 + number])
    spec = ModelSpec.load(run(folder_recipe(tmp_path / "many", "train.epochs=1", "data.validation=0.3")).artifact)
    assert spec.labels[1:3] == ("class1", "class2")
    assert len(spec.golden.samples) == 16
    assert len({sample.label for sample in spec.golden.samples}) == 16


def test_the_card_tells_a_reader_the_essentials(small: Recipe, run: RunRecipe) -> None:
    card = (run(small).artifact / "MODEL_CARD.md").read_text()
    for text in ("# small 1.0", "tiny_cnn", "| accuracy |", "| zero |", "9 held out", "/predictions/small", "grey"):
        assert text in card


def test_files_left_out_are_reported_and_counted(small: Recipe, run: RunRecipe) -> None:
    root = Path(small.data.root or "")
    whole = (root / "zero" / "img0.png").read_bytes()
    (root / "zero" / "cut.png").write_bytes(whole[: len(whole) // 2])
    seen: list[Step] = []
    trained = run(small, report=seen.append)
    assert trained.metrics["data_unreadable"] == 1
    assert any("zero/cut.png" in step.note for step in seen)
    report = json.loads((trained.run / "data_report.json").read_text())
    assert report["unreadable"][0]["name"] == "zero/cut.png"
    assert report["classes"]["zero"] == {"train": 10, "validation": 2, "test": 3}


# ---------------------------------------------------------------------------------------------- same again, or another


def test_the_same_recipe_twice_gives_the_same_bytes(small: Recipe, run: RunRecipe) -> None:
    first, second = run(small, "one"), run(small, "other")
    assert not second.reused
    assert first.metrics == second.metrics
    assert files(first.artifact) == files(second.artifact)


def test_a_finished_run_is_reused(small: Recipe, run: RunRecipe) -> None:
    first = run(small)
    before = files(first.artifact)
    second = run(small)
    assert second.reused
    assert (second.run, second.artifact, second.metrics) == (first.run, first.artifact, first.metrics)
    assert files(second.artifact) == before


def test_again_trains_anew_to_the_same_end(small: Recipe, run: RunRecipe) -> None:
    first = run(small)
    before = files(first.artifact)
    second = run(small, again=True)
    assert not second.reused
    assert second.artifact == first.artifact
    assert files(second.artifact) == before


def test_moved_images_are_the_same_run(
    small: Recipe, run: RunRecipe, tmp_path: Path, folder_recipe: MakeRecipe
) -> None:
    first = run(small)
    shutil.copytree(str(small.data.root), tmp_path / "moved")
    assert run(folder_recipe(tmp_path / "moved")).reused
    assert run(folder_recipe(tmp_path / "moved")).run == first.run


@pytest.mark.parametrize("change", ["seed=1", "train.epochs=3", "augment.shift=0.2"])
def test_another_recipe_is_another_run_and_the_next_version(
    change: str, small: Recipe, run: RunRecipe, folder_recipe: MakeRecipe
) -> None:
    first = run(small)
    second = run(folder_recipe(Path(str(small.data.root)), change))
    assert second.run != first.run
    assert (first.artifact.name, second.artifact.name) == ("1.0", "1.1")


def test_changed_data_is_another_run(small: Recipe, run: RunRecipe) -> None:
    first = run(small)
    (Path(str(small.data.root)) / "zero" / "img0.png").unlink()
    assert run(small).run != first.run


def test_a_version_that_is_taken_is_refused_before_training(
    small: Recipe, run: RunRecipe, folder_recipe: MakeRecipe
) -> None:
    run(small)
    seen: list[Step] = []
    with pytest.raises(RecipeError, match=r"1\.0 already holds the run small-"):
        run(folder_recipe(Path(str(small.data.root)), "seed=1", "version=1.0"), report=seen.append)
    assert not [step for step in seen if step.phase == "train"]


def test_pixels_on_disk_give_the_same_result_and_are_removed(
    small: Recipe, run: RunRecipe, folder_recipe: MakeRecipe
) -> None:
    mapped = run(folder_recipe(Path(str(small.data.root)), "data.memory_mib=0"), "mapped")
    assert mapped.metrics == run(small).metrics
    assert not list(mapped.run.glob("pixels*"))


# -------------------------------------------------------------------------------------------------- evaluate and export


def test_evaluation_of_run_and_artifact_repeats_the_figures(small: Recipe, run: RunRecipe) -> None:
    trained = run(small)
    for target in (trained.run, trained.artifact):
        judged = pipeline.evaluate(target, root=small.data.root)
        assert judged.metrics == {key: value for key, value in trained.metrics.items() if key.startswith("test_")}
        assert sum(map(sum, judged.confusion)) == len(judged.predictions) == 9
        right = sum(one.label == one.predicted for one in judged.predictions)
        assert judged.metrics["test_accuracy"] == right / 9


def test_per_class_figures_follow_from_the_confusion_matrix(small: Recipe, run: RunRecipe) -> None:
    judged = pipeline.evaluate(run(small).run)
    for number, row in enumerate(judged.per_class):
        hits = judged.confusion[number][number]
        said = sum(line[number] for line in judged.confusion)
        assert row.images == sum(judged.confusion[number])
        assert row.recall == pytest.approx(hits / row.images)
        assert row.precision == pytest.approx(hits / said if said else 0.0)


def test_an_artifact_finds_its_data_through_the_run_beside_it(small: Recipe, run: RunRecipe) -> None:
    assert pipeline.evaluate(run(small).artifact).metrics["test_images"] == 9


def test_an_artifact_alone_asks_where_the_data_is(small: Recipe, run: RunRecipe, tmp_path: Path) -> None:
    alone = tmp_path / "far" / "a" / "b"
    shutil.copytree(run(small).artifact, alone)
    with pytest.raises(DataError, match="where the images lie"):
        pipeline.evaluate(alone)
    assert pipeline.evaluate(alone, root=small.data.root).metrics["test_images"] == 9


def test_other_data_is_not_judged(small: Recipe, run: RunRecipe) -> None:
    trained = run(small)
    (Path(str(small.data.root)) / "zero" / "img0.png").unlink()
    with pytest.raises(DataError, match=r"are not those that .* was trained on"):
        pipeline.evaluate(trained.artifact)


def test_the_test_samples_are_those_that_evaluation_saw(small: Recipe, run: RunRecipe) -> None:
    trained = run(small)
    samples = list(pipeline.test_samples(trained.artifact))
    judged = pipeline.evaluate(trained.artifact)
    assert [(one.name, one.label) for one in samples] == [(one.name, one.label) for one in judged.predictions]
    root = Path(str(small.data.root))
    assert all(sample.data == (root / sample.name).read_bytes() for sample in samples)


def test_export_again_gives_the_same_bytes_without_the_data(small: Recipe, run: RunRecipe, tmp_path: Path) -> None:
    trained = run(small)
    shutil.rmtree(str(small.data.root))
    exported = pipeline.export(trained.run, artifacts=tmp_path / "elsewhere")
    assert exported == tmp_path / "elsewhere" / "small" / "1.0"
    assert files(exported) == files(trained.artifact)
    assert pipeline.export(trained.run, artifacts=trained.artifact.parents[1]) == trained.artifact


def test_export_repairs_a_damaged_artifact(small: Recipe, run: RunRecipe) -> None:
    trained = run(small)
    before = files(trained.artifact)
    (trained.artifact / "weights.safetensors").write_bytes(b"x")
    pipeline.export(trained.run, artifacts=trained.artifact.parents[1])
    assert files(trained.artifact) == before
    assert [path.name for path in trained.artifact.parent.iterdir()] == ["1.0"]


def test_targets_that_are_neither_run_nor_artifact(tmp_path: Path, small: Recipe, run: RunRecipe) -> None:
    with pytest.raises(TargetError, match="neither a finished run nor an artifact"):
        pipeline.evaluate(tmp_path)
    with pytest.raises(TargetError, match="is not a finished run"):
        pipeline.export(tmp_path, artifacts=tmp_path / "a")
    trained = run(small)
    (trained.run / "weights.safetensors").unlink()
    with pytest.raises(TargetError, match=r"lacks .*weights\.safetensors"):
        pipeline.export(trained.run, artifacts=tmp_path / "a")
    (trained.artifact / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(TargetError, match="does not hold the weights"):
        pipeline.evaluate(trained.artifact)


# ---------------------------------------------------------------------------------------------------------- the digits


def test_digits_reach_the_promised_accuracy(run: RunRecipe) -> None:
    trained = run(load_recipe("digits", []))
    assert trained.metrics["test_accuracy"] >= 0.985
    assert trained.metrics["test_images"] == 359
