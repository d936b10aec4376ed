"""A text model in a real TorchServe, asked as clients ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from marina import archive, golden, scoring, store
from marina.client import InferenceClient
from marina.home import Home
from marina.server import Server
from support import texts
from support.torchserve import running
from training import pipeline
from training.evaluate import Evaluation
from training.judge import Judge
from training.progress import silent


@dataclass(frozen=True, slots=True)
class Served:
    server: Server
    home: Home
    artifact: Path
    evaluation: Evaluation

    @property
    def url(self) -> str:
        return f"{self.server.inference_url}/predictions/news"

    def ask(self, data: bytes, **headers: str) -> requests.Response:
        return requests.post(self.url, data=data, headers={"Content-Type": "text/plain", **headers}, timeout=60)

    def score(self, name: str, data: Path | None = None) -> scoring.Score[Any, Evaluation, Any]:
        with InferenceClient(self.server.inference_url) as client:
            return scoring.score(client, scoring.Options(name=name, folder=data), self.home, Judge(silent), silent)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, handlers: Path) -> Iterator[Served]:
    """`news`, a bag of terms from a .csv, and `articles`, convolutions from class folders."""
    home = Home(tmp_path_factory.mktemp("texts"))
    artifact = texts.train(home.root).artifact
    packed = [
        archive.pack(one, handlers=handlers, destination=home.store)
        for one in (artifact, texts.train_folders(home.root).artifact)
    ]
    for one in packed:
        store.publish(home.store, one)
    with running(store.to_serve(packed)) as server:
        yield Served(server, home, artifact, pipeline.evaluate(artifact))


def first(answer: requests.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["predictions"][0][0]
    return found


def test_golden_samples_over_http(served: Served) -> None:
    with InferenceClient(served.server.inference_url) as client:
        for model in served.server.models:
            golden.prove(model, client)


def test_every_test_text_is_answered_as_evaluation_says(served: Served) -> None:
    samples = {sample.name: sample for sample in pipeline.test_samples(served.artifact)}
    assert len(served.evaluation.predictions) == len(samples) > 10
    with ThreadPoolExecutor(8) as pool:
        sent = [(one, pool.submit(served.ask, samples[one.name].data)) for one in served.evaluation.predictions]
        for one, answer in sent:
            best = first(answer.result())
            assert best["label"] == one.predicted
            assert best["probability"] == pytest.approx(one.probability, abs=1e-5)


@pytest.mark.parametrize("name", ["news", "articles"])
def test_both_architectures_serve_the_values_of_their_evaluation(served: Served, name: str) -> None:
    score = served.score(name)
    assert score.answered.failures == ()
    assert score.comparison.changed == 0 and not score.comparison.differs
    assert score.evaluation.metrics["test_accuracy"] > 0.7


def test_a_file_of_labelled_rows_is_scored_as_folders_of_the_same_texts_are(served: Served, tmp_path: Path) -> None:
    rows = texts.english()[::5] + texts.chinese()[::5]
    csv = served.score("news", texts.write_csv(tmp_path / "more.csv", rows))
    folders = served.score("news", texts.write_folders(tmp_path / "more", rows))
    assert csv.evaluation.metrics == pytest.approx(folders.evaluation.metrics, abs=1e-6)
    assert csv.comparison.samples == len(rows) and not csv.comparison.differs


@pytest.mark.parametrize(("label", "text"), [("World", "总统与外交部长在北京谈判"), ("Sports", "教练说球队赢得了比赛")])
def test_chinese(served: Served, label: str, text: str) -> None:
    utf_8 = first(served.ask(text.encode()))
    assert utf_8["label"] == label
    assert first(served.ask(text.encode("gb18030"), **{"Content-Type": "text/plain; charset=gb18030"})) == utf_8
    body = json.dumps({"instances": [text, {"text": text}]})
    both = requests.post(served.url, data=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert [row[0] for row in both.json()["predictions"]] == [utf_8, utf_8]


def test_bad_texts_in_full_batches_get_their_own_errors(served: Served) -> None:
    bad: list[tuple[bytes, dict[str, str], int]] = [
        (b"", {}, 400),
        (b"x" * 2001, {}, 413),
        (b"caf\xe9", {}, 415),
        (b"text", {"Content-Type": "image/png"}, 415),
        (b"<p> ... </p>", {}, 422),
        (b"{", {"Content-Type": "application/json"}, 400),
    ]
    good = b"The coach spoke of the season after a long match"
    expected = first(served.ask(good))
    with ThreadPoolExecutor(24) as pool:
        refused = [(pool.submit(served.ask, data, **headers), status) for data, headers, status in bad * 4]
        answered = [pool.submit(served.ask, good) for _ in range(72)]
        for future, status in refused:
            answer = future.result()
            assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
            assert answer.json()["status"] == status
        for future in answered:
            best = first(future.result())
            assert best["label"] == expected["label"]
            assert best["probability"] == pytest.approx(expected["probability"], abs=1e-6)
