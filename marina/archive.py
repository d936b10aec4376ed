"""Artifact + handler -> a standard `.mar`, the same bytes for the same inputs, whenever and wherever it is packed.

torch-model-archiver lays out the archive; what makes its output differ between two runs (timestamps, file order, modes,
compression) is then normalised: entries sorted, stored uncompressed, dated 1980-01-01, mode 0644. `build.json` lists
each file's SHA-256 and ends with a digest of itself, so that no byte can change unnoticed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import reprlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import marina
from handlerlib import engine_spec
from handlerlib.engine_spec import ENGINE_FILE, ENGINE_FOLDER, EngineSpec
from handlerlib.errors import SpecError
from handlerlib.spec import GOLDEN_FOLDER, SPEC_FILE, WEIGHTS_FILE, ModelSpec
from marina import model_config
from marina.errors import ArchiveError

BUILD_FILE = "build.json"
MANIFEST_FILE = "MAR-INF/MANIFEST.json"
CARD_FILE = "MODEL_CARD.md"
PROVENANCE_FILE = "provenance.json"
METRICS_FILE = "metrics.json"
SCHEMA_VERSION = 1

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""What torch-model-archiver accepts, so that the name also is a safe file name and URL segment."""
VERSION_PATTERN = re.compile(r"[0-9]+(\.[0-9]+)*")
MOST_CHARACTERS = 100
"""Of a name and of a version: a file is named after both, and a file system takes 255 bytes."""
RESERVED_NAMES = frozenset(
    [
        "arg_parser",
        "async_service",
        "configs",
        "context",
        "frontend",
        "handler_utils",
        "launcher",
        "llm_launcher",
        "metrics",
        "model_loader",
        "model_server",
        "model_service",
        "model_service_worker",
        "protocol",
        "service",
        "torch_handler",
        "ts",
        "utils",
        "version",
    ]
)
"""Module names that a worker finds in TorchServe's own folder before it looks into the archive."""

_ARTIFACT_FILES = (SPEC_FILE, WEIGHTS_FILE, METRICS_FILE, PROVENANCE_FILE, CARD_FILE)
_OPTIMISED = "optimise the parent again: marina optimize ARTIFACT"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_CREATED_ON = "01/01/1980 00:00:00"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Archive:
    """A packed file and what identifies it."""

    path: Path
    name: str
    version: str
    sha256: str
    size: int
    """Bytes."""

    @property
    def fields(self) -> dict[str, Any]:
        """As JSON shows it."""
        return {
            "archive": str(self.path),
            "name": self.name,
            "version": self.version,
            "sha256": self.sha256,
            "bytes": self.size,
        }

    @property
    def key(self) -> str:
        """`NAME:VERSION`, as commands take it."""
        return f"{self.name}:{self.version}"


def pack(artifact: Path, *, handlers: Path, destination: Path) -> Archive:
    """Write `destination/NAME-VERSION.mar` (through a temporary file and a rename) and return what it is.

    `artifact` is a folder written by export; `handlers` is the folder with the entries and `handlerlib/`. A
    `model-config.yaml` in the artifact, such as `marina tune` writes, takes the place of the handler's.
    Raises ArchiveError naming the file at fault.
    """
    spec = _read_artifact(artifact)
    entry, config = _entry_files(spec, artifact, handlers)
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="marina-pack-") as scratch:
        root = _lay_out(spec, artifact, entry, config, handlers / "handlerlib", Path(scratch))
        _normalise_manifest(root / MANIFEST_FILE)
        _write_build_record(root, spec)
        target = destination / f"{spec.name}-{spec.version}.mar"
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            write_canonical(root, partial)
            digest, size = sha256_of(partial), partial.stat().st_size
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return Archive(target, spec.name, spec.version, digest, size)


def require_key(name: str, version: str) -> None:
    """Raises ArchiveError when an archive of this name and version cannot be filed."""
    if not NAME_PATTERN.fullmatch(name) or len(name) > MOST_CHARACTERS:
        raise ArchiveError(
            f"model name {reprlib.repr(name)} must match {NAME_PATTERN.pattern}, with at most {MOST_CHARACTERS} characters",
            remedy="train with --set name=...",
        )
    if not VERSION_PATTERN.fullmatch(version) or len(version) > MOST_CHARACTERS:
        raise ArchiveError(
            f"version {reprlib.repr(version)} must be a dotted number of at most {MOST_CHARACTERS} characters",
            remedy="train with --set version=1.0",
        )


def write_canonical(root: Path, target: Path) -> None:
    """The files below `root` as a zip whose bytes depend on their names and contents alone."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in file_names(root):
            source = root / name
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3  # Unix, on every system
            info.external_attr = 0o100644 << 16
            info.file_size = source.stat().st_size
            with source.open("rb") as reader, archive.open(info, "w") as writer:
                shutil.copyfileobj(reader, writer, _CHUNK)


def file_names(root: Path) -> list[str]:
    """Files below `root`, relative, with `/`, sorted by their UTF-8 bytes."""
    found = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(found, key=str.encode)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def encode_build_record(record: Mapping[str, Any]) -> bytes:
    """The one valid text of a build record: sorted, indented, closed by a digest of everything else in it."""
    body = {key: value for key, value in record.items() if key != "digest"}
    digest = hashlib.sha256(_canonical_json(body)).hexdigest()
    return _canonical_json({**body, "digest": digest})


def _canonical_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _read_artifact(artifact: Path) -> ModelSpec:
    if not artifact.is_dir():
        raise ArchiveError(
            f"there is no artifact folder {artifact}", remedy="run 'marina train' or 'marina export' first"
        )
    for name in _ARTIFACT_FILES:
        if not (artifact / name).is_file():
            raise ArchiveError(f"artifact {artifact} lacks {name}", remedy="export the run again: marina export RUN")
    try:
        spec = ModelSpec.load(artifact)
    except SpecError as error:
        raise ArchiveError(f"artifact {artifact}: {error}", remedy="export the run again: marina export RUN") from error
    require_key(spec.name, spec.version)
    for sample in spec.golden.samples:
        parts = PurePosixPath(sample.file).parts
        if len(parts) != 2 or parts[0] != GOLDEN_FOLDER or not (artifact / sample.file).is_file():
            raise ArchiveError(
                f"golden sample {sample.file} is not a file in {artifact}", remedy="export the run again"
            )
    return spec


def _read_engine(artifact: Path) -> EngineSpec | None:
    try:
        engine = EngineSpec.load(artifact)
    except SpecError as error:
        raise ArchiveError(f"artifact {artifact}: {error}", remedy=_OPTIMISED) from error
    damaged = engine_spec.files_obstacle(engine, artifact) if engine is not None else None
    if damaged is not None:
        raise ArchiveError(f"artifact {artifact}: {damaged.detail}", remedy=_OPTIMISED)
    return engine


def _entry_files(spec: ModelSpec, artifact: Path, handlers: Path) -> tuple[Path, Path]:
    if spec.handler in RESERVED_NAMES or not spec.handler.isidentifier():
        raise ArchiveError(
            f"handler name '{spec.handler}' is reserved by TorchServe", remedy="rename the handler's file"
        )
    entry, config = handlers / f"{spec.handler}.py", handlers / f"{spec.handler}.yaml"
    for path in (entry, config):
        if not path.is_file():
            raise ArchiveError(
                f"handler '{spec.handler}' needs {path}", remedy="add the file, or export with another handler"
            )
    own = artifact / model_config.CONFIG_FILE
    config = own if own.is_file() else config
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArchiveError(f"{config} cannot be read: {error}", remedy="mend the file, or remove it") from error
    model_config.read(text)
    return entry, config


def _lay_out(spec: ModelSpec, artifact: Path, entry: Path, config: Path, library: Path, scratch: Path) -> Path:
    """Let torch-model-archiver build the unpacked archive; returns its root."""
    extra = scratch / "extra"
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    shutil.copytree(library, extra / "handlerlib", ignore=ignore)
    for name in (SPEC_FILE, METRICS_FILE, PROVENANCE_FILE, CARD_FILE):
        shutil.copyfile(artifact / name, extra / name)
    (extra / GOLDEN_FOLDER).mkdir()
    for sample in spec.golden.samples:
        shutil.copyfile(artifact / sample.file, extra / sample.file)
    engine = _read_engine(artifact)
    if engine is not None:
        shutil.copyfile(artifact / ENGINE_FILE, extra / ENGINE_FILE)
        for file in engine.files:
            (extra / ENGINE_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(artifact / file.path, extra / file.path)
    shutil.copyfile(config, scratch / model_config.CONFIG_FILE)
    private_temp, out = scratch / "temp", scratch / "out"
    private_temp.mkdir()
    out.mkdir()
    # fmt: off
    command = [
        sys.executable, "-m", "model_archiver.model_packaging",
        "--model-name", spec.name, "--version", spec.version,
        "--handler", str(entry), "--serialized-file", str(artifact / WEIGHTS_FILE),
        "--extra-files", str(extra), "--config-file", str(scratch / model_config.CONFIG_FILE),
        "--runtime", "python", "--archive-format", "no-archive", "--export-path", str(out),
    ]
    # fmt: on
    # It empties {temp}/{model name} before it starts: in a shared folder that could be somebody's data.
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(private_temp)}, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise ArchiveError(
            f"torch-model-archiver failed: {last}", remedy="check the artifact's files and the disk's free space"
        )
    return out / spec.name


def _normalise_manifest(path: Path) -> None:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["createdOn"] = _CREATED_ON
    path.write_bytes(_canonical_json(manifest))


def _write_build_record(root: Path, spec: ModelSpec) -> None:
    files = {
        name: {"bytes": (root / name).stat().st_size, "sha256": sha256_of(root / name)} for name in file_names(root)
    }
    record = {
        "schema": SCHEMA_VERSION,
        "name": spec.name,
        "version": spec.version,
        "handler": spec.handler,
        "built_with": {
            "marina": marina.__version__,
            "torch-model-archiver": importlib.metadata.version("torch-model-archiver"),
        },
        "metrics": _read_json(root / METRICS_FILE),
        "provenance": _read_json(root / PROVENANCE_FILE),
        "files": files,
    }
    (root / BUILD_FILE).write_bytes(encode_build_record(record))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArchiveError(
            f"{path.name} is not JSON: {error}", remedy="export the run again: marina export RUN"
        ) from error
