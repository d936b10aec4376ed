"""How answers are judged, inside the load generator's process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from marina.load_checks import Checker, probabilities


def of_its_version(settings: Mapping[str, Any]) -> Checker:
    """`expected`: version -> per payload the probability of every class; `refused`: payloads that must get no answer.

    While a version takes over, either may answer; each answer has to be right for the version that it names.
    """
    by_version = {
        version: probabilities({"expected": rows, "tolerance": settings["tolerance"]})
        for version, rows in settings["expected"].items()
    }
    refused = frozenset(settings["refused"])

    def check(payload: int, body: bytes) -> str:
        if payload in refused:
            return "a damaged image was answered"
        version = json.loads(body)["version"]
        if version not in by_version:
            return f"an answer of version {version}"
        return by_version[version](payload, body)

    return check
