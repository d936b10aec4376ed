"""The text handler on a real model: ways to send a text, and errors that stay with their own request."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from handlerlib import inputs, loading
from handlerlib.text import Reader
from support import texts
from support.context import Reply, ask, context
from text_classifier import TextClassifier

TEXT = "The coach spoke of the season after a long match"
PLAIN = {"Content-Type": "text/plain"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts.train(tmp_path_factory.mktemp("texts")).artifact


@pytest.fixture(scope="module")
def started(artifact: Path) -> tuple[TextClassifier, Any]:
    ctx = context(artifact, batch_size=16)
    handler = TextClassifier()
    handler.initialize(ctx)
    return handler, ctx


def first(reply: Reply) -> list[tuple[str, float]]:
    """First label and probability of each text of a request."""
    assert reply.status == 200, reply
    return [(row[0]["label"], row[0]["probability"]) for row in json.loads(reply.body)["predictions"]]


def problem(reply: Reply, status: int) -> str:
    document = json.loads(reply.body)
    assert (reply.status, reply.content_type, document["status"]) == (status, "application/problem+json", status), reply
    return str(document["detail"])


def test_every_way_to_send_a_text_gives_the_same_answer(started: tuple[TextClassifier, Any]) -> None:
    handler, ctx = started
    data, b64 = TEXT.encode(), base64.b64encode(TEXT.encode()).decode()
    ways: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"body": data}, PLAIN),
        ({"body": data}, {}),
        ({"body": data}, {"Content-Type": "application/octet-stream"}),
        ({"body": data}, {"Content-Type": "text/plain; charset=UTF-8"}),
        ({"body": TEXT}, PLAIN),
        ({"body": TEXT.encode("utf-16")}, {"Content-Type": 'text/plain; charset="utf-16"'}),
        ({"data": bytearray(data)}, {"Content-Type": "multipart/form-data; boundary=x"}),
        ({"body": json.dumps({"instances": [TEXT]}).encode()}, JSON),
        ({"body": json.dumps({"instances": [{"text": TEXT}]}).encode()}, JSON),
        ({"body": {"instances": [{"b64": b64}]}}, JSON),
    ]
    answers = [first(ask(handler, ctx, [row], headers)[0]) for row, headers in ways]
    assert answers[0][0][0] == "Sports"
    assert answers == [answers[0]] * len(ways)


def test_answers_are_evaluations(started: tuple[TextClassifier, Any], artifact: Path) -> None:
    handler, ctx = started
    model = loading.load(artifact, torch.device("cpu"))
    reading = inputs.of(model.spec)
    sent = [text for _, text in texts.english() + texts.chinese()]
    replies = ask(handler, ctx, [{"body": text.encode()} for text in sent], PLAIN | {"X-Top-K": "2"})
    for text, reply in zip(sent, replies, strict=True):
        alone = model.probabilities(reading.stack([reading.load(text.encode())]))[0]
        for row in json.loads(reply.body)["predictions"][0]:
            assert row["probability"] == pytest.approx(float(alone[row["index"]]), abs=1e-6)


@pytest.mark.parametrize(
    ("row", "headers", "status", "detail"),
    [
        ({"body": b""}, PLAIN, 400, "the text is empty"),
        ({}, PLAIN, 400, "send the text as the body"),
        ({"body": b"{"}, JSON, 400, "not valid JSON"),
        ({"body": b'{"instances": []}'}, JSON, 400, "at least one"),
        ({"body": b'{"instances": [7]}'}, JSON, 400, "instance 0 must be a string"),
        ({"body": b'{"instances": ["a", {"text": 1}]}'}, JSON, 400, "instance 1 must be a string"),
        ({"body": b'{"instances": ["\\ud800"]}'}, JSON, 400, "surrogate"),
        ({"body": b'{"instances": [""]}'}, JSON, 400, "the text is empty"),
        ({"body": b"x" * 2001}, PLAIN, 413, "2001 bytes, at most 2000"),
        ({"body": json.dumps({"instances": ["x"] * 9}).encode()}, JSON, 413, "at most 8"),
        ({"body": "café".encode("latin-1")}, PLAIN, 415, "no 'utf-8'"),
        ({"body": b"x"}, {"Content-Type": "text/plain; charset=klingon"}, 415, "unknown charset"),
        ({"body": b"\xff\xff\xff"}, {"Content-Type": "text/plain; charset=utf-16"}, 415, "no 'utf-16'"),
        ({"body": b"\x89PNG\r\n"}, {"Content-Type": "image/png"}, 415, "image/png is not supported"),
        ({"body": bytes(range(256))}, PLAIN, 415, "no 'utf-8'"),
        ({"body": b" <br/> ... \n"}, PLAIN, 422, "nothing is left"),
        ({"body": b'{"instances": ["fine", "!!!"]}'}, JSON, 422, "instance 1: nothing is left"),
    ],
)
def test_errors_are_the_requests_own(
    started: tuple[TextClassifier, Any], row: dict[str, Any], headers: dict[str, str], status: int, detail: str
) -> None:
    handler, ctx = started
    (reply,) = ask(handler, ctx, [row], headers)
    assert detail in problem(reply, status)


def test_one_bad_text_among_others_hurts_nobody(started: tuple[TextClassifier, Any]) -> None:
    handler, ctx = started
    good = [{"body": text.encode()} for _, text in texts.english()[:20]]
    expected = [first(reply) for reply in ask(handler, ctx, good, PLAIN)]
    for poison, status in ((b"", 400), (b"x" * 2001, 413), (b"\xff\xfe\xfd", 415), (b"...", 422)):
        rows = [*good[:7], {"body": poison}, *good[7:]]
        replies = ask(handler, ctx, rows, PLAIN)
        problem(replies.pop(7), status)
        assert [first(reply) for reply in replies] == expected


def test_a_changed_rule_of_normalisation_is_noticed_at_the_start(artifact: Path) -> None:
    """The rules are data: with other ones the same weights give other answers, and the golden samples say so."""
    model = loading.load(artifact, torch.device("cpu"))
    assert model.spec.text is not None
    reading = inputs.Texts(Reader(dataclasses.replace(model.spec.text, word_ngrams=(), case="keep")), model.spec.limits)

    def answer(data: bytes) -> torch.Tensor:
        return model.probabilities(reading.stack([reading.load(data)]))[0]

    with pytest.raises(loading.SelfTestFailed, match="golden sample"):
        loading.self_test(model, answer, artifact)


def test_a_text_of_unknown_terms_is_answered_by_the_classes_frequencies(started: tuple[TextClassifier, Any]) -> None:
    handler, ctx = started
    (found,) = first(ask(handler, ctx, [{"body": "ёж".encode()}], PLAIN)[0])
    assert found[1] < 0.8


def test_a_worker_for_texts_imports_neither_pillow_nor_torchvision(artifact: Path, handlers: Path) -> None:
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "import text_classifier\n"
        "from handlerlib import inputs, loading\n"
        f"folder = Path({str(artifact)!r})\n"
        "model = loading.load(folder, torch.device('cpu'))\n"
        "reading = inputs.of(model.spec)\n"
        "loading.self_test(model, lambda data: model.probabilities(reading.stack([reading.load(data)]))[0], folder)\n"
        "loading.warm_up(model, [1, 4])\n"
        "heavy = [name for name in ('torchvision', 'PIL', 'sklearn', 'sympy') if name in sys.modules]\n"
        "sys.exit(', '.join(heavy) or None)\n"
    )
    environment = dict(os.environ) | {"PYTHONPATH": str(handlers)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
