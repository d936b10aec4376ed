from __future__ import annotations

import dataclasses
import random
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from marina import verify
from marina.archive import Archive
from marina.errors import ArchiveError
from support.archives import repack


def refused(path: Path) -> bool:
    try:
        return not verify.verify(path).passed
    except ArchiveError:
        return True


def findings(path: Path) -> dict[str, str]:
    """Check name -> its first finding, in words."""
    report = verify.verify(path)
    return {
        outcome.check: f"{outcome.findings[0].where}: {outcome.findings[0].message}"
        for outcome in report.outcomes
        if outcome.findings
    }


def test_a_packed_archive_passes(packed: Archive) -> None:
    report = verify.verify(packed.path)
    assert report.passed, report.findings
    assert [outcome.check for outcome in report.outcomes] == [check.name for check in verify.CHECKS]
    assert report.sha256 == packed.sha256


def test_a_byte_flipped_anywhere_is_refused(packed: Archive, tmp_path: Path) -> None:
    whole = packed.path.read_bytes()
    draw = random.Random(0)
    ends = [*range(120), *range(len(whole) - 1500, len(whole))]
    offsets = {*ends, *(draw.randrange(len(whole)) for _ in range(150))}
    flipped = tmp_path / "flipped.mar"
    slipped = []
    for offset in sorted(offsets):
        changed = bytearray(whole)
        changed[offset] ^= 1 << draw.randrange(8)
        flipped.write_bytes(changed)
        if not refused(flipped):
            slipped.append(offset)
    assert slipped == []


@pytest.mark.parametrize("cut", [0, 1, 100, -1, -22])
def test_a_shortened_or_lengthened_archive_is_refused(packed: Archive, tmp_path: Path, cut: int) -> None:
    whole = packed.path.read_bytes()
    (tmp_path / "short.mar").write_bytes(whole[:cut] if cut else b"")
    assert refused(tmp_path / "short.mar")
    (tmp_path / "long.mar").write_bytes(whole + b"\0" * (cut or 1))
    if cut >= 0:
        assert refused(tmp_path / "long.mar")


def test_a_changed_file_is_named(packed: Archive, tmp_path: Path) -> None:
    def change(root: Path) -> None:
        (root / "handlerlib" / "worker.py").write_text("raise SystemExit\n")

    found = findings(repack(packed, tmp_path, change))
    assert found == {"digests": "handlerlib/worker.py: the file was changed after packing: its SHA-256 differs"}


def test_added_and_missing_files_are_named(packed: Archive, tmp_path: Path) -> None:
    def change(root: Path) -> None:
        (root / "extra.py").write_text("")

    assert (
        "extra.py: the file is not in the build record" in findings(repack(packed, tmp_path / "a", change))["digests"]
    )

    def remove(root: Path) -> None:
        (root / "golden" / "0.png").unlink()

    assert (
        "golden/0.png: the file is in the build record" in findings(repack(packed, tmp_path / "b", remove))["digests"]
    )


def evil(
    target: Path, name: str, mode: int = 0o100644, *, compress: int = zipfile.ZIP_STORED, twice: bool = False
) -> Path:
    path = target / "evil.mar"
    info = zipfile.ZipInfo("x" if name.startswith("\0") else name)
    info.external_attr = mode << 16
    info.compress_type = compress
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr(info, b"x")
        if twice:
            with pytest.warns(UserWarning, match="Duplicate name"):
                opened.writestr(info, b"y")
    return path


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("../evil.py", {}, "leads out"),
        ("a/../../evil.py", {}, "leads out"),
        ("/etc/evil", {}, "leads out"),
        ("a\\..\\evil", {}, "leads out"),
        ("link", {"mode": stat.S_IFLNK | 0o777}, "not a plain file"),
        ("folder/", {}, "not a plain file"),
        ("bomb", {"compress": zipfile.ZIP_DEFLATED}, "the entry is compressed"),
        ("same", {"twice": True}, "two entries of the same name"),
    ],
)
def test_dangerous_zips_are_refused_before_unpacking(tmp_path: Path, name: str, options: dict, message: str) -> None:
    report = verify.verify(evil(tmp_path, name, **options))
    assert message in report.outcomes[0].findings[0].message
    assert all(outcome.skipped for outcome in report.outcomes[1:])


def test_a_plain_torchserve_archive_is_refused_with_the_reason(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "plain.mar", "w") as opened:
        opened.writestr("MAR-INF/MANIFEST.json", "{}")
    assert findings(tmp_path / "plain.mar") == {"digests": "plain.mar: build.json is missing or damaged"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("utils.py", "utils.py: a worker would import TorchServe's module"),
        ("metrics/__init__.py", "metrics: a worker would import TorchServe's module"),
        ("model.pt", "model.pt: a format that runs code when it is read"),
        ("handlerlib/vocabulary.pkl", "a format that runs code"),
    ],
)
def test_names_that_mislead_a_worker(packed: Archive, tmp_path: Path, name: str, message: str) -> None:
    def change(root: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")

    assert message in findings(repack(packed, tmp_path, change, honest=True))["names"]


def test_a_trap_in_the_configuration(packed: Archive, tmp_path: Path) -> None:
    def change(root: Path) -> None:
        config = root / "model-config.yaml"
        config.write_text(config.read_text() + "clientTimeoutInMills: 500\n")

    found = findings(repack(packed, tmp_path, change, honest=True))
    assert "clientTimeoutInMills is refused: an expired request is dropped" in found["configuration"]


def test_an_import_error_is_shown_with_its_place(packed: Archive, tmp_path: Path) -> None:
    def change(root: Path) -> None:
        entry = root / "image_classifier.py"
        entry.write_text(entry.read_text().replace("from torch import Tensor", "import no_such_package", 1))

    found = findings(repack(packed, tmp_path, change, honest=True))
    assert (
        "ModuleNotFoundError: No module named 'no_such_package' (image_classifier.py:" in found["loads in TorchServe"]
    )


def test_two_classes_in_an_entry(packed: Archive, tmp_path: Path) -> None:
    def change(root: Path) -> None:
        entry = root / "image_classifier.py"
        entry.write_text(entry.read_text() + "\n\nclass Second:\n    pass\n")

    found = findings(repack(packed, tmp_path, change, honest=True))
    assert "Expected only one class" in found["loads in TorchServe"]


def test_other_weights_fail_the_self_test(packed: Archive, tmp_path: Path) -> None:
    def change(root: Path) -> None:
        weights = safetensors.torch.load_file(root / "weights.safetensors")
        torch.manual_seed(0)
        noisy = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
        safetensors.torch.save_file(noisy, root / "weights.safetensors")

    found = findings(repack(packed, tmp_path, change, honest=True))
    assert "SelfTestFailed: golden sample golden/" in found["loads in TorchServe"]


def test_a_handler_that_lets_a_poison_sink_the_batch(packed: Archive, tmp_path: Path) -> None:
    def change(root: Path) -> None:
        worker = root / "handlerlib" / "worker.py"
        source = worker.read_text()
        answered = "return self.decode(data)\n        except RequestError as error:\n            "
        assert answered + "return error" in source
        worker.write_text(source.replace(answered + "return error", answered + "raise"))

    found = findings(repack(packed, tmp_path, change, honest=True))
    assert "UnsupportedMedia" in found["golden samples"]


def test_a_handler_that_mixes_up_its_answers(packed: Archive, tmp_path: Path) -> None:
    def change(root: Path) -> None:
        worker = root / "handlerlib" / "worker.py"
        source = worker.read_text()
        assert "in_order = iter(rows)" in source
        worker.write_text(source.replace("in_order = iter(rows)", "in_order = iter(rows[::-1])"))

    found = findings(repack(packed, tmp_path, change, honest=True))
    assert "of a batch of 32: probability of" in found["golden samples"]


def test_missing_file_and_wrong_interpreter(packed: Archive, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="there is no archive"):
        verify.verify(tmp_path / "none.mar")
    report = verify.verify(packed.path, python=str(tmp_path / "no-python"))
    assert "cannot be run" in report.findings[0].message


def test_inspect_reads_without_running(packed: Archive, tmp_path: Path) -> None:
    found = verify.inspect(packed.path)
    assert found["sha256"] == packed.sha256
    assert found["spec"]["labels"] == ["blue", "green", "red"]
    assert found["build"]["provenance"]["run"] == "tiny-test"
    assert dataclasses.replace(packed) == verify.identify(packed.path, verify.verify(packed.path))
    shutil.copyfile(__file__, tmp_path / "no.mar")
    with pytest.raises(ArchiveError, match="is not an archive of Marina's"):
        verify.inspect(tmp_path / "no.mar")
