"""`marina evaluate --url` on a real TorchServe: training's own code gives a served model the figures of its artifact."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from handlerlib.calibration import soften
from handlerlib.spec import ModelSpec
from marina import archive, scoring, scoring_view, store, training_cli
from marina.client import InferenceClient, Retries
from marina.errors import ClientError
from marina.home import Home
from marina.server import Server
from support import images
from support.artifacts import write_artifact
from support.commands import project
from support.torchserve import running
from training import html_report, pipeline
from training.evaluate import Evaluation
from training.judge import Judge
from training.progress import silent
from training.scoring import Comparison, Questions

SEEDS = range(48)
pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True, slots=True)
class Served:
    server: Server
    home: Home
    artifact: Path
    photos: Path


def set_temperature(artifact: Path, temperature: float) -> None:
    spec = ModelSpec.load(artifact)
    golden = tuple(
        dataclasses.replace(
            one,
            probabilities=tuple(soften(torch.tensor([one.probabilities]), temperature / spec.temperature)[0].tolist()),
        )
        for one in spec.golden.samples
    )
    changed = dataclasses.replace(
        spec, temperature=temperature, golden=dataclasses.replace(spec.golden, samples=golden)
    )
    (artifact / "model_spec.json").write_text(changed.to_json())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model with a temperature, and photos in class folders."""
    home = Home(project(tmp_path_factory.mktemp("home")))
    artifact = write_artifact(home.artifacts)
    set_temperature(artifact, 1.8)
    packed = archive.pack(artifact, handlers=home.handlers, destination=home.store)
    store.publish(home.store, packed)
    photos = home.root / "photos"
    for seed in SEEDS:
        label = images.LABELS[seed % len(images.LABELS)]
        (photos / label).mkdir(parents=True, exist_ok=True)
        (photos / label / f"{seed}.png").write_bytes(images.photo(seed))
    with running(store.to_serve([packed])) as server:
        yield Served(server, home, artifact, photos)


def ask(served: Served, folder: Path, **changes: Any) -> scoring.Score[Questions, Evaluation, Comparison]:
    options = scoring.Options(name="tiny", folder=folder, **changes)
    with InferenceClient(served.server.inference_url) as client:
        return scoring.score(client, options, served.home, Judge(silent), silent)


def test_the_command_gives_a_served_model_its_artifacts_figures(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MARINA_HOME", str(served.home.root))
    page = tmp_path / "page" / "report.html"
    training_cli.evaluate("tiny", url=served.server.inference_url, data=served.photos, report_file=page, as_json=True)
    found = json.loads(capsys.readouterr().out)
    asked = pipeline.questions(served.artifact, folder=served.photos)
    here = pipeline.evaluate_on(served.artifact, asked, report=silent)
    assert {key: here.metrics[key] for key in found["metrics"]} == pytest.approx(found["metrics"], abs=1e-5)
    assert {"test_roc_auc", "test_ece", "test_loss"} <= set(found["metrics"])
    assert found["confusion"] == [list(row) for row in here.confusion]
    assert (found["answered"], found["versions"], found["failures"]) == (len(SEEDS), {"1.0": len(SEEDS)}, [])
    assert found["comparison"]["changed"] == 0
    assert found["comparison"]["largest"] <= 1e-5
    assert not found["comparison"]["differs"]
    assert served.server.inference_url in page.read_text(encoding="utf-8")


def test_the_command_ends_with_the_exit_code_of_what_went_wrong(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MARINA_HOME", str(served.home.root))
    set_temperature(served.artifact, 1.2)
    try:
        with pytest.raises(typer.Exit) as ended:
            training_cli.evaluate("tiny", url=served.server.inference_url, data=served.photos)
    finally:
        set_temperature(served.artifact, 1.8)
    assert ended.value.exit_code == 5
    said = capsys.readouterr()
    assert "artifact here" in said.out and "test_ece" in said.out
    assert "answers otherwise than" in said.err


def test_every_answer_has_the_values_of_evaluation(served: Served) -> None:
    asked = pipeline.questions(served.artifact, folder=served.photos)
    here = pipeline.evaluate_on(served.artifact, asked)
    score = ask(served, served.photos, version="1.0", concurrency=16)
    assert score.answered.names == tuple(one.name for one in here.predictions)
    np.testing.assert_allclose(np.exp(score.evaluation.log_NK), np.exp(here.log_NK), atol=1e-5)


def test_without_an_artifact_the_answers_are_judged_all_the_same(served: Served, tmp_path: Path) -> None:
    options = scoring.Options(name="tiny", folder=served.photos)
    with InferenceClient(served.server.inference_url) as client:
        score = scoring.score(client, options, Home(tmp_path), Judge(silent), silent)
    assert score.evaluation.labels == images.LABELS
    assert score.reference is None and score.comparison is None
    assert "no artifact of tiny 1.0 here" in score.notes[0]


def test_samples_without_an_answer_are_counted_named_and_fail_the_command(served: Served, tmp_path: Path) -> None:
    for number, data in enumerate((images.photo(1), images.truncated(), images.photo(2), b"\x00\x01not an image\xff")):
        (tmp_path / "photos" / "red").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "red" / f"{number}.png").write_bytes(data)
    score = ask(served, tmp_path / "photos")
    assert [(one.name, one.status) for one in score.answered.failures] == [("red/1.png", 422), ("red/3.png", 415)]
    assert score.answered.names == ("red/0.png", "red/2.png")
    assert score.evaluation.metrics["test_images"] == 2
    error = scoring_view.against(score, served.server.inference_url)
    assert error is not None and error.exit_code == 7
    assert str(error).startswith("2 of 4 samples got no answer, the first: red/1.png: ")
    page = html_report.render(training_cli.served_subject(score, "http://x"), score.evaluation, score.asked.read())
    assert "2 of 4 samples got no answer." in page and "red/3.png" in page


def test_other_answers_than_the_artifacts_fail_the_command(served: Served) -> None:
    set_temperature(served.artifact, 1.2)
    try:
        score = ask(served, served.photos)
    finally:
        set_temperature(served.artifact, 1.8)
    assert score.comparison is not None and score.comparison.differs
    assert score.comparison.changed == 0
    error = scoring_view.against(score, served.server.inference_url)
    assert error is not None and error.exit_code == 5
    assert "answers otherwise than" in str(error) and "allowed is 0.0001 in any probability" in str(error)


def test_an_unknown_model_and_a_dead_address(served: Served) -> None:
    options = scoring.Options(name="other", folder=served.photos)
    with InferenceClient(served.server.inference_url) as client, pytest.raises(ClientError, match="no such model"):
        scoring.score(client, options, served.home, Judge(silent), silent)
    asked = pipeline.questions(served.artifact, folder=served.photos)
    with (
        InferenceClient("http://127.0.0.1:9", retries=Retries(count=0)) as nobody,
        pytest.raises(ClientError, match="none of 20 requests was answered, the last: nothing listens"),
    ):
        scoring.ask(
            nobody, "tiny", asked.read(), total=asked.total, version=None, top_k=3, concurrency=4, report=silent
        )
