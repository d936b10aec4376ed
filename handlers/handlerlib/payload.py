"""A TorchServe row -> the encoded inputs of one request. The content type decides how a body is read; nothing is guessed.

What is said here of images holds for other kinds of input too: a `Kind` says how one of them is sent.

A row is what `handle()` gets per request: `{"body": bytes}` for a raw body, `{field: value}` for a form, and for
`application/json` either bytes (`decode_input_request=false`, Marina's setting) or the parsed value (stock setting).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
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
    given: bool = False
    """Whether the client itself said `top_k`."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of input, and how requests bring it."""

    noun: str
    """What messages call it, e.g. `image`."""
    example: str
    """A JSON instance, for messages."""
    raw: Callable[[bytes | bytearray, Mapping[str, str]], bytes | bytearray]
    """A whole body and the request's headers -> the encoded input. May raise RequestError."""
    instance: Callable[[Any, int, Limits], bytes | bytearray]
    """A JSON instance and its place -> the encoded input. May raise RequestError."""


def parse(row: Mapping[str, Any], headers: Mapping[str, str], limits: Limits, kind: Kind | None = None) -> Request:
    """Raises MalformedRequest (400), PayloadTooLarge (413) or UnprocessableInput (422, a bad top_k).

    `headers` are the request's own, with lower-case names. `kind` is images when it is left out.
    """
    kind = kind or IMAGE
    if "body" in row:
        body = row["body"]
        if _is_json(headers) or not isinstance(body, bytes | bytearray | memoryview | str):
            return _from_json(body, headers, limits, kind)
        return _one(kind.raw(_bytes(body), headers), headers.get(TOP_K_HEADER), limits, kind)
    return _from_form(row, headers, limits, kind)


def _from_form(row: Mapping[str, Any], headers: Mapping[str, str], limits: Limits, kind: Kind) -> Request:
    unknown = sorted(set(row) - {*DATA_FIELDS, "top_k"})
    if unknown:
        raise MalformedRequest(f"unknown form field {_quoted(unknown[0])}; known are data or file, and top_k")
    given = [field for field in DATA_FIELDS if field in row]
    if not given:
        raise MalformedRequest(f"the body is empty: send the {kind.noun} as the body, or as the form field data")
    if len(given) > 1:
        raise MalformedRequest(
            f"send either the form field data or file, not both; several {kind.noun}s go as JSON instances"
        )
    top_k = _text(row["top_k"]) if "top_k" in row else headers.get(TOP_K_HEADER)
    return _one(_bytes(row[given[0]]), top_k, limits, kind)


def _bytes(value: Any) -> bytes | bytearray:
    data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    if not isinstance(data, bytes | bytearray | memoryview):
        raise MalformedRequest("the form field must hold a file's bytes")
    return bytes(data) if isinstance(data, memoryview) else data


def _one(data: bytes | bytearray, top_k: str | None, limits: Limits, kind: Kind) -> Request:
    return Request((within(data, limits, kind.noun),), _top_k(top_k, limits), top_k is not None)


def _from_json(body: Any, headers: Mapping[str, str], limits: Limits, kind: Kind) -> Request:
    document = _parse_json(body, kind) if isinstance(body, bytes | bytearray | memoryview | str) else body
    if not isinstance(document, Mapping):
        raise MalformedRequest(f'the JSON body must be an object: {{"instances": [{kind.example}]}}')
    unknown = sorted(set(document) - {"instances", "top_k"})
    if unknown:
        raise MalformedRequest(f"unknown JSON field {_quoted(unknown[0])}; known are instances and top_k")
    instances = document.get("instances")
    if not isinstance(instances, list) or not instances:
        raise MalformedRequest(f'"instances" must be a list of at least one {kind.example}')
    if len(instances) > limits.max_instances:
        raise PayloadTooLarge(f"{len(instances)} instances in one request, at most {limits.max_instances} are accepted")
    top_k = document["top_k"] if "top_k" in document else headers.get(TOP_K_HEADER)
    decoded = tuple(kind.instance(instance, index, limits) for index, instance in enumerate(instances))
    return Request(decoded, _top_k(top_k, limits), top_k is not None)


def _parse_json(body: bytes | bytearray | memoryview | str, kind: Kind) -> Any:
    text = body if isinstance(body, str) else bytes(body)
    if not text:
        raise MalformedRequest(f'the body is empty: send {{"instances": [{kind.example}]}}')
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        # UnicodeDecodeError and JSONDecodeError are ValueErrors; so is an integer of thousands of digits.
        raise MalformedRequest("the body is not valid JSON") from error


def from_base64(instance: Any, index: int, limits: Limits, noun: str = "image") -> bytes | bytearray:
    """The bytes of a JSON instance `{"b64": "..."}`. Raises MalformedRequest and PayloadTooLarge."""
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
    return within(data, limits, noun)


def within(data: bytes | bytearray, limits: Limits, noun: str) -> bytes | bytearray:
    """The same bytes. Raises MalformedRequest when there are none and PayloadTooLarge when there are too many."""
    if not data:
        raise MalformedRequest(f"the {noun} is empty")
    if len(data) > limits.max_bytes:
        raise PayloadTooLarge(f"the {noun} has {len(data)} bytes, at most {limits.max_bytes} are accepted")
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


def _as_sent(data: bytes | bytearray, headers: Mapping[str, str]) -> bytes | bytearray:
    return data


IMAGE = Kind("image", '{"b64": "..."}', _as_sent, from_base64)
"""Any encoded image, whatever its content type says: its first bytes tell more."""


def _is_json(headers: Mapping[str, str]) -> bool:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def _text(value: Any) -> str:
    return bytes(value).decode("utf-8", "replace") if isinstance(value, bytes | bytearray | memoryview) else str(value)


def _quoted(text: str) -> str:
    """A client's own text, shortened, for a message."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
