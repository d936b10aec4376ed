"""The whole search on real digits: what is kept, refused, published and found again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from handlerlib import imaging
from handlerlib.engine_spec import Accuracy, EngineSpec
from handlerlib.spec import ModelSpec
from marina import compress_cli
from marina.errors import ArchiveError
from marina.home import Home
from marina.screen import Screen
from support.commands import project
from support.engines import forged, write_torch_engine
from training import export, pipeline
from training.compress import forms, search
from training.compress.search import Options, Result
from training.config import Recipe
from training.errors import Interrupted, RecipeError
from training.export import load_network
from training.pipeline import Trained
from training.progress import Step, silent

WriteTree = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]
BASE = ("model.architecture=cnn28", "train.epochs=6", "train.learning_rate=0.003", "name=ink")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def parent(home: Path, digit_images: dict[str, list[bytes]]) -> Trained:
    """Three digits, learned well."""
    for digit in "012":
        folder = home / "photos" / f"d{digit}"
        folder.mkdir(parents=True)
        for number, image in enumerate(digit_images[digit][:60]):
            (folder / f"{number}.png").write_bytes(image)
    from training.config import load_recipe

    common = (f"data.root={home / 'photos'}", "train.batch_size=16", "train.threads=1", "train.device=cpu")
    recipe = load_recipe("folder", [*BASE, *common, "augment.flip=false"])
    return pipeline.train(recipe, runs=home / "runs", artifacts=home / "artifacts", report=silent)


@pytest.fixture(scope="module")
def options() -> Options:
    return Options(budget=10.0, methods=("prune", "sparse", "distil"), epochs=2, student="tiny_cnn")


def run(parent: Trained, options: Options, home: Path, report: Callable[[Step], None] = silent) -> Result:
    return search.compress(parent.artifact, options, runs=home / "runs", artifacts=home / "artifacts", report=report)


@pytest.fixture(scope="module")
def result(parent: Trained, options: Options, home: Path) -> Result:
    # Timing is not what is tested here.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.compress.measure._BLOCK_SECONDS", 0.001)
        return run(parent, options, home)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_kept_forms_are_artifacts_that_are_smaller_and_say_where_they_come_from(
    result: Result, parent: Trained
) -> None:
    rows = {row.name: row for row in result.rows}
    assert rows["parent"].accuracy is not None
    assert rows["parent"].accuracy > 90
    kept = [row for row in result.rows if row.status == "kept"]
    assert {"prune-25", "sparse-50"} <= {row.name for row in kept}
    half = rows["prune-25"]
    assert half.artifact is not None
    assert half.size is not None
    assert rows["parent"].size is not None
    assert half.size.parameters < 0.8 * rows["parent"].size.parameters
    assert half.size.multiply_adds < 0.8 * rows["parent"].size.multiply_adds
    provenance = json.loads((half.artifact / "provenance.json").read_text())
    compression = provenance["compression"]
    assert compression["parent"]["version"] == "1.0"
    assert compression["method"] == "structured pruning"
    assert compression["test"]["images"] == result.images["test"]
    assert compression["size"]["weights_bytes"] == (half.artifact / "weights.safetensors").stat().st_size
    assert set(json.loads((half.artifact / "compression.json").read_text())["latency"]) == {"1", "8"}
    assert "Made from ink 1.0: 25 % of the channels removed" in (half.artifact / "MODEL_CARD.md").read_text()
    spec = ModelSpec.load(half.artifact)
    assert spec.version != "1.0"
    assert {width.module for width in spec.architecture.widths} == {"0.0", "0.2", "3", "6"}


def test_a_kept_form_evaluates_and_replays_as_recorded(result: Result, parent: Trained) -> None:
    for row in (row for row in result.rows if row.artifact is not None):
        assert row.artifact is not None
        assert 100 * pipeline.evaluate(row.artifact).metrics["test_accuracy"] == pytest.approx(row.accuracy)
        spec = ModelSpec.load(row.artifact)
        network = load_network(row.artifact, spec)
        for sample in spec.golden.samples:
            data = (row.artifact / sample.file).read_bytes()
            x_1CHW = imaging.normalise(imaging.batch([data], spec.preprocess, spec.limits), spec.preprocess)
            with torch.no_grad():
                got = network(x_1CHW).softmax(dim=1)[0]
            assert float((got - torch.tensor(sample.probabilities)).abs().max()) < 1e-6


def test_sparse_weights_are_zero_in_the_artifact(result: Result) -> None:
    row = next(row for row in result.rows if row.name == "sparse-50")
    assert row.artifact is not None
    network = load_network(row.artifact, ModelSpec.load(row.artifact))
    weights = torch.cat([one.detach().flatten() for one in network.parameters() if one.ndim > 1])
    assert float((weights == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)
    assert row.size is not None
    assert row.size.nonzero < 0.52 * row.size.parameters


def test_the_report_names_every_form_and_what_was_not_tried(result: Result) -> None:
    text = (result.folder / "report.md").read_text()
    for row in result.rows:
        assert row.name in text
    assert "sparse-2of4**: not tried: no engine here computes with sparse tensor cores" in text
    assert f"{result.images['test']} test images" in text
    assert (result.folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((result.folder / "report.json").read_text()) == json.loads(json.dumps(result.fields()))


def test_the_same_again_computes_nothing_and_changes_no_byte(
    result: Result, parent: Trained, options: Options, home: Path
) -> None:
    before = files(home / "artifacts")
    seen: list[Step] = []
    again = run(parent, options, home, seen.append)
    assert again == result
    assert files(home / "artifacts") == before
    assert not [step for step in seen if step.phase.endswith(("train", "evaluate"))]


def test_the_best_form_is_the_newest_version(result: Result) -> None:
    """A name alone means its newest version."""
    kept = {row.name: row for row in result.rows if row.artifact is not None}
    assert result.best is not None
    versions = [tuple(map(int, row.artifact.name.split("."))) for row in kept.values() if row.artifact is not None]
    assert result.best.artifact is not None
    assert tuple(map(int, result.best.artifact.name.split("."))) == max(versions) == (1, len(kept))
    assert result.best.size is not None
    for row in kept.values():
        assert row.size is not None
        assert search._gain(row) < 1.05 * search._gain(result.best)


def test_the_smallest_of_the_fastest_forms_is_the_best(result: Result) -> None:
    row = next(row for row in result.rows if row.status == "kept")
    assert row.size is not None

    def form(name: str, speed: float, size: int) -> search.Row:
        assert row.size is not None
        latency = {batch: dataclasses.replace(one, speed_up=speed) for batch, one in row.latency.items()}
        return dataclasses.replace(
            row, name=name, latency=latency, size=dataclasses.replace(row.size, weights_bytes=size)
        )

    rows = [form("small", 2.93, 10), form("fast", 3.0, 20), form("tiny", 2.0, 1), result.rows[0], form("slow", 1.0, 50)]
    assert [one.name for one in search._ranked(rows)] == ["slow", "tiny", "fast", "small"]


def test_a_name_is_compressed_from_what_was_trained_not_from_its_newest_form(
    result: Result, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project(home)
    monkeypatch.setenv("MARINA_HOME", str(home))
    before, runs = files(home / "artifacts"), set((home / "runs").iterdir())
    compress_cli.compress("ink", budget=10, methods="sparse", epochs=2)
    said = capsys.readouterr().out
    assert result.best is not None and result.best.artifact is not None
    newest = result.best.artifact.name
    assert f"from      ink:1.0, which ink:{newest} was made from\n" in said
    assert "next      marina pack ink:1." in said
    assert f"note      ink alone now means ink:{newest}\n" in said
    assert files(home / "artifacts") == before
    assert set((home / "runs").iterdir()) == runs


def test_an_optimised_version_is_compressed_from_what_it_was_made_from(
    result: Result, home: Path, tmp_path: Path
) -> None:
    place = Home(tmp_path)
    shutil.copytree(home / "artifacts", place.artifacts)
    newest = place.artifacts / "ink" / "1.20"
    assert result.best is not None and result.best.artifact is not None
    shutil.copytree(result.best.artifact, newest)
    origin = json.loads((newest / "provenance.json").read_text())
    origin["parent"] = {"name": "ink", "version": result.best.artifact.name, "by": "optimize", "run": "optimize-ink-1"}
    (newest / "provenance.json").write_text(json.dumps(origin))
    quiet = Screen(as_json=True)
    assert compress_cli._what(quiet, place, "ink") == place.artifacts / "ink" / "1.0"
    assert compress_cli._what(quiet, place, "ink:1.20") == newest
    # It names the run of the form that it holds, whose version it is not.
    shutil.copytree(newest, place.artifacts / "ink" / "0.9")
    form = f"{result.folder.name}/{result.best.name}"
    assert export.choose_version(place.artifacts, "ink", "auto", form) == result.best.artifact.name
    with pytest.raises(RecipeError, match="already holds the run optimize-ink-1"):
        export.choose_version(place.artifacts, "ink", "1.20", form)
    shutil.rmtree(place.artifacts / "ink" / "1.0")
    with pytest.raises(ArchiveError, match=r"ink:1.20 was made from ink:1.0, which is not there any more") as caught:
        compress_cli._what(quiet, place, "ink")
    assert "marina compress ink:1.20" in caught.value.remedy


def test_an_artifact_that_names_itself_as_its_parent_is_refused(home: Path, tmp_path: Path) -> None:
    place = Home(tmp_path)
    folder = Path(shutil.copytree(home / "artifacts" / "ink" / "1.0", place.artifacts / "ink" / "1.0"))
    origin = json.loads((folder / "provenance.json").read_text())
    digest = sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    origin["parent"] = {"name": "ink", "version": "1.0", "weights_sha256": digest, "by": "optimize", "run": "a"}
    (folder / "provenance.json").write_text(json.dumps(origin))
    with pytest.raises(ArchiveError, match=r"ink:1.0 names itself as what it was made from"):
        compress_cli._what(Screen(as_json=True), place, "ink")


def test_a_budget_that_nothing_meets_keeps_nothing(
    result: Result, parent: Trained, options: Options, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A form that loses more than the budget on the validation split is never asked about the test split."""
    loser = dataclasses.replace(
        next(row.form for row in result.rows if row.form is not None),
        validation=dataclasses.replace(result.rows[1].form.validation, loss=10.5),  # type: ignore[union-attr]
        test=None,
    )
    assert not search._fits(loser, 10.0)
    assert search._fits(loser, 10.5)
    monkeypatch.setattr(forms, "complete", pytest.fail)
    assert search._completed(None, loser, 10.0) == (loser, "+10.50 points on the validation split")  # type: ignore[arg-type]


def test_a_form_that_loses_too_much_on_the_test_split_is_refused_there(
    result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = next(row.form for row in result.rows if row.form is not None and row.form.test is not None)
    assert form.test is not None
    unlucky = dataclasses.replace(form, test=dataclasses.replace(form.test, loss=10.01))
    monkeypatch.setattr(forms, "complete", lambda bench, form, budget: unlucky)
    assert search._completed(None, form, 10.0)[1] == "+10.01 points on the test split"  # type: ignore[arg-type]


def test_float_weights_that_lose_too_much_are_refused_whatever_their_engine_does(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They answer where the engine does not fit, and training for int8 changes them too."""
    made = next(row.form for row in result.rows if row.status == "kept" and row.form is not None)
    form = dataclasses.replace(made, engine="torch-folded")
    assert form.test is not None
    shutil.copytree(result.folder / form.name, tmp_path / form.name)
    right = form.test.after / 100
    accuracy = Accuracy(
        split="test", images=form.test.images, reference=right, engine=right, loss_points=0.0,
        interval_points=(0.0, 0.0), budget_points=10.0,
    )  # fmt: skip
    write_torch_engine(tmp_path / form.name, accuracy=accuracy)
    monkeypatch.setattr(forms, "complete", lambda bench, form, budget: form)
    bench: Any = SimpleNamespace(folder=tmp_path)
    assert search._completed(bench, form, 10.0)[1] == ""
    forged(tmp_path / form.name, "accuracy.reference", round(form.test.before / 100 - 0.2, 6))
    assert search._completed(bench, form, 10.0)[1] == (
        "its float weights, for machines without its engine: +20.00 points on the test split"
    )


def test_what_builds_and_times_engines_is_part_of_a_runs_name(
    parent: Trained, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, recipe = ModelSpec.load(parent.artifact), search.pipeline.recorded_recipe
    origin = json.loads((parent.artifact / "provenance.json").read_text())
    tuned = search.tuned(recipe(parent.artifact, origin, None), options)

    def name() -> str:
        return search.run_id(parent.artifact, spec, origin, tuned, options, 1, "cpu")

    names = [name()]
    monkeypatch.setattr(search.engine_spec, "installed_version", lambda package: "0.1")
    names.append(name())
    monkeypatch.setattr(search.engine_spec, "cpu_features", lambda: frozenset({"sse2"}))
    names.append(name())
    monkeypatch.setattr(search.cores, "usable", lambda: 77)
    names.append(name())
    assert len(set(names)) == 4


def test_the_device_of_the_forms_may_be_another_than_that_of_the_recipe(
    parent: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model trained on a GPU may be served by CPUs, which have int8."""
    origin = json.loads((parent.artifact / "provenance.json").read_text())
    recorded = search.pipeline.recorded_recipe(parent.artifact, origin, None)
    spec, free = ModelSpec.load(parent.artifact), search.on_device(recorded, Options(device="auto"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        chosen = {device: search.on_device(free, Options(device=device)) for device in (None, "cpu", "cuda")}
    assert [recipe.train.device for recipe in chosen.values()] == ["auto", "cpu", "cuda"]
    assert search.tuned(chosen["cpu"], Options()).train.device == "cpu"
    bench: Any = SimpleNamespace(recorded=free)
    assert search._student_recipe(bench, Options(device="cpu", student="tiny_cnn")).train.device == "cpu"
    # What the device comes to is part of a run's name, however it was chosen.
    names = {search.run_id(parent.artifact, spec, origin, recipe, Options(), 1, "cpu") for recipe in chosen.values()}
    assert len(names) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="torch sees no GPU") as caught:
        search.compress(parent.artifact, Options(device="cuda"), runs=Path(), artifacts=Path(), report=silent)
    assert caught.value.remedy == "--device cpu or auto"


def test_a_harsh_pruning_is_refused_and_half_of_the_step_is_tried(
    parent: Trained, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_RATIOS", (0.97,))
    monkeypatch.setattr("training.compress.measure._BLOCK_SECONDS", 0.001)
    options = Options(budget=0.0, methods=("prune",), epochs=1, importance="norm")
    found = run(parent, options, home)
    rows = {row.name: row for row in found.rows}
    assert rows["prune-97"].status == "refused"
    assert rows["prune-97"].artifact is None
    assert rows["prune-97"].accuracy is None
    assert "on the validation split" in rows["prune-97"].reason
    assert "prune-48.5" in rows


def test_an_interrupted_search_goes_on(parent: Trained, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.compress.measure._BLOCK_SECONDS", 0.001)
    options = Options(budget=10.0, methods=("sparse",), epochs=3)

    def stop(step: Step) -> None:
        if step.phase == "sparse-75 · train" and step.done > 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(parent, options, home, stop)
    seen: list[Step] = []
    run(parent, options, home, seen.append)
    phases = {step.phase for step in seen}
    assert "sparse-75 · train" in phases
    assert "sparse-50 · train" not in phases
    assert any("resuming in epoch 1 after step 4" in step.note for step in seen)


def test_no_form_is_begun_after_the_time(parent: Trained, home: Path) -> None:
    found = run(parent, Options(budget=10.0, methods=("prune",), epochs=4, minutes=0.0), home)
    assert [(row.name, row.status) for row in found.rows] == [("parent", "parent"), ("more", "not tried")]


def test_int8_of_a_small_network(parent: Trained, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.compress.measure._BLOCK_SECONDS", 0.001)
    found = run(parent, Options(budget=10.0, methods=("int8", "qat"), epochs=1), home)
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {"parent", "int8"}
    row = rows["int8"]
    assert row.status == "kept", row.reason
    assert row.artifact is not None
    engine = EngineSpec.load(row.artifact)
    assert engine is not None
    assert [len(answers) for answers in engine.own_answers] == [3] * len(ModelSpec.load(row.artifact).golden.samples)
    assert row.size is not None
    assert rows["parent"].size is not None
    assert row.size.weights_bytes < 0.5 * rows["parent"].size.weights_bytes


def test_what_cannot_be_made_is_said_and_the_rest_goes_on(
    parent: Trained, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.compress.measure._BLOCK_SECONDS", 0.001)
    monkeypatch.setattr(search, "_SHARES", (0.5,))

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("an operator is not supported\nlong trace")

    monkeypatch.setattr("training.compress.forms.rungs.build", broken)
    found = run(parent, Options(budget=10.0, methods=("bf16", "sparse"), epochs=5), home)
    rows = {row.name: row for row in found.rows}
    assert rows["bf16"].status == "not tried"
    assert rows["sparse-50"].status == "kept"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"methods": "prune,int9"}, "unknown 'int9', did you mean 'int8'"),
        ({"methods": "distil"}, "no student is named"),
        ({"student": "resnet9x"}, "no such architecture, did you mean 'resnet9'"),
        ({"importance": "taylo"}, "did you mean 'taylor'"),
        ({"budget": -1.0}, "the budget is -1 points"),
        ({"epochs": 0}, "0 epochs"),
        ({"distil": {"temperature": 0.0, "alpha": 0.5, "hints": []}}, "--temperature"),
        ({"distil": {"temperature": 1.0, "alpha": 0.5, "hints": ["a"]}}, "--hints"),
    ],
)
def test_wrong_options_are_explained(words: dict[str, object], message: str) -> None:
    usual: dict[str, object] = {
        "budget": 0.5, "methods": None, "student": None, "epochs": None, "student_epochs": None, "minutes": None,
        "importance": "taylor", "distil": {"temperature": 4.0, "alpha": 0.9, "hints": []},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=message) as caught:
        search.read_options(**usual | words)  # type: ignore[arg-type]
    assert caught.value.remedy
