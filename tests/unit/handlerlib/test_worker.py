from __future__ import annotations

import base64
import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from handlerlib import imaging, loading
from handlerlib.cores import Board, Cores
from handlerlib.spec import ModelSpec
from image_classifier import ImageClassifier
from support import images
from support.artifacts import write_artifact
from support.context import Context, Reply, ask, context


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture
def started(artifact: Path) -> tuple[ImageClassifier, Any]:
    ctx = context(artifact, batch_size=32)
    handler = ImageClassifier()
    handler.initialize(ctx)
    return handler, ctx


def predictions(reply: Reply) -> list[list[dict[str, Any]]]:
    assert reply.status == 200, reply
    assert reply.content_type == "application/json"
    found: list[list[dict[str, Any]]] = json.loads(reply.body)["predictions"]
    return found


def problem(reply: Reply, status: int) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(reply.body)
    assert (reply.status, reply.content_type) == (status, "application/problem+json"), reply
    assert set(document) == {"type", "title", "status", "detail", "instance"}
    assert document["status"] == status
    return document


def test_golden_samples_answer_as_recorded(started: tuple[ImageClassifier, Any], artifact: Path) -> None:
    handler, ctx = started
    spec = ModelSpec.load(artifact)
    rows = [{"body": bytearray((artifact / sample.file).read_bytes())} for sample in spec.golden.samples]
    for reply, sample in zip(ask(handler, ctx, rows, {"X-Top-K": "3"}), spec.golden.samples, strict=True):
        document = json.loads(reply.body)
        assert (document["model"], document["version"]) == ("tiny", "1.0")
        (labels,) = predictions(reply)
        assert [item["probability"] for item in labels] == sorted((i["probability"] for i in labels), reverse=True)
        for item in labels:
            assert item["label"] == spec.labels[item["index"]]
            assert item["probability"] == pytest.approx(sample.probabilities[item["index"]], abs=1e-5)


def test_one_poison_among_32_hurts_nobody(started: tuple[ImageClassifier, Any]) -> None:
    handler, ctx = started
    good = [{"body": bytearray(images.photo(seed))} for seed in range(32)]
    for poison in (b"not an image", images.truncated("JPEG"), images.bomb(), b""):
        expected = [predictions(reply) for reply in ask(handler, ctx, good)]
        rows = [*good[:13], {"body": bytearray(poison)}, *good[14:]]
        replies = ask(handler, ctx, rows)
        document = problem(replies[13], replies[13].status)
        assert 400 <= document["status"] < 500
        assert document["instance"] == "request-13"
        for index in (*range(13), *range(14, 32)):
            for ours, theirs in zip(predictions(replies[index])[0], expected[index][0], strict=True):
                assert ours["label"] == theirs["label"]
                assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-5)


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"", 400), (b"x" * 200_001, 413), (b"hello", 415), (images.truncated(), 422), (images.bomb(), 422)],
    ids=["empty", "too many bytes", "not an image", "truncated", "too many pixels"],
)
def test_statuses(started: tuple[ImageClassifier, Any], data: bytes, status: int) -> None:
    problem(ask(*started, [{"body": bytearray(data)}])[0], status)


def test_several_images_in_one_request_and_the_bad_one_is_named(started: tuple[ImageClassifier, Any]) -> None:
    encoded = [base64.b64encode(images.photo(seed)).decode() for seed in range(8)]
    body = {"instances": [{"b64": text} for text in encoded], "top_k": 1}
    headers = {"Content-Type": "application/json"}
    (reply,) = ask(*started, [{"body": bytearray(json.dumps(body).encode())}], headers)
    assert [len(labels) for labels in predictions(reply)] == [1] * 8
    body["instances"][5] = {"b64": base64.b64encode(b"hello").decode()}
    (reply,) = ask(*started, [{"body": bytearray(json.dumps(body).encode())}], headers)
    assert "instance 5: " in problem(reply, 415)["detail"]


def test_more_pixels_than_one_request_may_have(started: tuple[ImageClassifier, Any]) -> None:
    large = base64.b64encode(images.bomb(7000, 7000)).decode()
    headers = {"Content-Type": "application/json"}
    (reply,) = ask(*started, [{"body": {"instances": [{"b64": large}] * 5}}], headers)
    assert "send them in several requests" in problem(reply, 413)["detail"]
    (reply,) = ask(*started, [{"body": {"instances": [{"b64": large}] * 2}}], headers)
    assert "instance 0: " in problem(reply, 422)["detail"]


def test_more_instances_than_the_batch_size(artifact: Path) -> None:
    ctx = context(artifact, batch_size=2)
    handler = ImageClassifier()
    handler.initialize(ctx)
    body = {"instances": [{"b64": base64.b64encode(images.photo(seed)).decode()} for seed in range(7)]}
    (reply,) = ask(handler, ctx, [{"body": body}], {"Content-Type": "application/json"})
    alone = [predictions(ask(handler, ctx, [{"body": images.photo(seed)}])[0])[0] for seed in range(7)]
    assert [labels[0]["label"] for labels in predictions(reply)] == [labels[0]["label"] for labels in alone]


class _Failing(torch.nn.Module):
    """Fails for batches above a size or for one marked input, as a device or a model would."""

    def __init__(self, inner: torch.nn.Module, largest: int, error: Exception, marked: Tensor | None = None) -> None:
        super().__init__()
        self.inner, self.largest, self.error, self.marked = inner, largest, error, marked
        self.sizes: list[int] = []

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self.sizes.append(len(x_BCHW))
        hit = self.marked is not None and any(torch.equal(row, self.marked) for row in x_BCHW)
        if len(x_BCHW) > self.largest or hit:
            raise self.error
        out: Tensor = self.inner(x_BCHW)
        return out


def plain(handler: ImageClassifier) -> loading.PlainEngine:
    assert isinstance(handler.model.engine, loading.PlainEngine)
    return handler.model.engine


def replace_network(handler: ImageClassifier, network: torch.nn.Module) -> None:
    engine = dataclasses.replace(plain(handler), network=network)
    handler.model = dataclasses.replace(handler.model, engine=engine)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_out_of_memory_is_retried_in_halves(started: tuple[ImageClassifier, Any], error: Exception) -> None:
    handler, ctx = started
    rows = [{"body": images.photo(seed)} for seed in range(32)]
    expected = [predictions(reply) for reply in ask(handler, ctx, rows)]
    network = _Failing(plain(handler).network, 8, error)
    replace_network(handler, network)
    got = [predictions(reply) for reply in ask(handler, ctx, rows)]
    assert network.sizes == [32, 16, 8, 8, 16, 8, 8]
    assert [item[0][0]["label"] for item in got] == [item[0][0]["label"] for item in expected]
    replace_network(handler, _Failing(network.inner, 0, error))
    for reply in ask(handler, ctx, rows[:2]):
        problem(reply, 503)


def test_what_the_cpu_allocator_says_is_out_of_memory(
    started: tuple[ImageClassifier, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, ctx = started

    def huge(x_BCHW: Any, threads: int = 1) -> Tensor:
        return torch.empty(1 << 45, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(handler, "model", dataclasses.replace(handler.model, engine=huge))
        (reply,) = ask(handler, ctx, [{"body": images.photo(1)}])
        assert "not enough memory for this input" in problem(reply, 503)["detail"]
    monkeypatch.setattr(handler, "decode", huge)
    (reply,) = ask(handler, ctx, [{"body": images.photo(1)}])
    assert "not enough memory to decode" in problem(reply, 503)["detail"]


def test_the_one_input_that_breaks_the_model_is_found(started: tuple[ImageClassifier, Any]) -> None:
    handler, ctx = started
    rows = [{"body": images.photo(seed)} for seed in range(9)]
    marked = imaging.normalise(handler.to_batch([handler.decode(images.photo(4))]), handler.model.spec.preprocess)[0]
    secret = "/secret/path"
    replace_network(handler, _Failing(plain(handler).network, 99, RuntimeError(secret), marked))
    replies = ask(handler, ctx, rows)
    assert [reply.status for reply in replies] == [200] * 4 + [500] + [200] * 4
    assert secret.encode() not in replies[4].body
    assert b"Traceback" not in replies[4].body


def test_an_answer_that_is_no_number_is_an_error_of_its_own(started: tuple[ImageClassifier, Any]) -> None:
    handler, ctx = started

    class Nan(torch.nn.Module):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            rows = torch.zeros(len(x_BCHW), 3)
            rows[1] = float("nan")
            return rows

    replace_network(handler, Nan())
    replies = ask(handler, ctx, [{"body": images.photo(seed)} for seed in range(3)])
    assert [reply.status for reply in replies] == [200, 500, 200]


class _Watching:
    """An engine that notes the rows and the threads that it is given, and each thread that decodes meanwhile."""

    def __init__(self, inner: loading.Engine) -> None:
        self.inner = inner
        self.seen: list[tuple[int, int]] = []

    def __call__(self, x_BCHW: Tensor, threads: int) -> Tensor:
        self.seen.append((len(x_BCHW), threads))
        return self.inner(x_BCHW, threads)


def watched(handler: ImageClassifier, monkeypatch: pytest.MonkeyPatch) -> tuple[_Watching, set[str]]:
    engine = _Watching(handler.model.engine)
    handler.model = dataclasses.replace(handler.model, engine=engine)
    decoders: set[str] = set()
    decode = handler.decode

    def noting(data: bytes | bytearray) -> Tensor:
        decoders.add(threading.current_thread().name.partition("_")[0])
        return decode(data)

    monkeypatch.setattr(handler, "decode", noting)
    return engine, decoders


def on_four_cores(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Context, ImageClassifier]:
    """A worker that believes to have them, with a board of its own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("handlerlib.cores.usable", lambda: 4)
    ctx = context(artifact, batch_size=32)
    handler = ImageClassifier()
    handler.initialize(ctx)
    return ctx, handler


def test_a_lone_request_has_all_cores_and_a_worker_beside_a_busy_one_its_share(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, handler = on_four_cores(artifact, tmp_path, monkeypatch)
    engine, decoders = watched(handler, monkeypatch)
    (board,) = tmp_path.glob("marina-cores-*")
    ask(handler, ctx, [{"body": images.photo(0)}])
    assert engine.seen == [(1, 4)]
    assert decoders == {threading.current_thread().name}  # one image: no other thread is woken
    others = [Board(board) for _ in range(3)]
    others[0].begin()
    ask(handler, ctx, [{"body": images.photo(seed)} for seed in range(8)])
    assert engine.seen[1:] == [(8, 2)]
    for other in others:
        other.begin()
    decoders.clear()
    ask(handler, ctx, [{"body": images.photo(seed)} for seed in range(8)])
    assert engine.seen[2:] == [(8, 1)]
    assert decoders == {threading.current_thread().name}
    for other in others:
        other.close()


def test_without_more_threads_a_worker_decodes_alone(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, handler = on_four_cores(artifact, tmp_path, monkeypatch)
    _, decoders = watched(handler, monkeypatch)
    rows = [{"body": images.photo(seed)} for seed in range(8)]

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")  # as with too small a limit of processes

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        alone = [predictions(reply) for reply in ask(handler, ctx, rows)]
    assert decoders == {threading.current_thread().name}
    assert alone == [predictions(reply) for reply in ask(handler, ctx, rows)]


def test_what_a_thread_left_undone_is_done(started: tuple[ImageClassifier, Any]) -> None:
    """One that was handed its part, and no word that it has begun, may hold one input for long."""
    handler, ctx = started
    decode, holding, go_on = handler.decode, threading.Event(), threading.Event()
    asking = threading.current_thread()
    rows = [{"body": images.photo(seed)} for seed in range(4)]

    def slow(data: bytes | bytearray) -> Tensor:
        if threading.current_thread() is asking:
            assert holding.wait(60)
        elif not holding.is_set():
            holding.set()
            go_on.wait(60)
        return decode(data)

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **options: Any) -> Any:
            super().submit(*arguments, **options)
            raise RuntimeError("can't start new thread")

    expected = [predictions(reply) for reply in ask(handler, ctx, rows)]
    with pytest.MonkeyPatch.context() as patch, Pool(1) as pool:
        patch.setattr(handler, "decode", slow)
        patch.setattr(handler, "_pool", pool)
        patch.setattr(handler.cores, "share", lambda: 2)
        try:
            got = [predictions(reply) for reply in ask(handler, ctx, rows)]
        finally:
            go_on.set()
    assert [row[0][0]["label"] for row in got] == [row[0][0]["label"] for row in expected]


@pytest.mark.parametrize(("count", "prepared"), [(1, [1]), (4, [4, 2, 1]), (12, [12, 4, 2, 1])])
def test_each_form_that_an_engine_may_be_asked_for_is_made_at_the_start(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, prepared: list[int]
) -> None:
    """However many workers are busy later: no request waits until a form for another number of threads is compiled."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("handlerlib.cores.usable", lambda: count)
    asked: list[int] = []
    warm_up = loading.warm_up

    def noting(model: loading.LoadedModel, sizes: Any, threads: Any) -> tuple[int, ...]:
        asked.extend(threads)
        return warm_up(model, sizes, threads=threads)

    monkeypatch.setattr(loading, "warm_up", noting)
    ImageClassifier().initialize(context(artifact, batch_size=4))
    assert list(dict.fromkeys(asked)) == prepared


def test_without_a_board_a_worker_prepares_its_only_share(tmp_path: Path) -> None:
    assert Cores(8, None, workers=3).shares() == (2,)
    board = Board(tmp_path / "board")
    assert Cores(6, board).shares() == (6, 3, 2, 1)
    board.close()


def test_a_large_network_gets_a_large_batch_in_parts(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handlerlib.worker.CHUNK_VALUES", 12 * 3 * 16 * 16)
    ctx = context(artifact, batch_size=32)
    handler = ImageClassifier()
    handler.initialize(ctx)
    rows = [{"body": images.photo(seed)} for seed in range(32)]
    engine, _ = watched(handler, monkeypatch)
    whole = [predictions(reply) for reply in ask(handler, ctx, rows)]
    assert [count for count, _ in engine.seen] == [12, 12, 8]
    alone = [predictions(ask(handler, ctx, [row])[0]) for row in rows]
    assert [labels[0][0]["label"] for labels in whole] == [labels[0][0]["label"] for labels in alone]


def test_a_batch_of_every_kind_of_image(started: tuple[ImageClassifier, Any]) -> None:
    grey = images.encode(Image.fromarray(images.pixels(1)).convert("L"), "JPEG")
    large = images.encode(images.pixels(2, 900, 1100), "JPEG")
    cmyk = images.encode(Image.fromarray(images.pixels(3)).convert("CMYK"), "JPEG")
    kinds = [grey, images.truncated("JPEG"), large, images.photo(4, "WEBP"), cmyk, b"no image", images.photo(5, "JPEG")]
    bodies = kinds * 3
    replies = ask(*started, [{"body": bytearray(body)} for body in bodies])
    alone = [ask(*started, [{"body": body}])[0] for body in kinds]
    assert [reply.status for reply in alone] == [200, 422, 200, 200, 200, 415, 200]
    for reply, expected in zip(replies, alone * 3, strict=True):
        assert reply.status == expected.status
        if reply.status == 200:
            for ours, theirs in zip(predictions(reply)[0], predictions(expected)[0], strict=True):
                assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-5)


def test_each_request_gets_as_many_labels_as_it_asks_for(started: tuple[ImageClassifier, Any]) -> None:
    form = [{"data": images.photo(seed), "top_k": str(top_k).encode()} for seed, top_k in enumerate((1, 3, 2, 50))]
    replies = ask(*started, [*form, {"data": b"x", "top_k": b"2"}])
    assert [len(predictions(reply)[0]) for reply in replies[:4]] == [1, 3, 2, 3]
    assert replies[4].status == 415


def test_request_id_of_the_gateway_is_kept_when_it_is_harmless(started: tuple[ImageClassifier, Any]) -> None:
    (reply,) = ask(*started, [{"body": b""}], {"X-Marina-Request-Id": "abc-123"})
    assert problem(reply, 400)["instance"] == "abc-123"
    for other in ({"X-Marina-Request-Id": 'a"\r\nb'}, {"X-Request-Id": "abc-123"}, {}):
        (reply,) = ask(*started, [{"body": b""}], other)
        assert problem(reply, 400)["instance"] == "request-0"


def test_self_test_names_sample_expected_and_got(artifact: Path, tmp_path: Path, capsys: Any) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in artifact.rglob("*"):
        if path.is_file():
            (broken / path.relative_to(artifact)).parent.mkdir(exist_ok=True)
            (broken / path.relative_to(artifact)).write_bytes(path.read_bytes())
    weights = safetensors.torch.load_file(broken / "weights.safetensors")
    weights = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in weights.items()}
    safetensors.torch.save_file(weights, broken / "weights.safetensors")
    with pytest.raises(RuntimeError, match=r"golden/\d\.png: probability of '\w+' expected 0\.\d+, got 0\.\d+"):
        ImageClassifier().initialize(context(broken))
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("MARINA_LOAD_FAILED "))
    cause = json.loads(line.removeprefix("MARINA_LOAD_FAILED "))
    assert cause["type"] == "SelfTestFailed"
    assert "expected" in cause["error"]


def test_weights_of_another_architecture_are_refused(artifact: Path, tmp_path: Path) -> None:
    target = write_artifact(tmp_path, name="other")
    document = json.loads((target / "model_spec.json").read_text())
    document["architecture"]["name"] = "lenet"
    (target / "model_spec.json").write_text(json.dumps(document))
    with pytest.raises(RuntimeError, match="does not fit architecture 'lenet'"):
        ImageClassifier().initialize(context(target))


def test_pickled_weights_are_never_read(artifact: Path, tmp_path: Path) -> None:
    target = write_artifact(tmp_path, name="pickled")
    torch.save({"weight": torch.zeros(1)}, target / "weights.safetensors")
    with pytest.raises(RuntimeError, match=r"weights.safetensors cannot be read"):
        ImageClassifier().initialize(context(target))
