"""A text artifact from training to a verified archive."""

from __future__ import annotations

from pathlib import Path

import pytest

from marina import archive, archive_cli, load_payloads, verify
from marina.archive import Archive
from support import texts
from training.compress import search
from training.errors import TargetError
from training.optimize import ladder
from training.progress import silent


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts.train(tmp_path_factory.mktemp("texts"), "text.buckets=4096").artifact


@pytest.fixture(scope="module")
def text_archive(trained: Path, handlers: Path) -> Archive:
    return archive.pack(trained, handlers=handlers, destination=trained.parents[2] / "store")


def test_it_passes_every_check(text_archive: Archive) -> None:
    report = verify.verify(text_archive.path)
    assert report.passed, report.findings


def test_inspect_shows_how_texts_are_read(text_archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    archive_cli.inspect(str(text_archive.path))
    assert '"buckets": 4096' in " ".join(capsys.readouterr().out.split())


def test_golden_samples_are_texts_and_the_card_tells_of_texts(text_archive: Archive) -> None:
    found = verify.inspect(text_archive.path)
    assert found["spec"]["handler"] == "text_classifier"
    assert "preprocess" not in found["spec"]
    assert all(sample["file"].endswith(".txt") for sample in found["spec"]["golden"]["samples"])
    assert "text/plain" in found["card"] and "image" not in found["card"]
    load = load_payloads.from_archive(text_archive.path)
    assert {payload.content_type for payload in load.payloads} == {"text/plain"}


def test_what_is_for_images_says_so(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="reads texts"):
        ladder.run(trained, ladder.Settings(device="cpu"), runs=tmp_path, artifacts=tmp_path, report=silent)


def test_a_smaller_one_is_an_archive_like_any_other(
    trained: Path, text_archive: Archive, handlers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.compress.measure._BLOCK_SECONDS", 0.001)
    options = search.Options(budget=15.0, methods=("prune", "int8"))
    result = search.compress(trained, options, runs=tmp_path / "runs", artifacts=tmp_path / "artifacts", report=silent)
    rows = {row.name: row for row in result.rows}
    assert "its terms are hashed" in rows["prune"].reason
    smaller = rows["int8"].artifact
    assert smaller is not None, rows["int8"].reason
    packed = archive.pack(smaller, handlers=handlers, destination=tmp_path)
    report = verify.verify(packed.path)
    assert report.passed, report.findings
    assert packed.size < text_archive.size
