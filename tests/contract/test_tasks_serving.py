"""Labels and values from recipe to server: one TorchServe answers as evaluation says, for images and for texts."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from handlerlib.spec import ModelSpec
from marina import archive, golden, scoring, scoring_view, shadow, store, verify
from marina.client import InferenceClient
from marina.home import Home
from marina.server import Server
from support import texts
from support.commands import project
from support.torchserve import running
from training import pipeline, truth
from training.config import Recipe, load_recipe
from training.evaluate import Evaluation
from training.judge import Judge
from training.progress import silent
from training.sources import png

pytestmark = pytest.mark.timeout(600)
LABELS = ("bright", "wide")
TARGETS = ("brightness", "area")


@dataclass(frozen=True, slots=True)
class Served:
    server: Server
    home: Home
    artifacts: dict[str, Path]
    table: Path

    def ask(self, name: str, data: bytes, **headers: str) -> requests.Response:
        url = f"{self.server.inference_url}/predictions/{name}"
        return requests.post(url, data=data, headers=headers, timeout=60)


def write_table(folder: Path, count: int = 72) -> Path:
    """Bars of different width and brightness: `bars.csv` with labels and numbers, beside the images."""
    draws = np.random.default_rng(0)
    lines = ["image,bright,wide,brightness,area"]
    for number in range(count):
        width, grey = 2 + number % 12, 40 + 17 * (number * 5 % 12)
        pixels = draws.integers(0, 20, (16, 16), dtype=np.uint8)
        pixels[:, :width] += np.uint8(grey)
        (folder / f"{number}.png").write_bytes(png(pixels))
        lines.append(f"{number}.png,{int(grey > 130)},{int(width > 7)},{grey},{width * 16}")
    (folder / "bars.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "bars.csv"


def image_recipe(table: Path, task: str, columns: str) -> Recipe:
    path = table.with_name(f"{task}.toml")
    path.write_text(
        f'name = "{task}"\ntask = "{task}"\n[data]\nsource = "image_csv"\nroot = "{table}"\n{columns}\n'
        '[model]\narchitecture = "mlp"\n[train]\nepochs = 6\nbatch_size = 16\nthreads = 1\ndevice = "cpu"\n',
        encoding="utf-8",
    )
    return load_recipe(str(path))


def text_recipe(folder: Path) -> Recipe:
    """Topics of short texts, several in one column; a third of them has none."""
    rows = ["topics,text"]
    for number, (label, text) in enumerate(texts.english()):
        topics = ("", label, f"{label};Long" if len(text) > 50 else label)[number % 3]
        rows.append(f'{topics},"{text}"')
    (folder / "topics.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    path = folder / "topics.toml"
    path.write_text(
        f'name = "topics"\ntask = "multi-label"\n[data]\nsource = "csv"\nroot = "{folder / "topics.csv"}"\n'
        'label_column = "topics"\nlabel_separator = ";"\n[text]\nleast_texts = 1\n[model]\narchitecture = "embedding_bag"\n'
        'width = 8\n[train]\nepochs = 2\nbatch_size = 16\nlearning_rate = 0.01\nthreads = 1\ndevice = "cpu"\n',
        encoding="utf-8",
    )
    return load_recipe(str(path))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("bars")
    home = Home(project(tmp_path_factory.mktemp("home")))
    table = write_table(folder)
    recipes = (
        image_recipe(table, "multi-label", f"label_columns = {json.dumps(LABELS)}"),
        image_recipe(table, "regression", f"target_columns = {json.dumps(TARGETS)}"),
        text_recipe(folder),
    )
    trained = {
        recipe.name: pipeline.train(recipe, runs=home.runs, artifacts=home.artifacts, report=silent).artifact
        for recipe in recipes
    }
    packed = []
    for artifact in trained.values():
        packed.append(archive.pack(artifact, handlers=home.handlers, destination=home.store))
        store.publish(home.store, packed[-1])
    with running(store.to_serve(packed)) as server:
        yield Served(server, home, trained, table)


def evaluation_of(served: Served, name: str) -> tuple[ModelSpec, Evaluation, dict[str, bytes]]:
    artifact = served.artifacts[name]
    samples = {sample.name: sample.data for sample in pipeline.test_samples(artifact)}
    return ModelSpec.load(artifact), pipeline.evaluate(artifact), samples


def predictions(answer: requests.Response, task: str) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert document["task"] == task
    (found,) = document["predictions"]
    return list(found)


def test_golden_samples_over_http(served: Served) -> None:
    with InferenceClient(served.server.inference_url) as client:
        for model in served.server.models:
            golden.prove(model, client)


@pytest.mark.parametrize(("name", "kind"), [("multi-label", "image/png"), ("topics", "text/plain")])
def test_every_label_above_its_threshold_is_answered_as_evaluation_says(served: Served, name: str, kind: str) -> None:
    spec, found, samples = evaluation_of(served, name)
    assert len(found.predictions) > 10 and spec.thresholds
    for row, one in enumerate(found.predictions):
        answer = predictions(served.ask(name, samples[one.name], **{"Content-Type": kind}), "multi-label")
        assert {item["label"] for item in answer} == set(truth.parts(one.predicted))
        for item in answer:
            assert item["probability"] == pytest.approx(found.outputs_NK[row, item["index"]], abs=1e-5)
            assert item["threshold"] == spec.thresholds[item["index"]]
        assert [item["probability"] for item in answer] == sorted((p["probability"] for p in answer), reverse=True)


def test_a_number_of_labels_that_is_asked_for_is_given_whatever_the_thresholds(served: Served) -> None:
    _, found, samples = evaluation_of(served, "multi-label")
    one = found.predictions[0]
    both = predictions(served.ask("multi-label", samples[one.name], **{"X-Top-K": "2"}), "multi-label")
    assert {item["label"] for item in both} == set(LABELS)
    assert len(predictions(served.ask("multi-label", samples[one.name], **{"X-Top-K": "1"}), "multi-label")) == 1


def test_every_value_is_answered_as_evaluation_says(served: Served) -> None:
    spec, found, samples = evaluation_of(served, "regression")
    for row, one in enumerate(found.predictions):
        answer = predictions(served.ask("regression", samples[one.name]), "regression")
        assert [(item["target"], item["index"]) for item in answer] == [(TARGETS[0], 0), (TARGETS[1], 1)]
        for item, value, scaling in zip(answer, found.outputs_NK[row], spec.scaling, strict=True):
            assert item["value"] == pytest.approx(value, abs=1e-5 * scaling.scale)


@pytest.mark.parametrize("name", ["multi-label", "regression", "topics"])
def test_a_served_model_has_its_artifacts_figures(served: Served, name: str) -> None:
    options = scoring.Options(name=name, concurrency=4)
    with InferenceClient(served.server.inference_url) as client:
        score = scoring.score(client, options, served.home, Judge(silent), silent)
    assert score.evaluation.metrics == pytest.approx(
        pipeline.evaluate(served.artifacts[name]).metrics, abs=1e-4, rel=1e-4
    )
    assert score.comparison is not None and not score.comparison.differs and score.comparison.changed == 0
    assert scoring_view.against(score, "http://x") is None


def test_other_rows_of_the_same_columns_can_be_scored(served: Served) -> None:
    for name in ("multi-label", "regression"):
        asked = pipeline.questions(served.artifacts[name], folder=served.table)
        assert asked.total == 72
        assert pipeline.evaluate_on(served.artifacts[name], asked).metrics["test_images"] == 72


def test_errors_stay_with_their_request(served: Served) -> None:
    refused = served.ask("regression", b"no image")
    assert (refused.status_code, refused.headers["Content-Type"]) == (415, "application/problem+json")
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    assert served.ask("multi-label", buffer.getvalue()).status_code == 200


@pytest.mark.parametrize("name", ["multi-label", "regression"])
def test_archives_verify_and_a_changed_threshold_or_scale_does_not(served: Served, name: str, tmp_path: Path) -> None:
    artifact = served.artifacts[name]
    path = served.home.store / f"{name}-{artifact.name}.mar"
    report = verify.verify(path)
    assert report.passed, report.findings
    subject = verify.Subject(path, tmp_path, "python")
    spec, sample = subject.spec, subject.spec.golden.samples[0]
    right = dict(enumerate(sample.outputs))
    assert golden.mismatch(spec, sample, right, spec.golden.tolerance) == ""
    off = {index: value + 2 * spec.golden.tolerance * spec.units[index] for index, value in right.items()}
    assert "expected" in golden.mismatch(spec, sample, off, spec.golden.tolerance)
    if name == "multi-label":
        given = {index for index, p in right.items() if p >= spec.thresholds[index]}
        assert golden.misses_labels(spec, sample, given, 1e-4) == ""
        assert "the threshold is" in golden.misses_labels(spec, sample, set(right) - given, 1e-4)


@pytest.mark.parametrize("name", ["multi-label", "regression"])
def test_a_version_agrees_with_itself_in_a_shadow(served: Served, name: str) -> None:
    _, _, samples = evaluation_of(served, name)
    version = served.artifacts[name].name
    inputs = list(samples.values())[:8]
    seen = shadow.compare(
        served.server.inference_url, name, version, version, golden=inputs, recorded=[], live=[]
    )  # fmt: skip
    assert (seen.compared, seen.alike) == (8, 8)
