"""Ready-made checks of answers for the load generator: each factory takes settings and gives `(payload index, body) -> ""`
or what is wrong. They run in the client process, once per distinct answer. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Checker = Callable[[int, bytes], str]


def exact(settings: Mapping[str, Any]) -> Checker:
    """`answers`: the text of the right answer per payload, byte for byte."""
    wanted = [text.encode() for text in settings["answers"]]

    def check(payload: int, body: bytes) -> str:
        right = wanted[payload % len(wanted)]
        return "" if body == right else f"got {_beginning(body)}, expected {_beginning(right)}"

    return check


def contains(settings: Mapping[str, Any]) -> Checker:
    """`text`: what every answer must hold."""
    wanted = settings["text"].encode()
    return lambda payload, body: "" if wanted in body else f"got {_beginning(body)}"


def probabilities(settings: Mapping[str, Any]) -> Checker:
    """`expected`: per payload the probability (or value) of every class by its index; `tolerance`: how far each may be off,
    in `units` of each class where they are given. With `thresholds` an answer may hold no label.

    For Marina's answers with one image per request.
    """
    expected: Sequence[Sequence[float]] = settings["expected"]
    tolerance = float(settings["tolerance"])
    units: Sequence[float] = settings.get("units") or [1.0] * len(expected[0])
    thresholds: Sequence[float] = settings.get("thresholds") or ()

    def check(payload: int, body: bytes) -> str:
        wanted = expected[payload % len(expected)]
        (labels,) = json.loads(body)["predictions"]
        if not labels:
            below = [right < cut + tolerance for right, cut in zip(wanted, thresholds, strict=False)]
            return "" if below and all(below) else "no labels"
        what = "value" if "value" in labels[0] else "probability"
        worst = max(labels, key=lambda item: abs(item[what] - wanted[item["index"]]) / units[item["index"]])
        got, right, allowed = worst[what], wanted[worst["index"]], tolerance * units[worst["index"]]
        if abs(got - right) <= allowed:  # false for a NaN too
            return ""
        name = worst.get("label", worst.get("target"))
        return f"{what} of '{name}' expected {right:.6f}, got {got:.6f}, tolerance {allowed:g}"

    return check


def _beginning(body: bytes) -> str:
    return repr(body[:80].decode("utf-8", "replace"))
