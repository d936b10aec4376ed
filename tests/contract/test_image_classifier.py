"""A packed archive in a real TorchServe, asked as clients ask."""

from __future__ import annotations

import base64
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from torch import device

from handlerlib import imaging, loading
from handlerlib.spec import ModelSpec
from marina import archive, golden, store
from marina.client import InferenceClient
from marina.server import Server
from support import images
from support.artifacts import write_artifact
from support.torchserve import running

SEEDS = range(60)
STACK = re.compile(r"Traceback|File \"|\.py\b|/tmp|at org\.|at java\.|site-packages")


@dataclass(frozen=True, slots=True)
class Served:
    server: Server
    artifact: Path
    spec: ModelSpec
    expected: dict[int, list[float]]
    """Seed of a photo -> probabilities computed in this process, one image at a time."""

    @property
    def url(self) -> str:
        return f"{self.server.inference_url}/predictions/tiny"

    def figure(self, name: str, label: str = "") -> float:
        """A metric of TorchServe's own endpoint; 0 when it is not there."""
        text = requests.get(f"{self.server.metrics_url}/metrics", timeout=10).text
        found = re.search(rf"^{name}\{{[^}}]*{re.escape(label)}[^}}]*\}} (\S+)", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def eventually(self, holds: Callable[[], bool]) -> None:
        """Figures are sent once a second, after the answers."""
        deadline = time.monotonic() + 15
        while not holds():
            assert time.monotonic() < deadline, self.server.log_tail()
            time.sleep(0.1)

    def check(self, seed: int, labels: list[dict[str, Any]]) -> None:
        """The labels are this photo's, in the right order, with its probabilities."""
        row = self.expected[seed]
        ranked = sorted(range(len(row)), key=lambda index: -row[index])[: len(labels)]
        assert [item["index"] for item in labels] == ranked, seed
        for item in labels:
            assert item["label"] == self.spec.labels[item["index"]]
            assert item["probability"] == pytest.approx(row[item["index"]], abs=1e-5), seed


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, handlers: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("classifier")
    artifact = write_artifact(folder)
    packed = archive.pack(artifact, handlers=handlers, destination=folder / "store")
    store.publish(folder / "store", packed)
    model = loading.load(artifact, device("cpu"))
    spec = model.spec
    expected = {
        seed: model.probabilities(imaging.batch([images.photo(seed)], spec.preprocess, spec.limits))[0].tolist()
        for seed in SEEDS
    }
    # The photos must be told apart by their answers, or mixed answers would go unnoticed.
    assert len({tuple(round(value, 4) for value in row) for row in expected.values()}) == len(expected)
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # compiled files tell where code was imported from
        with running(store.to_serve([packed]), fork_server=True) as server:
            yield Served(server, artifact, spec, expected)


def problem(answer: requests.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    assert document["instance"] == answer.headers["x-request-id"]
    assert not STACK.search(answer.text)
    return document


def as_json(*encoded: bytes, **fields: Any) -> dict[str, Any]:
    document = {"instances": [{"b64": base64.b64encode(data).decode()} for data in encoded], **fields}
    return {"data": json.dumps(document), "headers": {"Content-Type": "application/json"}}


def test_golden_samples_over_http(served: Served) -> None:
    with InferenceClient(served.server.inference_url) as client:
        for model in served.server.models:
            golden.prove(model, client)


def test_every_way_to_send_one_image(served: Served) -> None:
    photo = images.photo(5)
    ways: list[dict[str, Any]] = [
        {"data": photo},
        {"data": photo, "headers": {"Content-Type": "image/png"}},
        {"data": photo, "headers": {"Content-Type": "application/octet-stream"}},
        {"files": {"data": photo}},
        {"files": {"file": ("photo.png", photo, "image/png")}},
        as_json(photo),
    ]
    for way in ways:
        answer = requests.post(served.url, **way, timeout=30)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"]
        document = answer.json()
        assert (document["model"], document["version"]) == ("tiny", "1.0")
        served.check(5, document["predictions"][0])


def test_top_k_by_header_field_and_json(served: Served) -> None:
    photo = images.photo(1)
    for way in (
        {"data": photo, "headers": {"X-Top-K": "2"}},
        {"files": {"data": photo}, "data": {"top_k": "2"}},
        as_json(photo, top_k=2),
    ):
        (labels,) = requests.post(served.url, **way, timeout=30).json()["predictions"]
        assert len(labels) == 2
        served.check(1, labels)


def test_one_list_per_instance(served: Served) -> None:
    document = requests.post(served.url, **as_json(*(images.photo(seed) for seed in range(8))), timeout=30).json()
    for seed, labels in enumerate(document["predictions"]):
        served.check(seed, labels)


@pytest.mark.parametrize(
    ("way", "status"),
    [
        ({"data": b""}, 400),
        ({"data": "{", "headers": {"Content-Type": "application/json"}}, 400),
        ({"data": "[]", "headers": {"Content-Type": "application/json"}}, 400),
        ({"files": {"picture": b"x"}}, 400),
        ({"data": b"\xff\xd8\xff" + b"x" * 200_001}, 413),
        (as_json(*[b"x"] * 9), 413),
        ({"data": b"hello"}, 415),
        ({"data": b"<svg/>", "headers": {"Content-Type": "image/svg+xml"}}, 415),
        ({"data": "plain", "headers": {"Content-Type": "text/plain"}}, 415),
        ({"data": images.truncated("JPEG")}, 422),
        ({"data": images.truncated("PNG")}, 422),
        ({"data": images.bomb()}, 422),
        ({"data": images.photo(1), "headers": {"X-Top-K": "0"}}, 422),
        ({"data": images.photo(1), "headers": {"X-Top-K": "many"}}, 422),
        (as_json(images.photo(1), top_k=-1), 422),
        ({"files": {"data": images.photo(1)}, "data": {"top_k": "1.5"}}, 422),
    ],
)
def test_errors_are_the_clients_own(served: Served, way: dict[str, Any], status: int) -> None:
    problem(requests.post(served.url, **way, timeout=30), status)


def test_one_poison_in_a_full_batch(served: Served) -> None:
    """31 good ones and a poison at once, over and over, so that they meet in batches."""
    poisons = [(b"hello", 415), (images.truncated(), 422), (images.bomb(), 422), (b"", 400)]
    with ThreadPoolExecutor(32) as pool, requests.Session() as session:
        session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=32))
        for turn in range(8):
            data, status = poisons[turn % len(poisons)]
            bad = pool.submit(session.post, served.url, data=data, timeout=60)
            good = [pool.submit(session.post, served.url, data=images.photo(seed), timeout=60) for seed in range(31)]
            for seed, future in enumerate(good):
                served.check(seed, future.result().json()["predictions"][0])
            problem(bad.result(), status)
    # Batches of more than one were formed, or this test would prove nothing.
    served.eventually(
        lambda: served.figure("marina_batch_size_bucket", 'le="1"') < served.figure("marina_batch_size_count")
    )


def test_ten_thousand_mixed_requests_give_no_answer_to_the_wrong_one(served: Served) -> None:
    photos = {seed: images.photo(seed) for seed in SEEDS}
    truncated, bomb = images.truncated("JPEG"), images.bomb()
    kinds: list[tuple[int, Callable[[requests.Session, int], str]]] = []

    def post(session: requests.Session, **way: Any) -> requests.Response:
        return session.post(served.url, **way, timeout=60)

    def good(session: requests.Session, seed: int) -> str:
        served.check(seed, post(session, data=photos[seed]).json()["predictions"][0])
        return "one image"

    def few_labels(session: requests.Session, seed: int) -> str:
        (labels,) = post(session, data=photos[seed], headers={"X-Top-K": "1"}).json()["predictions"]
        assert len(labels) == 1
        served.check(seed, labels)
        return "top 1"

    def several(session: requests.Session, seed: int) -> str:
        chosen = [seed, (seed + 7) % len(SEEDS), (seed + 11) % len(SEEDS)]
        rows = post(session, **as_json(*(photos[item] for item in chosen))).json()["predictions"]
        for item, labels in zip(chosen, rows, strict=True):
            served.check(item, labels)
        return "three images"

    def poison(session: requests.Session, seed: int) -> str:
        data, status = [(b"hello", 415), (truncated, 422), (bomb, 422), (b"", 400)][seed % 4]
        problem(post(session, data=data), status)
        return f"poison {status}"

    kinds = [(70, good), (10, few_labels), (10, several), (10, poison)]
    draw = random.Random(0)
    plan = [
        (draw.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])[0], draw.choice(SEEDS))
        for _ in range(10_000)
    ]

    def client(part: int) -> Counter[str]:
        counted: Counter[str] = Counter()
        with requests.Session() as session:
            for kind, seed in plan[part::16]:
                counted[kind(session, seed)] += 1
        return counted

    with ThreadPoolExecutor(16) as pool:
        counted = sum(pool.map(client, range(16)), Counter())
    assert counted.total() == 10_000
    assert len(counted) >= 6


def test_the_workers_code_comes_from_the_archive(served: Served) -> None:
    """An installed handlerlib must not shadow the archive's own."""
    import psutil

    assert served.server.pid is not None
    workers = [
        process
        for process in psutil.Process(served.server.pid).children(recursive=True)
        if any("model_service_worker" in part for part in process.cmdline())
    ]
    assert workers
    for worker in workers:
        folder = Path(worker.cwd())
        assert (folder / "handlerlib" / "worker.py").is_file()
        assert [*(folder / "handlerlib" / "__pycache__").glob("worker.*.pyc")], "it was not imported from here"


def test_stage_timings_arrive_in_seconds(served: Served) -> None:
    requests.post(served.url, data=images.photo(1), timeout=30)
    for stage in ("decode", "preprocess", "inference", "postprocess"):
        served.eventually(lambda stage=stage: served.figure(f"marina_{stage}_seconds_count") > 0)
        mean = served.figure(f"marina_{stage}_seconds_sum") / served.figure(f"marina_{stage}_seconds_count")
        assert 0 < mean < 1
        assert served.figure(f"marina_{stage}_seconds_bucket", 'le="10"') > 0
