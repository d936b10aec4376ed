"""What the tuner takes from the store, and what a tuned model takes with it: its own `model-config.yaml`, in the artifact
that it is packed from.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlerlib.engine_spec import ENGINE_FILE, ENGINE_FOLDER
from handlerlib.errors import SpecError
from handlerlib.spec import SPEC_FILE, WEIGHTS_FILE, ModelSpec
from marina import load_payloads, model_config, store
from marina.archive import BUILD_FILE, CARD_FILE, PROVENANCE_FILE, VERSION_PATTERN
from marina.errors import ArchiveError
from marina.load_payloads import Load
from marina.store import version_key
from marina.tune import Candidate
from marina.tune_search import Setting


def tuned_text(text: str, setting: Setting, why: str) -> str:
    """The `model-config.yaml` in `text` with the setting's values; comments and all else stay as they are.

    Raises ArchiveError when the result would not be one that `marina verify` passes.
    """
    before = model_config.read(text)
    values = {
        "minWorkers": setting.workers,
        "maxWorkers": max(setting.workers, int(before["maxWorkers"])),
        "batchSize": setting.batch_size,
        "maxBatchDelay": setting.delay_ms,
    }
    for key, value in values.items():
        text, count = re.subn(rf"(?m)^({key}[ \t]*:[ \t]*)\d+", rf"\g<1>{value}", text)
        if count != 1:
            raise ArchiveError(
                f"{model_config.CONFIG_FILE}: {key} is not on a line of its own",
                remedy="write it as the file in handlers/ has it",
            )
    lines = [line for line in text.splitlines() if not line.startswith(_MARK)]
    written = "\n".join([f"{_MARK} {why}", *lines]) + "\n"
    if {key: model_config.read(written)[key] for key in values} != values:
        raise ArchiveError(f"{model_config.CONFIG_FILE} did not take the values {values}", remedy="edit it by hand")
    return written


_MARK = "# Tuned:"


def write_override(artifact: Path, text: str) -> Path:
    """Put it into the artifact, from which `marina pack` takes it from then on; returns the file."""
    target = artifact / model_config.CONFIG_FILE
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)
    return target


def as_new_version(artifact: Path, text: str, record: Mapping[str, Any], *, taken: set[str]) -> Path:
    """A copy of the artifact under the next version that is not `taken`, with the configuration and a record of where it
    came from: served archives never change under one version. Returns its folder.
    """
    try:
        spec = ModelSpec.load(artifact)
    except SpecError as error:
        raise ArchiveError(f"artifact {artifact}: {error}", remedy="export the run again") from error
    version = next_version(spec.version, taken)
    target = artifact.parent / version
    partial = artifact.parent / f".{version}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(artifact, partial)
    (partial / SPEC_FILE).write_text(dataclasses.replace(spec, version=version).to_json(), encoding="utf-8")
    write_override(partial, text)
    provenance = json.loads((partial / PROVENANCE_FILE).read_text(encoding="utf-8"))
    provenance["tuned"] = {"from": f"{spec.name}:{spec.version}", **record}
    (partial / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = (partial / CARD_FILE).read_text(encoding="utf-8")
    card = card.replace(f"# {spec.name} {spec.version}", f"# {spec.name} {version}", 1)
    (partial / CARD_FILE).write_text(card, encoding="utf-8")
    partial.rename(target)
    return target


def next_version(version: str, taken: set[str]) -> str:
    """The highest version known, its last number one higher: 1.2 and 1.9 -> 1.10."""
    known = {item for item in (version, *taken) if VERSION_PATTERN.fullmatch(item)}
    parts = list(version_key(max(known, key=version_key)))
    parts[-1] += 1
    return ".".join(map(str, parts))


def checked(folder: Path, candidate: Candidate, load: Load) -> Candidate:
    """The candidate with the check that its own archive asks for: its engine's tolerance, its weights' answers. None where
    its golden samples are not the ones that `load` sends. Raises ArchiveError."""
    own = load_payloads.from_archive(folder / candidate.file)
    return dataclasses.replace(candidate, check=own.check if own.payloads == load.payloads else None)


def candidates(folder: Path, served: str, also: Sequence[str], *, rungs: bool) -> list[Candidate]:
    """The archive served, those named, and, with `rungs`, every other version of the same model: the same weights and
    the same specification with another engine. Raises StoreError, and ArchiveError for an archive that cannot be read.
    """
    named = list(dict.fromkeys(item for key in (served, *also) for item in store.select(folder, [key])))
    found = [Candidate(key=item.key, file=item.path.name, sha256=item.sha256) for item in named]
    if not rungs:
        return found
    now = _content(named[0].path)
    engines = {_content(item.path).engine for item in named}
    for item in reversed(store.archives(folder)):
        if item.name != named[0].name or item in named:
            continue
        try:
            theirs = _content(item.path)
        except ArchiveError:
            continue  # nobody asked for it
        if theirs.model == now.model and theirs.engine not in engines:
            engines.add(theirs.engine)
            found.append(Candidate(key=item.key, file=item.path.name, sha256=item.sha256, offered=True))
    return found


@dataclass(frozen=True, slots=True)
class _Content:
    model: tuple[str, str]
    """The weights' digest, and the specification without the version."""
    engine: frozenset[tuple[str, str]]
    """The engine's files and their digests."""


def _content(path: Path) -> _Content:
    try:
        with zipfile.ZipFile(path) as packed:
            files = json.loads(packed.read(BUILD_FILE))["files"]
            spec = json.loads(packed.read(SPEC_FILE))
        digests = {name: str(item["sha256"]) for name, item in files.items()}
        del spec["version"]
        model = digests[WEIGHTS_FILE], json.dumps(spec, sort_keys=True)
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ArchiveError(f"{path} is not a readable archive: {error}", remedy="pack it again") from error
    engine = {item for item in digests.items() if item[0] == ENGINE_FILE or item[0].startswith(f"{ENGINE_FOLDER}/")}
    return _Content(model, frozenset(engine))


def config_of(path: Path) -> str:
    """The text of an archive's `model-config.yaml`. Raises ArchiveError."""
    try:
        with zipfile.ZipFile(path) as packed:
            return packed.read(model_config.CONFIG_FILE).decode()
    except (OSError, KeyError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise ArchiveError(f"{path} is not a readable archive: {error}", remedy="pack it again") from error


def versions_known(name: str, artifacts: Path, folder: Path) -> set[str]:
    """Of artifacts and archives."""
    found = {path.name for path in (artifacts / name).glob("*") if path.is_dir()}
    return found | {path.stem.removeprefix(f"{name}-") for path in folder.glob(f"{name}-*.mar")}
