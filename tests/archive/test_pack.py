from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import pytest

from marina import archive
from marina.archive import Archive
from marina.errors import ArchiveError
from support.artifacts import write_artifact


def test_same_inputs_same_bytes(artifact: Path, handlers: Path, packed: Archive, tmp_path: Path) -> None:
    """Another folder, another time, another umask, other modification times, files created in another order."""
    moved = tmp_path / "elsewhere" / "art"
    for path in sorted(artifact.rglob("*"), reverse=True):
        if path.is_file():
            target = moved / path.relative_to(artifact)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            os.utime(target, (time.time() - 1e7, time.time() - 1e7))
    before = os.umask(0o077)
    try:
        again = archive.pack(moved, handlers=handlers, destination=tmp_path / "store")
    finally:
        os.umask(before)
    assert again.sha256 == packed.sha256
    assert again.path.read_bytes() == packed.path.read_bytes()


def test_other_weights_other_bytes(handlers: Path, packed: Archive, tmp_path: Path) -> None:
    other = archive.pack(write_artifact(tmp_path, seed=1), handlers=handlers, destination=tmp_path)
    assert other.sha256 != packed.sha256


def test_contents_and_record(packed: Archive, artifact: Path) -> None:
    assert packed.path.name == "tiny-1.0.mar"
    with zipfile.ZipFile(packed.path) as opened:
        assert opened.testzip() is None
        names = opened.namelist()
        record = json.loads(opened.read("build.json"))
        manifest = json.loads(opened.read("MAR-INF/MANIFEST.json"))
        assert opened.read("weights.safetensors") == (artifact / "weights.safetensors").read_bytes()
    assert names == sorted(names)
    assert {"image_classifier.py", "handlerlib/worker.py", "model-config.yaml", "model_spec.json", "golden/0.png",
            "MODEL_CARD.md", "metrics.json", "provenance.json"} <= set(names)  # fmt: skip
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", "/"))]
    assert set(record["files"]) == set(names) - {"build.json"}
    assert record["provenance"]["run"] == "tiny-test"
    assert manifest["model"]["modelName"] == "tiny"
    assert manifest["model"]["handler"] == "image_classifier.py"


def test_a_failed_pack_leaves_the_old_archive_and_no_partial_file(
    artifact: Path, handlers: Path, tmp_path: Path
) -> None:
    first = archive.pack(artifact, handlers=handlers, destination=tmp_path / "store")
    broken = tmp_path / "broken"
    shutil.copytree(artifact, broken)
    (broken / "golden" / "1.png").unlink()
    with pytest.raises(ArchiveError, match=r"golden sample golden/1\.png is not a file"):
        archive.pack(broken, handlers=handlers, destination=tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == [first.path.name]
    assert archive.sha256_of(first.path) == first.sha256


@pytest.mark.parametrize("missing", ["weights.safetensors", "model_spec.json", "metrics.json", "provenance.json"])
def test_an_incomplete_artifact_is_refused(artifact: Path, handlers: Path, tmp_path: Path, missing: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(artifact, broken)
    (broken / missing).unlink()
    with pytest.raises(ArchiveError, match=f"lacks {missing}") as caught:
        archive.pack(broken, handlers=handlers, destination=tmp_path)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "../evil", "model name '../evil' must match"),
        ("version", "latest", "version 'latest' must be a dotted number"),
        ("handler", "service", "handler name 'service' is reserved"),
        ("handler", "no_such", "handler 'no_such' needs"),
    ],
)
def test_names_that_torchserve_would_trip_over(
    artifact: Path, handlers: Path, tmp_path: Path, key: str, value: str, message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(artifact, broken)
    spec = json.loads((broken / "model_spec.json").read_text())
    spec[key] = value
    (broken / "model_spec.json").write_text(json.dumps(spec))
    with pytest.raises(ArchiveError, match=message):
        archive.pack(broken, handlers=handlers, destination=tmp_path)


def test_a_handler_with_a_trap_in_its_configuration_is_refused(artifact: Path, handlers: Path, tmp_path: Path) -> None:
    mine = tmp_path / "handlers"
    shutil.copytree(handlers, mine)
    config = mine / "image_classifier.yaml"
    config.write_text(config.read_text().replace("maxBatchDelay: 1 ", "maxBatchDelay: 0 "))
    with pytest.raises(ArchiveError, match="maxBatchDelay must be a whole number of at least 1"):
        archive.pack(artifact, handlers=mine, destination=tmp_path)


def test_reserved_names_are_all_that_torchserve_has() -> None:
    import ts

    folder = Path(ts.__file__).parent
    present = {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
    assert present - {"__init__", "__pycache__"} <= archive.RESERVED_NAMES
