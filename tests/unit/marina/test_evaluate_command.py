"""`marina evaluate` on this machine, on labelled data that is not the test split; how samples are announced over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marina import scoring, training_cli
from support import images
from support.artifacts import write_artifact
from support.commands import project
from training import pipeline
from training.data import Sample
from training.errors import DataError
from training.scoring import Questions


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = project(tmp_path / "home")
    write_artifact(folder / "artifacts")
    monkeypatch.setenv("MARINA_HOME", str(folder))
    return folder


def photos(folder: Path, *labels: str) -> Path:
    for seed, label in enumerate(labels):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{seed}.png").write_bytes(images.photo(seed))
    return folder


def test_an_artifact_is_scored_on_any_labelled_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photos(home / "photos", *images.LABELS * 4)
    training_cli.evaluate("tiny", data=folder, report_file=home / "report.html", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["test_images"] == sum(map(sum, found["confusion"])) == 12
    assert found["report"] == str(home / "report.html")
    text = (home / "report.html").read_text(encoding="utf-8")
    assert str(folder) in text and f"{found['metrics']['test_accuracy']:.2%}" in text
    training_cli.evaluate("tiny", data=folder)
    assert "test_ece" in capsys.readouterr().out


def test_a_class_that_the_model_does_not_know(home: Path) -> None:
    with pytest.raises(DataError, match=r"the class 'wolf', which .* does not know"):
        training_cli.evaluate("tiny", data=photos(home / "photos", "red", "wolf"))


def test_files_that_are_no_samples_are_left_out_by_name(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photos(home / "photos", *images.LABELS)
    thumbs = folder / images.LABELS[0] / "Thumbs.db"
    thumbs.write_bytes(b"no picture")
    training_cli.evaluate("tiny", data=folder, report_file=home / "report.html", as_json=True)
    found = json.loads(capsys.readouterr().out)
    name = f"{images.LABELS[0]}/Thumbs.db"
    assert [one["name"] for one in found["left_out"]] == [name] and found["left_out"][0]["reason"]
    assert found["metrics"]["test_images"] == 3
    text = (home / "report.html").read_text(encoding="utf-8")
    assert "judged on 3 samples" in text and name in text
    training_cli.evaluate("tiny", data=folder)
    said = capsys.readouterr().out
    assert "1 left out:" in said and f"{name}: " in said
    for picture in folder.rglob("*.png"):
        picture.unlink()
    with pytest.raises(DataError, match=r"none of 1 samples can be read; .*Thumbs\.db: "):
        training_cli.evaluate("tiny", data=folder)


def test_a_sample_of_the_test_split_that_cannot_be_read_is_named(home: Path) -> None:
    asked = Questions("test split", 1, lambda: iter([Sample("red/1.png", images.LABELS[0], b"no picture")]), ())
    with pytest.raises(DataError, match=r"^red/1\.png: ") as caught:
        pipeline.evaluate_on(home / "artifacts" / "tiny" / "1.0", asked)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (images.photo(1), "application/octet-stream"),
        (images.photo(1, "JPEG"), "application/octet-stream"),
        (images.photo(1, "GIF"), "application/octet-stream"),
        (images.photo(1, "BMP"), "application/octet-stream"),
        ("Größe".encode(), "text/plain; charset=utf-8"),
        ("Größe".encode("latin-1"), "application/octet-stream"),
        (b"", "text/plain; charset=utf-8"),
    ],
)
def test_how_a_sample_is_announced(data: bytes, kind: str) -> None:
    assert scoring.content_type(data) == kind
