"""The model store: what is in it, whether it is what was packed, and whether what is to be served is there."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from handlerlib import engine_spec
from handlerlib.engine_spec import ENGINE_FILE, EngineSpec
from handlerlib.errors import SpecError
from marina import archive, model_config, serving, store
from marina.doctor.finding import Finding
from marina.engine import list_gpus
from marina.errors import MarinaError, StoreError

SMALL_QUEUE = 2
"""A queue shorter than this many batches refuses requests while a worker is busy with one."""
_CONFIG_CODES: tuple[tuple[str, str], ...] = (
    ("maxBatchDelay", "batch-delay"),
    ("minWorkers", "workers-min-max"),
    ("maxWorkers", "workers-min-max"),
    ("Timeout", "implicit-timeout"),
    ("jobQueueSize", "queue-too-small"),
)


def check(folder: Path) -> Iterator[Finding]:
    """All that is wrong with the model store in `folder`."""
    if not folder.is_dir():
        yield _empty(folder)
        return
    try:
        index: Mapping[str, Mapping[str, Any]] = store.read_index(folder)["archives"]
    except StoreError as error:
        yield Finding(code="index-damaged", cause=str(error), remedy=error.remedy)
        return
    files = sorted(folder.glob("*.mar"))
    if not files and not index:
        yield _empty(folder)
    yield from _unlisted(files, index)
    yield from _clashes(index)
    for name, entry in sorted(index.items()):
        yield from _archive(folder / name, entry)
    there = {f"{entry['name']}:{entry['version']}" for name, entry in index.items() if (folder / name).is_file()}
    yield from _wanted(folder, there)


def _empty(folder: Path) -> Finding:
    return Finding(
        code="store-empty",
        cause=f"there is no archive in {folder}",
        remedy="train and pack one: marina train digits, then marina pack digits",
    )


def _unlisted(files: list[Path], index: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    for path in files:
        if path.name not in index:
            yield Finding(
                code="archive-not-indexed",
                cause=f"{path} lies in the store and was not packed here; nothing is served while it does",
                remedy=f"check it and add it: marina verify {path} --publish; or take it away",
            )


def _clashes(index: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    counted = Counter((entry["name"], entry["version"]) for entry in index.values())
    for (name, version), count in sorted(counted.items()):
        if count > 1:
            same = (file for file, entry in index.items() if (entry["name"], entry["version"]) == (name, version))
            named = ", ".join(sorted(same))
            yield Finding(
                code="version-clash",
                cause=f"{count} archives of the store are {name} {version}: {named}",
                remedy="keep one; TorchServe registers the same version once",
            )


def _archive(path: Path, entry: Mapping[str, Any]) -> Iterator[Finding]:
    if not path.is_file():
        yield Finding(
            code="model-not-in-store",
            cause=f"{path} is in the store's index, and the file is gone",
            remedy=f"pack {entry['name']} again, or retire that version",
            severity="warning",
        )
        return
    try:
        with zipfile.ZipFile(path) as packed:
            bad = packed.testzip()
            text = packed.read(model_config.CONFIG_FILE).decode() if bad is None else ""
            engine = packed.read(ENGINE_FILE).decode() if bad is None and ENGINE_FILE in packed.namelist() else ""
    except PermissionError:
        return  # the host's checks name it
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError, OSError, EOFError) as error:
        yield _damaged(path, str(error))
        return
    if bad is not None:
        yield _damaged(path, f"bad checksum of {bad}")
    elif archive.sha256_of(path) != entry["sha256"]:
        yield Finding(
            code="archive-tampered",
            cause=f"{path} was changed since it was packed: its SHA-256 is not the one in {store.INDEX_FILE}",
            remedy="pack it again, and find out who changed it",
        )
    else:
        yield from _configuration(path, text)
        yield from _engine(path, engine)


def _damaged(path: Path, how: str) -> Finding:
    return Finding(
        code="archive-corrupt",
        cause=f"{path} is damaged: {how}",
        remedy="pack it again: marina pack ARTIFACT",
    )


def _engine(path: Path, text: str) -> Iterator[Finding]:
    """Whether the optimised engine in the archive can serve here."""
    if not text:
        return
    try:
        spec = EngineSpec.from_json(text)
        against = engine_spec.obstacle(spec, "cuda" if list_gpus(os.environ) else "cpu")
    except SpecError as error:
        against = engine_spec.Obstacle("spec", str(error))
    if against is not None:
        yield Finding(
            code="engine-elsewhere",
            cause=f"{path.name}: the plain weights will answer, right and slower: {against.detail}",
            remedy="build the engine on this machine: marina optimize ARTIFACT, then deploy the new version",
            severity="warning",
        )


def _configuration(path: Path, text: str) -> Iterator[Finding]:
    problems = list(model_config.check(text))
    for problem in problems:
        code = next((code for word, code in _CONFIG_CODES if word in problem.message), "model-configuration")
        yield Finding(code=code, cause=f"{path.name}: {problem.message}", remedy=f"{problem.remedy}, then pack again")
    if problems:
        return
    values = model_config.read(text)
    if values["jobQueueSize"] < SMALL_QUEUE * values["batchSize"] * values["maxWorkers"]:
        yield Finding(
            code="queue-too-small",
            cause=f"{path.name}: jobQueueSize {values['jobQueueSize']} is less than {SMALL_QUEUE} batches of "
            f"{values['batchSize']} for each of {values['maxWorkers']} workers: short bursts are refused",
            remedy="raise jobQueueSize in model-config.yaml, then pack again",
            severity="warning",
        )
    if values["maxBatchDelay"] > 50:
        yield Finding(
            code="batch-delay",
            cause=f"{path.name}: maxBatchDelay {values['maxBatchDelay']} ms: every lone request waits that long, and "
            "one batch at a time is formed for all workers",
            remedy="set maxBatchDelay to 1 in model-config.yaml: what is queued is batched anyway; then pack again",
            severity="warning",
        )


def _wanted(folder: Path, there: set[str]) -> Iterator[Finding]:
    try:
        wanted = serving.read(folder)
    except MarinaError as error:
        yield Finding(code="index-damaged", cause=str(error), remedy=error.remedy)
        return
    for name, model in (wanted.models if wanted is not None else {}).items():
        for version in model.versions:
            if f"{name}:{version}" not in there:
                yield Finding(
                    code="model-not-in-store",
                    cause=f"{name} {version} is to be served ({serving.SERVING_FILE}), and the store does not have it",
                    remedy=f"pack it again, or give it up: marina retire {name}:{version}",
                )
