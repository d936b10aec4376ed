"""Recipes as TOML text; the standard library reads it and does not write it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def write(values: Mapping[str, object]) -> str:
    """Text that `tomllib` reads as these values: text, numbers, booleans, lists and tables of them. None is left out."""
    return "\n".join(_table(values, ())) + "\n"


def comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in text.splitlines())


def _table(values: Mapping[str, object], path: tuple[str, ...]) -> Iterator[str]:
    """Plain values come first: below a table's head they would belong to it."""
    for key, value in values.items():
        if value is not None and not isinstance(value, Mapping):
            yield f"{_key(key)} = {_value(value)}"
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield ""
            yield f"[{'.'.join(map(_key, (*path, key)))}]"
            yield from _table(value, (*path, key))


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for this character, which JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        inner = (f"{_key(key)} = {_value(one)}" for key, one in value.items() if one is not None)
        return f"{{ {', '.join(inner)} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"TOML has no {type(value).__name__}")


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)
