from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlerlib import imaging, payload
from handlerlib.errors import RequestError
from handlerlib.spec import Limits, ModelSpec, Preprocess
from image_classifier import ImageClassifier
from support import images
from support.artifacts import write_artifact
from support.context import ask, context

LIMITS = Limits(max_bytes=5000, max_pixels=100_000, max_instances=4, top_k=2, max_top_k=10)
RGB = Preprocess(channels=3, height=8, width=8, mean=(0.5,) * 3, std=(0.5,) * 3, resize="cover")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
likely_json = st.fixed_dictionaries(
    {},
    optional={
        "instances": st.lists(st.fixed_dictionaries({"b64": st.text(max_size=30)}), max_size=5),
        "top_k": json_values,
    },
)
values = (
    st.binary(max_size=200) | st.binary(max_size=200).map(bytearray) | st.text(max_size=50) | json_values | likely_json
)
rows = st.one_of(
    st.fixed_dictionaries({"body": values}),
    st.fixed_dictionaries({"body": (json_values | likely_json).map(lambda value: json.dumps(value).encode())}),
    st.dictionaries(st.sampled_from(["data", "file", "top_k", "other"]), st.binary(max_size=50), max_size=3),
)
headers = st.dictionaries(
    st.sampled_from(["content-type", "x-top-k", "accept"]),
    st.sampled_from(["application/json", "application/json; charset=utf-8", "image/png", "text/plain", "3", "-1", ""]),
)


@given(row=rows, sent=headers)
def test_any_row_is_a_request_or_a_request_error(row: dict[str, Any], sent: dict[str, str]) -> None:
    try:
        request = payload.parse(row, sent, LIMITS)
    except RequestError as error:
        assert 400 <= error.status < 500
        assert json.loads(error.problem("id"))["detail"]
    else:
        assert 1 <= len(request.instances) <= LIMITS.max_instances
        assert all(0 < len(data) <= LIMITS.max_bytes for data in request.instances)
        assert 1 <= request.top_k <= LIMITS.max_top_k


mutilated = st.tuples(
    st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.integers(0, 2**32 - 1), st.floats(0, 1)
)


@given(seed=st.integers(0, 1000), how=mutilated)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_damage_to_an_image_is_its_own_4xx(seed: int, how: tuple[str, int, float]) -> None:
    kind, noise, where = how
    data = bytearray(images.photo(seed % 50, kind))
    place = min(int(where * len(data)), len(data) - 4)
    data[place : place + 4] = noise.to_bytes(4, "big")
    try:
        decoded = imaging.load(bytes(data), RGB, LIMITS)
    except RequestError as error:
        assert 400 <= error.status < 500
    else:
        assert (decoded.shape, decoded.dtype) == ((3, 8, 8), torch.uint8)


@given(
    data=st.binary(max_size=300),
    start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\x00"]),
)
def test_any_bytes_are_an_image_or_a_4xx(data: bytes, start: bytes) -> None:
    try:
        imaging.load(start + data, RGB, LIMITS)
    except RequestError as error:
        assert error.status in (413, 415, 422)


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageClassifier, Any]:
    ctx = context(write_artifact(tmp_path_factory.mktemp("artifacts")), batch_size=8)
    started = ImageClassifier()
    started.initialize(ctx)
    return started, ctx


@given(batch=st.lists(st.integers(0, 9) | st.sampled_from(["text", "cut", "bomb", "empty"]), min_size=1, max_size=12))
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_any_mix_gives_one_answer_each_and_the_good_ones_are_as_alone(
    handler: tuple[ImageClassifier, Any], batch: list[int | str]
) -> None:
    bad = {"text": b"hello", "cut": images.truncated(), "bomb": images.bomb(), "empty": b""}
    data = [images.photo(item) if isinstance(item, int) else bad[item] for item in batch]
    replies = ask(*handler, [{"body": item} for item in data])
    for item, sent, reply in zip(batch, data, replies, strict=True):
        if isinstance(item, str):
            assert 400 <= reply.status < 500
            continue
        (alone,) = ask(*handler, [{"body": sent}])
        ours, theirs = (json.loads(answer.body)["predictions"][0] for answer in (reply, alone))
        assert [label["index"] for label in ours] == [label["index"] for label in theirs]
        for left, right in zip(ours, theirs, strict=True):
            assert left["probability"] == pytest.approx(right["probability"], abs=1e-5)


@given(
    labels=st.lists(st.text(min_size=1, max_size=10), min_size=3, max_size=3, unique=True),
    mean=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    crop=st.floats(0.01, 1),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_spec_survives_its_text(
    template: dict[str, Any], labels: list[str], mean: list[float], crop: float
) -> None:
    document = json.loads(json.dumps(template))
    document["labels"] = labels
    document["preprocess"] |= {"mean": mean, "crop_fraction": crop}
    for sample, label in zip(document["golden"]["samples"], labels, strict=True):
        sample["label"] = label
    spec = ModelSpec.from_json(json.dumps(document))
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert (list(spec.labels), list(spec.preprocess.mean), spec.preprocess.crop_fraction) == (labels, mean, crop)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ModelSpec.load(write_artifact(tmp_path_factory.mktemp("spec"))).to_json())
    return found
