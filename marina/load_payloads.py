"""What the load generator sends: files and folders of the user's, or the golden samples of a model's archive."""

from __future__ import annotations

import mimetypes
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from handlerlib.engine_spec import ENGINE_FILE, EngineSpec
from handlerlib.errors import SpecError
from handlerlib.spec import SPEC_FILE, ModelSpec
from marina.errors import ArchiveError, ConfigError
from marina.loadgen import Check, Payload

DEFAULT_TYPE = "application/octet-stream"
TEXT_TYPE = "text/plain"
_MOST_BYTES = 1 << 30
"""All bodies together: they stay in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What is sent in turn, and how answers are judged."""

    payloads: tuple[Payload, ...]
    check: Check | None = None
    source: str = ""
    """For people."""


def from_files(paths: Sequence[Path], content_type: str | None = None) -> Load:
    """One payload per file; of a folder all its files, hidden ones left out, in the order of their names.

    Without `content_type` it follows from each name. Raises ConfigError for what cannot be read or is empty.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(item for item in path.rglob("*") if item.is_file() and not _hidden(item, path))
        else:
            files.append(path)
    if not files:
        raise ConfigError(
            f"there is no file in {', '.join(map(str, paths))}", remedy="name files or a folder with some"
        )
    total = 0
    payloads = []
    for file in files:
        try:
            body = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}", remedy="correct --body") from error
        total += len(body)
        if total > _MOST_BYTES:
            raise ConfigError(f"the bodies are more than {_MOST_BYTES >> 30} GiB together", remedy="give fewer files")
        kind = content_type or mimetypes.guess_type(file.name)[0] or DEFAULT_TYPE
        payloads.append(Payload(body=body, content_type=kind, name=file.name))
    size = f"{total / len(payloads) / 1e3:.1f} kB on average" if len(payloads) > 1 else f"{total / 1e3:.1f} kB"
    return Load(payloads=tuple(payloads), source=f"{len(payloads)} file{'s' * (len(payloads) != 1)}, {size}")


def from_archive(path: Path) -> Load:
    """The golden samples of a packed model, with a check that every answer is the stored one within the tolerance.

    An archive that brings a faster engine is held to that engine's tolerance. Raises ArchiveError.
    """
    try:
        with zipfile.ZipFile(path) as packed:
            spec = ModelSpec.from_json(packed.read(SPEC_FILE).decode())
            bodies = [packed.read(sample.file) for sample in spec.golden.samples]
            engine = (
                EngineSpec.from_json(packed.read(ENGINE_FILE).decode()) if ENGINE_FILE in packed.namelist() else None
            )
    except (OSError, KeyError, UnicodeDecodeError, zipfile.BadZipFile, SpecError) as error:
        raise ArchiveError(f"{path} is not a readable archive: {error}", remedy="pack it again") from error
    tolerance = max(spec.golden.tolerance, engine.tolerance if engine is not None else 0.0)
    check = Check(
        "marina.load_checks:probabilities",
        {
            "expected": [sample.outputs for sample in spec.golden.samples],
            "tolerance": tolerance,
            **({"units": spec.units} if spec.scaling else {}),
            **({"thresholds": spec.thresholds} if spec.thresholds else {}),
        },
    )
    payloads = tuple(
        Payload(body=body, content_type=DEFAULT_TYPE if spec.text is None else TEXT_TYPE, name=sample.file)
        for body, sample in zip(bodies, spec.golden.samples, strict=True)
    )
    return Load(
        payloads=payloads, check=check, source=f"{len(payloads)} golden samples of {path.name}, answers checked"
    )


def _hidden(item: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in item.relative_to(root).parts)
