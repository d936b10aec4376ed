"""`marina evaluate` on this machine, on labelled data that is not the test split; how samples are announced over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marina import scoring, training_cli
from support import images
from support.artifacts import write_artifact
from support.commands import project
from training.errors import DataError


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
