"""`model_store/`: the archives ready to be served and `index.json`, which says what each of them is."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from handlerlib.spec import SPEC_FILE
from marina import archive, model_config
from marina.archive import Archive
from marina.errors import ArchiveError, StoreError
from marina.server import ServedModel

INDEX_FILE = "index.json"


def publish(store: Path, packed: Archive) -> None:
    """Record an archive that lies in the store. Several processes may publish at once.

    Raises ArchiveError for a name or a version with which no index could be read again.
    """
    archive.require_key(packed.name, packed.version)
    with _locked(store):
        index = read_index(store)
        index["archives"][packed.path.name] = {
            "name": packed.name,
            "version": packed.version,
            "sha256": packed.sha256,
            "bytes": packed.size,
        }
        _write_index(store, index)


def forget(store: Path, file_name: str) -> None:
    """Remove an archive, its entry in the index, and what a killed copy of it left. Nothing has to be there."""
    with _locked(store):
        (store / file_name).unlink(missing_ok=True)
        for partial in store.glob(f".{file_name}.*"):
            partial.unlink(missing_ok=True)
        index = read_index(store)
        if index["archives"].pop(file_name, None) is not None:
            _write_index(store, index)


def archives(store: Path) -> list[Archive]:
    """Every archive of the index whose file is there, oldest version first within a name.

    Raises StoreError when a file was changed since it was packed, or lies there without having been packed here.
    """
    entries = read_index(store)["archives"]
    found = []
    for path in sorted(store.glob("*.mar")):
        entry = entries.get(path.name)
        if entry is None:
            raise StoreError(
                f"{path} is not in {INDEX_FILE}", remedy=f"check it and add it: marina verify {path} --publish"
            )
        found.append(Archive(path, entry["name"], entry["version"], entry["sha256"], entry["bytes"]))
    return sorted(found, key=lambda item: (item.name, version_key(item.version)))


def select(store: Path, wanted: Sequence[str]) -> list[Archive]:
    """`NAME` (its newest version) or `NAME:VERSION` each; with nothing wanted, the newest of every name.

    Raises StoreError when the store is empty or does not hold what is wanted.
    """
    available = archives(store)
    if not available:
        raise StoreError(f"no archive in {store}", remedy="pack one: marina train digits, then marina pack digits")
    by_key = {item.key: item for item in available}
    # Versions ascend, so the last one of a name stays.
    newest = {item.name: item for item in available}
    chosen = []
    for name in wanted or newest:
        item = by_key.get(name) or newest.get(name)
        if item is None:
            raise StoreError(
                f"model '{name}' is not in {store}; there are: {', '.join(by_key)}",
                remedy="pack it: marina pack ARTIFACT",
            )
        chosen.append(item)
    return list(dict.fromkeys(chosen))


def to_serve(items: Sequence[Archive]) -> list[ServedModel]:
    """What the supervisor needs to know of each archive; the newest version of a name is its default.

    Raises StoreError for an archive whose bytes are not the ones that were packed.
    """
    newest = {item.name: item.version for item in sorted(items, key=lambda item: version_key(item.version))}
    return [
        ServedModel(
            name=item.name,
            version=item.version,
            archive_file=item.path.resolve(),
            default=newest[item.name] == item.version,
            config=_read_config(item),
            sha256=item.sha256,
        )
        for item in items
    ]


def batching(store: Path, name: str) -> dict[str, tuple[int, int]]:
    """Version -> batch size and longest wait for a batch in ms, as each archive of a name asks for them.

    Quick, since whether the bytes are the packed ones is not looked at; an archive that cannot be read is left out.
    """
    found = {}
    for file_name, entry in read_index(store)["archives"].items():
        if entry["name"] == name:
            with contextlib.suppress(ArchiveError):
                config = _config(store / file_name)
                found[entry["version"]] = (int(config["batchSize"]), int(config["maxBatchDelay"]))
    return found


def _read_config(item: Archive) -> dict[str, Any]:
    if archive.sha256_of(item.path) != item.sha256:
        raise StoreError(
            f"{item.path} was changed since it was packed (its SHA-256 is not the one in {INDEX_FILE})",
            remedy="pack it again, and find out who changed it",
        )
    return _config(item.path)


def _config(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as packed:
            text = packed.read(model_config.CONFIG_FILE).decode()
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError, OSError) as error:
        raise StoreError(f"{path} is not a readable archive: {error}", remedy="pack it again") from error
    return model_config.read(text)


def find_artifact(artifacts: Path, text: str) -> Path:
    """A folder, or NAME (its newest version) or NAME:VERSION below `artifacts`. Raises ArchiveError."""
    folder = Path(text)
    # A folder beside the user that shares the model's name, such as that of its data, is not what is meant.
    if folder.is_dir() and ((folder / SPEC_FILE).is_file() or not (artifacts / text).is_dir()):
        return folder
    name, _, version = text.partition(":")
    found = [path for path in (artifacts / name).glob("*") if archive.VERSION_PATTERN.fullmatch(path.name)]
    if version:
        found = [path for path in found if path.name == version]
    if not found:
        raise ArchiveError(
            f"there is no artifact {text}", remedy="train one: marina train digits; artifacts lie in artifacts/"
        )
    return max(found, key=lambda path: version_key(path.name))


def find_trained(runs: Path, artifacts: Path, text: str) -> Path:
    """A run by its name below `runs`, or what `find_artifact` finds. Raises ArchiveError."""
    run = runs / text
    return run if run.is_dir() and not Path(text).is_dir() else find_artifact(artifacts, text)


def version_key(version: str) -> tuple[int, ...]:
    """Dotted number -> what sorts 1.10 after 1.9."""
    return tuple(int(part) for part in version.split("."))


def read_index(store: Path) -> dict[str, Any]:
    """`index.json` as it stands, empty when there is none. Raises StoreError when it is damaged."""
    path = store / INDEX_FILE
    if not path.exists():
        return {"schema": 1, "archives": {}}
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for entry in index["archives"].values():
            version_key(entry["version"])
            entry["name"], entry["sha256"], entry["bytes"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged: {error!r}", remedy="delete it and pack the artifacts again") from error
    return index


def _write_index(store: Path, index: dict[str, Any]) -> None:
    partial = store / f".{INDEX_FILE}.{os.getpid()}"
    partial.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.chmod(0o644)  # read by the server's own user in its container
    partial.replace(store / INDEX_FILE)


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    store.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(store, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
