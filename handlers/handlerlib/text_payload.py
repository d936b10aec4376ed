"""How requests bring texts: `payload.Kind` for them. Whatever way a text comes, a handler gets it as UTF-8."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from handlerlib import text
from handlerlib.errors import MalformedRequest, UnsupportedMedia
from handlerlib.payload import Kind, from_base64, within
from handlerlib.spec import Limits

_CHARSET = re.compile(r"""charset\s*=\s*["']?([^\s"';]*)""", re.IGNORECASE)
_UTF8 = ("utf-8", "utf8", "us-ascii", "ascii")
_UNSAID = ("", "application/octet-stream")
"""Content types of clients that do not say what they send."""


def _in_utf8(data: bytes | bytearray, headers: Mapping[str, str]) -> bytes | bytearray:
    """Raises UnsupportedMedia for what is no text, for an unknown charset and for bytes that are not of it."""
    content_type = headers.get("content-type", "")
    if content_type in ("text/plain", *_UNSAID):
        return data
    kind = content_type.partition(";")[0].strip().lower()
    if not kind.startswith("text/") and kind not in _UNSAID:
        raise UnsupportedMedia(f"{kind[:60]} is not supported: send text/plain, or JSON instances as application/json")
    found = _CHARSET.search(content_type)
    charset = found[1].lower() if found else "utf-8"
    return data if charset in _UTF8 else text.decode(data, charset).encode()


def _instance(instance: Any, index: int, limits: Limits) -> bytes | bytearray:
    """A string, `{"text": "..."}` or `{"b64": "..."}`, the base64 of its UTF-8."""
    if isinstance(instance, Mapping) and set(instance) == {"b64"}:
        return from_base64(instance, index, limits, "text")
    found = instance["text"] if isinstance(instance, Mapping) and set(instance) == {"text"} else instance
    if not isinstance(found, str):
        raise MalformedRequest(f'instance {index} must be a string, {{"text": "..."}} or {{"b64": "..."}}')
    try:
        return within(found.encode(), limits, "text")
    except UnicodeEncodeError:
        raise MalformedRequest(f"instance {index} holds half of a surrogate pair, which is no character") from None


TEXT = Kind("text", '"..."', _in_utf8, _instance)
