"""What is changed in TorchServe's classes, and that no other class is touched. Its effect: tests/contract."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from marina import frontend_patch, java
from marina.frontend_patch import BATCHES, DISPATCH, PATCHES, RECEIVING, Patch


def shipped(patch: Patch) -> bytes:
    with zipfile.ZipFile(java.torchserve_home() / frontend_patch.JAR) as jar:
        return jar.read(f"{patch.name}.class")


def test_the_installed_torchserve_is_the_one_that_is_known(tmp_path: Path) -> None:
    patched = frontend_patch.write(java.torchserve_home(), tmp_path)
    assert patched.applied == PATCHES and patched.refused == ()
    assert patched.jar is not None
    with zipfile.ZipFile(patched.jar) as jar:
        assert set(jar.namelist()) == {f"{patch.name}.class" for patch in PATCHES}


def test_the_installed_jar_stays_as_it_is(tmp_path: Path) -> None:
    jar = java.torchserve_home() / frontend_patch.JAR
    before = hashlib.sha256(jar.read_bytes()).digest()
    frontend_patch.write(java.torchserve_home(), tmp_path)
    assert hashlib.sha256(jar.read_bytes()).digest() == before


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name.rpartition("/")[2])
def test_only_what_is_named_differs(patch: Patch) -> None:
    before, after = shipped(patch), frontend_patch.apply(patch, shipped(patch))
    grown = sum(len(exchange.new) - len(exchange.old) for exchange in patch.exchanges) + sum(map(len, patch.constants))
    assert len(after) == len(before) + grown
    if patch is BATCHES:
        differing = [index for index in range(len(before)) if before[index] != after[index]]
        start = before.index(patch.exchanges[0].old)
        assert differing[0] == start and differing[-1] < start + 210, "one place in pollBatch, not 210 bytes long"


def test_java_accepts_the_changed_classes(tmp_path: Path) -> None:
    """-Xverify:all also checks what is loaded from the class path; `--help` loads and runs the main class."""
    home = java.torchserve_home()
    jar = frontend_patch.write(home, tmp_path).jar
    class_path = f"{jar}:{home / frontend_patch.JAR}"
    program = [str(java.find().executable), "-Dmodel_server_home=/", "-cp", class_path, "org.pytorch.serve.ModelServer"]
    said = subprocess.run([*program, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert "usage: " in said.stdout, said.stderr


@pytest.mark.parametrize("unknown", [BATCHES, DISPATCH, RECEIVING], ids=lambda patch: patch.name.rpartition("/")[2])
def test_another_class_is_left_alone_and_named(tmp_path: Path, unknown: Patch) -> None:
    home = copy_without(unknown, tmp_path / "home")
    patched = frontend_patch.write(home, tmp_path)
    assert unknown not in patched.applied and len(patched.applied) == len(PATCHES) - 1
    assert patched.refused == (f"{unknown.name} is not the class of TorchServe 0.12.0",)


def test_a_jar_that_has_none_of_them_gives_no_jar(tmp_path: Path) -> None:
    (tmp_path / "ts" / "frontend").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / frontend_patch.JAR, "w") as jar:
        jar.writestr("other.class", b"")
    patched = frontend_patch.write(tmp_path, tmp_path)
    assert patched.jar is None and patched.applied == () and len(patched.refused) == len(PATCHES)


def test_bytes_that_occur_twice_are_not_exchanged() -> None:
    with pytest.raises(ValueError, match="occurs 2 times"):
        frontend_patch.apply(BATCHES, shipped(BATCHES) + BATCHES.exchanges[0].old)


def copy_without(patch: Patch, home: Path) -> Path:
    """A TorchServe whose class of this name is another one."""
    (home / "ts" / "frontend").mkdir(parents=True)
    shutil.copy(java.torchserve_home() / frontend_patch.JAR, home / frontend_patch.JAR)
    with zipfile.ZipFile(home / frontend_patch.JAR, "a") as jar, pytest.warns(UserWarning, match="Duplicate name"):
        jar.writestr(f"{patch.name}.class", shipped(patch) + b" ")
    return home
