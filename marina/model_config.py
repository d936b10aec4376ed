"""`model-config.yaml`: the keys TorchServe's front end reads, their types, and the settings that do not do what they say.

TorchServe ignores an unknown key or a wrong type with at most a warning. Here each is a finding, before anything is
packed or served. Sources: ModelConfig.java, ModelManager.java and Model.java of TorchServe 0.12.0.
"""

from __future__ import annotations

import reprlib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from handlerlib.spec import closest
from marina.errors import ArchiveError

CONFIG_FILE = "model-config.yaml"

_POSITIVE = (
    "minWorkers",
    "maxWorkers",
    "batchSize",
    "maxBatchDelay",
    "responseTimeout",
    "startupTimeout",
    "jobQueueSize",
    "maxRetryTimeoutInSec",
)
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3  # YAML's aliases make a few lines a list without an end
_REMEDY = f"see the comments in handlers/*.yaml, the source of {CONFIG_FILE}"


@dataclass(frozen=True, slots=True)
class ConfigFinding:
    """One thing wrong with a configuration: what, and what to do."""

    message: str
    remedy: str


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader takes the last of two equal keys silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key}'", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read(text: str) -> dict[str, Any]:
    """Parse and check: every key is then there, with its type. Raises ArchiveError with the first finding."""
    for finding in check(text):
        raise ArchiveError(f"{CONFIG_FILE}: {finding.message}", remedy=finding.remedy)
    values: dict[str, Any] = yaml.load(text, _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    return values


def check(text: str) -> Iterator[ConfigFinding]:
    """Everything wrong with the text of a `model-config.yaml`, in the order a reader would meet it."""
    try:
        yield from _findings(yaml.load(text, _UniqueKeyLoader))  # noqa: S506 - a SafeLoader
    # A date that is none, an unhashable key, a number of thousands of digits, a thousand brackets.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        yield ConfigFinding(f"is not valid YAML: {' '.join(str(error).split())}", "mend the file named in the message")


def _findings(values: object) -> Iterator[ConfigFinding]:
    if not isinstance(values, Mapping):
        yield ConfigFinding("must be a mapping of keys to values", _REMEDY)
        return
    yield from _unknown_and_traps(values)
    yield from _numbers(values)
    yield from _devices(values)


def _unknown_and_traps(values: Mapping[Any, Any]) -> Iterator[ConfigFinding]:
    for key in values:
        if key in _TRAPS:
            yield ConfigFinding(f"{key} is refused: {_TRAPS[key]}", f"remove {key}")
        elif key not in _KNOWN:
            hint = closest(str(key), _KNOWN)
            yield ConfigFinding(
                f"unknown key '{key}'{hint}", "TorchServe would ignore it silently: correct or remove it"
            )


def _numbers(values: Mapping[Any, Any]) -> Iterator[ConfigFinding]:
    for key in _POSITIVE:
        if key not in values:
            why = _WHY_EXPLICIT.get(key, "TorchServe's own default depends on the machine")
            yield ConfigFinding(f"{key} is missing: {why}", f"set {key}")
        elif type(values[key]) is not int or values[key] < 1:
            why = "; 0 means 'unset', which is 100 ms" if key == "maxBatchDelay" else ""
            yield ConfigFinding(
                f"{key} must be a whole number of at least 1, got {_SHORT.repr(values[key])}{why}", f"correct {key}"
            )
    low, high = values.get("minWorkers"), values.get("maxWorkers")
    if isinstance(low, int) and isinstance(high, int) and high < low:
        yield ConfigFinding(f"maxWorkers {high} is below minWorkers {low}: both would be ignored", "raise maxWorkers")


def _devices(values: Mapping[Any, Any]) -> Iterator[ConfigFinding]:
    if values.get("deviceType", "gpu") not in ("cpu", "gpu"):
        got = _SHORT.repr(values["deviceType"])
        yield ConfigFinding(f"deviceType must be cpu or gpu, got {got}", "correct deviceType")
    ids = values.get("deviceIds", [])
    if not isinstance(ids, list) or any(type(item) is not int or item < 0 for item in ids):
        got = _SHORT.repr(ids)
        yield ConfigFinding(f"deviceIds must be a list of GPU numbers, got {got}", "correct deviceIds, e.g. [0, 1]")


_KNOWN = (*_POSITIVE, "deviceType", "deviceIds")
_WHY_EXPLICIT = {
    "maxRetryTimeoutInSec": "after 300 s of failed starts a worker would never be started again and its queue would hang",
    "minWorkers": "minWorkers and maxWorkers are used only together",
    "maxWorkers": "minWorkers alone is ignored",
    "responseTimeout": "a config file without it sets 120 s, whatever config.properties says",
    "startupTimeout": "a config file without it sets 120 s, whatever config.properties says",
}
_TRAPS = {
    "clientTimeoutInMills": "an expired request is dropped without any answer, the client hangs",
    "useJobTicket": "it admits only as many requests as workers are idle, so batches stay at one",
    "asyncCommunication": "one failing request fails all, and requests hang after a crash",
    "continuousBatching": "Marina's handlers answer each request once",
    "sequenceBatching": "a worker that dies in it is never restarted",
    "parallelType": "Marina's handlers run one process per worker",
    "parallelLevel": "Marina's handlers run one process per worker",
    "torchrun": "Marina's handlers run one process per worker",
    "useVenv": "it installs packages at start; an archive must not depend on a package index",
    "pt2": "only TorchServe's own base handler reads it",
    "handler": "only TorchServe's own handlers read it",
    "micro_batching": "an exception in one stage hangs the request",
}
