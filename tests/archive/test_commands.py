"""The commands that need no server, on real data, each as its own process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support import images
from support.commands import marina, project

QUICK = ("--set", "train.epochs=1", "--set", "model.architecture=tiny_cnn", "--set", "data.max_images=200")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A project in which the digits were trained, for one epoch on a few images."""
    home = project(tmp_path_factory.mktemp("home"))
    ran = marina(home, "train", "digits", *QUICK, "--json")
    assert ran.code == 0, ran.err
    return home, ran.json


def test_train_prints_one_object(trained: tuple[Path, dict[str, Any]]) -> None:
    home, found = trained
    assert Path(found["run"]).is_dir() and Path(found["run"]).is_relative_to(home)
    assert Path(found["artifact"], "model_spec.json").is_file()
    assert 0 <= found["metrics"]["test_accuracy"] <= 1
    assert found["reused"] is False


def test_pack_verify_inspect(trained: tuple[Path, dict[str, Any]]) -> None:
    home, found = trained
    packed = marina(home, "pack", found["artifact"], "--json")
    assert packed.code == 0, packed.err
    assert Path(packed.json["archive"]) == home / "model_store" / "digits-1.0.mar"
    assert marina(home, "pack", "digits", "--json").json["sha256"] == packed.json["sha256"]
    index = json.loads((home / "model_store" / "index.json").read_text())
    assert index["archives"]["digits-1.0.mar"]["sha256"] == packed.json["sha256"]

    verified = marina(home, "verify", "digits", "--json")
    assert verified.code == 0, verified.err
    assert verified.json["passed"] is True
    assert marina(home, "inspect", "digits:1.0", "--json").json["sha256"] == packed.json["sha256"]
    table = marina(home, "inspect", "digits")
    assert "cnn" in table.out and "weights.safetensors" in table.out

    broken = home / "broken.mar"
    data = bytearray(Path(packed.json["archive"]).read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    refused = marina(home, "verify", broken)
    assert refused.code == 5
    assert "cannot be unpacked: Bad CRC-32" in refused.out and "fix: " in refused.err
    assert "Traceback" not in refused.err
    refused = marina(home, "verify", broken, "--json")
    assert (refused.code, refused.json["passed"]) == (5, False)


def test_evaluate_and_export_agree_with_training(trained: tuple[Path, dict[str, Any]]) -> None:
    home, found = trained
    judged = marina(home, "evaluate", "digits", "--json")
    assert judged.code == 0, judged.err
    assert judged.json["metrics"]["test_accuracy"] == found["metrics"]["test_accuracy"]
    assert len(judged.json["confusion"]) == len(judged.json["labels"]) == 10
    before = {path.name: path.read_bytes() for path in Path(found["artifact"]).iterdir() if path.is_file()}
    exported = marina(home, "export", Path(found["run"]).name, "--json")
    assert exported.code == 0, exported.err
    assert {
        path.name: path.read_bytes() for path in Path(exported.json["artifact"]).iterdir() if path.is_file()
    } == before


def test_the_second_training_is_reused(trained: tuple[Path, dict[str, Any]]) -> None:
    home, found = trained
    again = marina(home, "train", "digits", *QUICK, "--json").json
    assert (again["reused"], again["run"], again["metrics"]) == (True, found["run"], found["metrics"])


def test_own_photos_in_class_folders(tmp_path: Path) -> None:
    home = project(tmp_path / "home")
    photos = tmp_path / "photos"
    for label, shade in (("dark", 30), ("light", 220)):
        (photos / label).mkdir(parents=True)
        for seed in range(12):
            picture = (images.pixels(seed, 20 + seed, 24) // 8 + shade).astype("uint8")
            (photos / label / f"{seed}.jpg").write_bytes(images.encode(picture, "JPEG"))
    (photos / "dark" / "broken.jpg").write_bytes(images.truncated("JPEG"))
    ran = marina(
        home, "train", "folder", "--set", f"data.root={photos}", "--set", "name=shades", "--set", "train.epochs=2",
        "--set", "model.architecture=tiny_cnn", "--set", "data.image_size=16", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "broken.jpg" in ran.err
    packed = marina(home, "pack", ran.json["artifact"], "--json")
    assert packed.code == 0, packed.err
    assert str(tmp_path) not in Path(packed.json["archive"]).read_bytes().decode("latin-1")
    assert marina(home, "verify", "shades").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "digit"], 3, "digits"),
        (["train", "digits", "--set", "train.epoch=3"], 3, "did you mean 'train.epochs'"),
        (["train", "folder"], 4, "data.root"),
        (["train", "folder", "--set", "data.root=/no/such/folder"], 4, "/no/such/folder"),
        (["pack", "nothing"], 5, "there is no artifact nothing"),
        (["verify", "none.mar"], 5, "there is no archive none.mar"),
        (["serve"], 5, "no archive in"),
        (["serve", "--device", "tpu"], 3, "device"),
        (["predict", "digits", "none.png", "--url", "http://127.0.0.1:9"], 7, "none.png: cannot be read"),
        (["status", "--url", "http://127.0.0.1:9"], 7, "127.0.0.1:9"),
        (["no-such-command"], 2, "No such command"),
        (["scale", "digits", "0"], 2, "greater than or equal to 1"),
    ],
)
def test_errors_have_one_message_a_remedy_and_an_exit_code(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    ran = marina(project(tmp_path / "home"), *arguments)
    assert ran.code == code, ran.err
    assert message in ran.err.replace("\n", " ")
    assert "Traceback" not in ran.err
    if code not in (1, 2):
        assert "fix: " in ran.err


def test_errors_as_json(tmp_path: Path) -> None:
    ran = marina(project(tmp_path / "home"), "pack", "nothing", "--json")
    assert (ran.code, ran.json["exit_code"], ran.json["kind"]) == (5, 5, "ArchiveError")
    assert ran.json["error"] and ran.json["remedy"]


def test_unknown_settings_of_the_environment_are_refused(tmp_path: Path) -> None:
    ran = marina(project(tmp_path / "home"), "serve", MARINA_INFERENCE_PROT="9000")
    assert ran.code == 3
    assert "did you mean 'MARINA_INFERENCE_PORT'" in ran.err


def test_marina_home_must_be_a_project(tmp_path: Path) -> None:
    home = project(tmp_path / "home")
    shutil.rmtree(home / "handlers")
    ran = marina(home, "pack", "digits")
    assert ran.code == 3
    assert "MARINA_HOME" in ran.err
