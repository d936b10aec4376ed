"""How commands end that cannot do what was asked: a sentence and its remedy, an exit code, and with --json one object."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marina import archive, cli, compose, images, plan, settings, training_cli, verify
from marina.engine import Engine
from marina.errors import ConfigError
from support.artifacts import write_artifact
from support.commands import project
from training import config
from training.errors import DataError, RecipeError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = project(tmp_path / "home")
    monkeypatch.setenv("MARINA_HOME", str(folder))
    return folder


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["marina", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(str(ended.value.code)), out, err

    return call


def _error(out: str) -> dict[str, Any]:
    """The one object on standard output."""
    found = json.loads(out)
    assert found["error"] and isinstance(found["remedy"], str)
    return dict(found)


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench",),
        ("bench", "http://127.0.0.1:9", "--nope"),
        ("bench", "http://127.0.0.1:9", "--timeout", "0"),
        ("bench", "http://127.0.0.1:9", "--duration", "-1"),
        ("tune", "m", "--p99", "5ms", "--budget", "-1"),
        ("retire", "digits"),
        ("nosuch",),
        ("key", "add", "partner", "--expires", "0"),
    ],
)
def test_wrong_usage_is_an_object_too(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments, "--json")
    found = _error(out)
    assert code == found["exit_code"] == 2 and found["kind"] == "UsageError"
    assert "--help" in found["remedy"] and found["error"] in err.replace("\n", " ")


def test_wrong_usage_is_a_panel_for_people(run: Run) -> None:
    code, out, err = run("bench", "--nope")
    assert (code, out) == (2, "")
    assert "Usage: " in err and "bench --help" in err and "No such option" in err


def test_an_interrupted_command_is_an_object_with_its_own_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("marina.archive_cli.find_home", interrupt)
    code, out, _ = run("inspect", "m", "--json")
    assert code == _error(out)["exit_code"] == 130
    assert run("inspect", "m") == (130, "", "")


def test_a_file_where_a_folder_is_needed(run: Run, home: Path) -> None:
    artifact = write_artifact(home / "artifacts")
    occupied = home / "occupied"
    occupied.write_text("")
    code, out, err = run("pack", artifact, "--store", occupied, "--json")
    found = _error(out)
    assert code == found["exit_code"] == 3
    assert str(occupied) in found["error"] and found["remedy"]
    assert "Traceback" not in err
    code, out, err = run("pack", artifact, "--store", occupied)
    assert code == 3 and out == "" and "fix: " in err and "Traceback" not in err


def _refusing(number: int, *places: object) -> OSError:
    return OSError(number, os.strerror(number), *places)


@pytest.mark.parametrize(
    ("error", "words", "remedy"),
    [
        (_refusing(errno.ENOTDIR, "/a"), "/a: Not a directory", "give the path of a folder"),
        (_refusing(errno.EISDIR, b"/a"), "/a: Is a directory", "give the path of a file"),
        (_refusing(errno.EIO, "/a", None, "/b"), "/b: Input/output error", "check that path and its disk"),
        (_refusing(errno.EIO, 7), "Input/output error", "see the message"),
        (OSError("odd"), "odd", "see the message"),
        (OSError(), "OSError", "see the message"),
    ],
)
def test_what_the_system_refuses_is_told_with_its_place_and_a_remedy(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: OSError, words: str, remedy: str
) -> None:
    def refuse() -> None:
        raise error

    monkeypatch.setattr("marina.archive_cli.find_home", refuse)
    code, out, _ = run("inspect", "m", "--json")
    found = _error(out)
    assert (code, found["error"], found["remedy"]) == (3, words, remedy)


def test_a_reader_that_has_gone_is_no_error_to_tell(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("marina.archive_cli.find_home", gone)
    assert run("inspect", "m") == (1, "", "")


def test_keys_have_their_commands(run: Run) -> None:
    code, out, _ = run("key", "--help")
    assert code == 0 and all(f" {name} " in out for name in ("add", "revoke", "list"))


def test_certificates_that_are_none(run: Run, home: Path) -> None:
    text = home / "text.txt"
    text.write_text("no certificate")
    for file in (text, home / "missing.pem"):
        code, out, _ = run("bench", "https://127.0.0.1:9/", "--ca-file", file, "--json")
        assert code == 3 and str(file) in _error(out)["error"] and "--ca-file" in _error(out)["remedy"]


def test_a_report_that_cannot_be_written_is_told_before_anything_is_computed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_cli, "_evaluate_here", lambda *_: pytest.fail("it must be told before"))
    with pytest.raises(ConfigError, match=r"--report .* cannot be written: it is a folder"):
        training_cli.evaluate("tiny", report_file=home)


@pytest.mark.parametrize("name", ["missing", "photo.png"])
def test_data_that_is_none_is_told_in_the_words_of_the_option(home: Path, name: str) -> None:
    (home / "photo.png").write_bytes(b"")
    with pytest.raises(DataError, match=f"--data .*{name}") as caught:
        training_cli.evaluate("tiny", data=home / name)
    assert "--set" not in caught.value.remedy


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_folder_is_no_archive(run: Run, home: Path, command: str) -> None:
    artifact = write_artifact(home / "artifacts")
    code, out, _ = run(command, artifact, "--json")
    assert code == 5 and "is a folder, not an archive" in _error(out)["error"]
    assert "marina pack" in _error(out)["remedy"]


def test_an_archive_that_cannot_be_recorded_is_one_object(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = home / "received"
    packed = archive.pack(write_artifact(home / "artifacts"), handlers=home / "handlers", destination=received)
    (received / "index.json").mkdir()
    report = verify.Report(packed.path, packed.sha256, ())
    monkeypatch.setattr(verify, "verify", lambda path, *, python: report)
    code, out, _ = run("verify", packed.path, "--publish", "--json")
    assert code == _error(out)["exit_code"] != 0


def test_down_has_a_result(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compose, "down", lambda *_, **__: None)
    code, out, _ = run("down", "--keep-data", "--json")
    assert code == 0 and json.loads(out) == {"down": str(home), "data_kept": True}


def test_a_variable_with_a_wrong_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^MARINA_DEVICE: "):
        settings.ServeSettings.load({}, {"MARINA_DEVICE": "foo"})
    with pytest.raises(ConfigError, match=r"^device: "):
        settings.ServeSettings.load({"device": "bar"}, {"MARINA_DEVICE": "foo"})


def test_a_service_that_is_none(tmp_path: Path) -> None:
    configured = {"gateway": {"image": "haproxy:3"}, "torchserve": {"image": "marina"}}
    engine = Engine(docker="/bin/false", compose=("/bin/false",), version="", compose_version="", runtimes=frozenset())
    with pytest.raises(ConfigError, match="no service 'nosuch'") as caught:
        images.provide(engine, configured, ["gateway", "nosuch"], tmp_path, lambda line: pytest.fail(line))
    assert "gateway, torchserve" in caught.value.remedy


def test_a_missing_plan_names_where_one_is_described(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file") as caught:
        plan.read(tmp_path / "deploy.toml")
    assert "README.md" in caught.value.remedy and "docstring" not in caught.value.remedy


def test_every_architecture_of_ours_is_listed() -> None:
    with pytest.raises(RecipeError) as caught:
        config.load_recipe("digits", ["model.architecture=nosuch"])
    assert "airbench" in caught.value.remedy and "alexnet" not in caught.value.remedy


def test_the_table_of_a_recipe_is_named_in_the_help(run: Run) -> None:
    _, out, _ = run("search", "--help")
    assert "[search]" in out
