"""An archive that somebody changed after it was packed."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from marina import archive
from marina.archive import Archive


def repack(packed: Archive, target: Path, change: Callable[[Path], object], *, honest: bool = False) -> Path:
    """Unpack, change a file, pack again; `honest` also rewrites the build record, as an author would."""
    root = target / "root"
    with zipfile.ZipFile(packed.path) as opened:
        opened.extractall(root)
    change(root)
    if honest:
        record = json.loads((root / "build.json").read_text())
        record["files"] = {
            name: {"bytes": (root / name).stat().st_size, "sha256": archive.sha256_of(root / name)}
            for name in archive.file_names(root)
            if name != "build.json"
        }
        (root / "build.json").write_bytes(archive.encode_build_record(record))
    archive.write_canonical(root, target / "changed.mar")
    return target / "changed.mar"
