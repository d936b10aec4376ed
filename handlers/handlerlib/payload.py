"""A TorchServe row -> the encoded inputs of one request. The content type decides how a body is read; nothing is guessed.

A row is what `handle()` gets per request: `{"body": bytes}` for a raw body, `{field: value}` for a form, and for
`application/json` either bytes (`decode_input_request=false`, Marina's setting) or the parsed value (stock setting).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handlerlib.errors import MalformedRequest, PayloadTooLarge, UnprocessableInput
from handlerlib.spec import Limits

DATA_FIELDS = ("data", "file")
"""Form fields that may hold the input; exactly one of them per request."""
TOP_K_HEADER = "x-top-k"


@dataclass(frozen=True, slots=True)
class Request:
    """What one client asked: encoded inputs, at least one, and how many labels it wants for each."""

    instances: tuple[bytes | bytearray, ...]
    top_k: int


def parse(row: Mapping[str, Any], headers: Mapping[str, str], limits: Limits) -> Request:
    """Raises MalformedRequest (400), PayloadTooLarge (413) or UnprocessableInput (422, a bad top_k).

    `headers` are the request's own, with lower-case names.
    """
    if "body" in row:
        body = row["body"]
        if _is_json(headers) or not isinstance(body, bytes | bytearray | memoryview | str):
            return _from_json(body, headers, limits)
        return _one(body, headers.get(TOP_K_HEADER), limits)
    return _from_form(row, headers, limits)


def _from_form(row: Mapping[str, Any], headers: Mapping[str, str], limits: Limits) -> Request:
    unknown = sorted(set(row) - {*DATA_FIELDS, "top_k"})
    if unknown:
        raise MalformedRequest(f"unknown form field {_quoted(unknown[0])}; known are data or file, and top_k")
    given = [field for field in DATA_FIELDS if field in row]
    if not given:
        raise MalformedRequest("the body is empty: send the image as the body, or as the form field data")
    if len(given) > 1:
        raise MalformedRequest("send either the form field data or file, not both; several images go as JSON instances")
    return _one(row[given[0]], _text(row["top_k"]) if "top_k" in row else headers.get(TOP_K_HEADER), limits)


def _one(value: Any, top_k: str | None, limits: Limits) -> Request:
    data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    if not isinstance(data, bytes | bytearray | memoryview):
        raise MalformedRequest("the form field must hold a file's bytes")
    data = bytes(data) if isinstance(data, memoryview) else data
    return Request((_within(data, limits),), _top_k(top_k, limits))


def _from_json(body: Any, headers: Mapping[str, str], limits: Limits) -> Request:
    document = _parse_json(body) if isinstance(body, bytes | bytearray | memoryview | str) else body
    if not isinstance(document, Mapping):
        raise MalformedRequest('the JSON body must be an object: {"instances": [{"b64": "..."}]}')
    unknown = sorted(set(document) - {"instances", "top_k"})
    if unknown:
        raise MalformedRequest(f"unknown JSON field {_quoted(unknown[0])}; known are instances and top_k")
    instances = document.get("instances")
    if not isinstance(instances, list) or not instances:
        raise MalformedRequest('"instances" must be a list of at least one {"b64": "..."}')
    if len(instances) > limits.max_instances:
        raise PayloadTooLarge(f"{len(instances)} instances in one request, at most {limits.max_instances} are accepted")
    top_k = document["top_k"] if "top_k" in document else headers.get(TOP_K_HEADER)
    decoded = tuple(_from_base64(instance, index, limits) for index, instance in enumerate(instances))
    return Request(decoded, _top_k(top_k, limits))


def _parse_json(body: bytes | bytearray | memoryview | str) -> Any:
    text = body if isinstance(body, str) else bytes(body)
    if not text:
        raise MalformedRequest('the body is empty: send {"instances": [{"b64": "..."}]}')
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        # UnicodeDecodeError and JSONDecodeError are ValueErrors; so is an integer of thousands of digits.
        raise MalformedRequest("the body is not valid JSON") from error


def _from_base64(instance: Any, index: int, limits: Limits) -> bytes | bytearray:
    if not isinstance(instance, Mapping) or set(instance) != {"b64"} or not isinstance(instance["b64"], str):
        raise MalformedRequest(f'instance {index} must be {{"b64": "..."}}')
    text = instance["b64"]
    # Refused before it is decoded: base64 carries three bytes in four characters.
    if len(text) // 4 * 3 > limits.max_bytes + 2:
        raise PayloadTooLarge(f"instance {index} has more than {limits.max_bytes} bytes")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedRequest(f"instance {index} is not valid base64") from error
    return _within(data, limits)


def _within(data: bytes | bytearray, limits: Limits) -> bytes | bytearray:
    if not data:
        raise MalformedRequest("the image is empty")
    if len(data) > limits.max_bytes:
        raise PayloadTooLarge(f"the image has {len(data)} bytes, at most {limits.max_bytes} are accepted")
    return data


def _top_k(value: Any, limits: Limits) -> int:
    """A JSON integer or the decimal text of a form field or header; the spec's default when not given."""
    if value is None:
        return limits.top_k
    if isinstance(value, str):
        text = value.strip()
        # int() would also take '1_0', '+5' and other alphabets' digits.
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
    else:
        number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if number is None or not 1 <= number <= limits.max_top_k:
        raise UnprocessableInput(
            f"top_k must be a whole number from 1 to {limits.max_top_k}, got {_quoted(str(value))}"
        )
    return number


def _is_json(headers: Mapping[str, str]) -> bool:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def _text(value: Any) -> str:
    return bytes(value).decode("utf-8", "replace") if isinstance(value, bytes | bytearray | memoryview) else str(value)


def _quoted(text: str) -> str:
    """A client's own text, shortened, for a message."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
