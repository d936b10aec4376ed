from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from handlerlib import payload
from handlerlib.errors import MalformedRequest, PayloadTooLarge, UnprocessableInput
from handlerlib.spec import Limits

LIMITS = Limits(max_bytes=100, max_instances=3, top_k=5, max_top_k=20)
JSON = {"content-type": "application/json; charset=utf-8"}
B64 = base64.b64encode(b"image").decode()


def body(document: Any) -> dict[str, Any]:
    return {"body": json.dumps(document).encode()}


def test_raw_body() -> None:
    assert payload.parse({"body": bytearray(b"image")}, {}, LIMITS) == payload.Request((b"image",), 5)


@pytest.mark.parametrize("field", ["data", "file"])
def test_form(field: str) -> None:
    assert payload.parse({field: bytearray(b"image"), "top_k": b"3"}, {}, LIMITS) == payload.Request(
        (b"image",), 3, given=True
    )


def test_json_as_bytes_and_as_torchserve_parses_it() -> None:
    document = {"instances": [{"b64": B64}, {"b64": B64}], "top_k": 2}
    expected = payload.Request((b"image", b"image"), 2, given=True)
    assert payload.parse(body(document), JSON, LIMITS) == expected
    assert payload.parse({"body": document}, JSON, LIMITS) == expected


def test_top_k_from_header_and_precedence_of_the_field() -> None:
    header = {"x-top-k": " 7 "}
    assert payload.parse({"body": b"image"}, header, LIMITS).top_k == 7
    assert payload.parse({"data": b"image", "top_k": b"3"}, header, LIMITS).top_k == 3
    assert payload.parse(body({"instances": [{"b64": B64}]}), JSON | header, LIMITS).top_k == 7


@pytest.mark.parametrize("value", ["0", "-1", "21", "abc", "", "1.5", "1_0", "+3", "\u0663", "9" * 5000])
def test_bad_top_k_in_a_header(value: str) -> None:
    with pytest.raises(UnprocessableInput, match="top_k must be a whole number from 1 to 20"):
        payload.parse({"body": b"image"}, {"x-top-k": value}, LIMITS)


@pytest.mark.parametrize("value", [0, -1, 21, 1.5, True, "x", [], {}])
def test_bad_top_k_in_json(value: Any) -> None:
    with pytest.raises(UnprocessableInput, match="top_k"):
        payload.parse(body({"instances": [{"b64": B64}], "top_k": value}), JSON, LIMITS)


@pytest.mark.parametrize(
    ("row", "headers", "message"),
    [
        ({}, {}, "the body is empty"),
        ({"body": b""}, {}, "the image is empty"),
        ({"data": b""}, {}, "the image is empty"),
        ({"body": b""}, JSON, "the body is empty"),
        ({"body": b"{"}, JSON, "not valid JSON"),
        ({"body": b"\xff\xfe"}, JSON, "not valid JSON"),
        ({"body": b"[" * 100_000}, JSON, "not valid JSON"),
        ({"body": b'{"instances": ' + b"9" * 5000 + b"}"}, JSON, "not valid JSON"),
        ({"body": b"[]"}, JSON, "must be an object"),
        ({"body": b"{}"}, JSON, '"instances" must be a list'),
        (body({"instances": []}), JSON, '"instances" must be a list'),
        (body({"instances": ["x"]}), JSON, 'instance 0 must be {"b64"'),
        (body({"instances": [{"b64": B64, "x": 1}]}), JSON, "instance 0 must be"),
        (body({"instances": [{"b64": "!"}]}), JSON, "instance 0 is not valid base64"),
        (body({"instances": [{"b64": "\u00e9"}]}), JSON, "instance 0 is not valid base64"),
        (body({"instances": [{"b64": ""}]}), JSON, "the image is empty"),
        (body({"instances": [{"b64": B64}], "topk": 3}), JSON, "unknown JSON field 'topk'"),
        ({"image": b"image"}, {}, "unknown form field 'image'"),
        ({"data": b"a", "file": b"b"}, {}, "not both"),
        ({"top_k": b"3"}, {}, "the body is empty"),
    ],
)
def test_malformed(row: dict[str, Any], headers: dict[str, str], message: str) -> None:
    with pytest.raises(MalformedRequest, match=message):
        payload.parse(row, headers, LIMITS)


def test_too_large() -> None:
    with pytest.raises(PayloadTooLarge, match="101 bytes, at most 100"):
        payload.parse({"body": b"x" * 101}, {}, LIMITS)
    with pytest.raises(PayloadTooLarge, match="instance 0 has more than 100 bytes"):
        payload.parse(body({"instances": [{"b64": "A" * 1000}]}), JSON, LIMITS)
    with pytest.raises(PayloadTooLarge, match="4 instances in one request, at most 3"):
        payload.parse(body({"instances": [{"b64": B64}] * 4}), JSON, LIMITS)
    assert payload.parse(body({"instances": [{"b64": base64.b64encode(b"x" * 100).decode()}]}), JSON, LIMITS)


def test_messages_quote_clients_briefly() -> None:
    with pytest.raises(MalformedRequest) as caught:
        payload.parse({"x" * 10_000: b""}, {}, LIMITS)
    assert len(str(caught.value)) < 200
