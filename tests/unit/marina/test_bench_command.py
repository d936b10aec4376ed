"""`marina bench` as a user runs it, against a small server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from handlerlib.errors import MarinaError
from marina import archive
from marina.bench_cli import _loops
from marina.cli import app
from marina.loadgen import Closed, Open
from support import images
from support.artifacts import write_artifact
from support.commands import ROOT, Ran, marina, project
from support.odd_server import OddServer, odd_server, refusing_port


@pytest.fixture(scope="module")
def server() -> Iterator[OddServer]:
    with odd_server() as found:
        yield found


def bench(home: Path, *arguments: str | Path) -> Ran:
    return marina(home, "bench", *arguments, "--duration", "0.4", "--warm-up", "0")


def test_several_scenarios_as_one_object(server: OddServer, tmp_path: Path) -> None:
    written = tmp_path / "bench.json"
    ran = bench(
        tmp_path, server.url("/ok"), "-c", "1,4", "--expect", "right", "--json", "--output", written, "--pid", "1"
    )
    assert ran.code == 0, ran.err
    first, second = ran.json["scenarios"]
    assert (first["loop"]["connections"], second["loop"]["connections"]) == (1, 4)
    assert first["failed"] == 0 and first["good"] > 0 and first["throughput"]["value"] > 0
    assert json.loads(written.read_text()) == ran.json


def test_an_open_loop_with_files_as_a_table(server: OddServer, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for index, name in enumerate(["a.png", "more/b.png", ".hidden"]):
        (photos / name).write_bytes(images.photo(index))
    server.bodies.clear()
    ran = bench(tmp_path, server.url("/ok"), "--rate", "40", "--arrivals", "poisson", "--body", photos)
    assert ran.code == 0, ran.err
    assert "40/s poisson" in ran.out and "2 files" in ran.out
    assert set(server.bodies) == {images.photo(0), images.photo(1)}


@pytest.mark.parametrize(
    ("connections", "rate", "found"),
    [
        (None, None, [Closed(connections=8)]),
        ("1,8", None, [Closed(connections=1), Closed(connections=8)]),
        (None, "50", [Open(rate=50)]),
        ("8", "50,100", [Open(rate=50, connections=8), Open(rate=100, connections=8)]),
    ],
)
def test_connections_mean_what_was_asked_for(
    connections: str | None, rate: str | None, found: list[Closed | Open]
) -> None:
    assert _loops(connections, rate, "constant") == found


def test_wrong_answers_end_with_an_error_after_the_table(server: OddServer, tmp_path: Path) -> None:
    ran = bench(tmp_path, server.url("/ok"), "--expect", "left", "--rate", "50")
    assert ran.code == 7
    assert "wrong answer" in ran.out and "fix: " in ran.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["http://127.0.0.1:PORT/"], 7, "nothing listens"),
        (["SERVER/status/404"], 7, "status 404"),
        (["SERVER/status/401"], 7, "--key-file"),
        (["SERVER/nonsense"], 7, "no answer"),
        (["no such thing"], 3, "neither a URL nor a model"),
        (["SERVER/ok", "--body", "missing.jpg"], 3, "missing.jpg"),
        (["SERVER/ok", "-c", "0"], 2, "above 0"),
        (["SERVER/ok", "--rate", "fast"], 2, "not a number"),
        (["SERVER/ok", "--rate", "50", "-c", "4,8"], 2, "one number only beside --rate"),
        (["SERVER/ok", "--header", "nonsense"], 2, "Name: value"),
        (["SERVER/ok", "--check", "no.such:thing"], 3, "ModuleNotFoundError"),
        (["SERVER/predictions/nobody"], 3, "--body"),
    ],
)
def test_bad_input_is_one_clear_error(
    server: OddServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.setenv("MARINA_HOME", str(project(tmp_path / "home")))
    found = [text.replace("SERVER", server.url("")).replace("PORT", str(refusing_port())) for text in arguments]
    ran = CliRunner().invoke(app, ["bench", *found, "--duration", "0.4", "--warm-up", "0"])
    error = ran.exception
    assert (error.exit_code if isinstance(error, MarinaError) else ran.exit_code) == code, ran.output
    assert words in (f"{error} {error.remedy}" if isinstance(error, MarinaError) else ran.output)


def test_the_golden_samples_of_a_served_model_are_sent_and_checked(server: OddServer, tmp_path: Path) -> None:
    """The URL of a model, and its archive in the store: this server's answers are not the model's, and that is seen."""
    home = project(tmp_path / "home")
    packed = archive.pack(write_artifact(tmp_path), handlers=ROOT / "handlers", destination=home / "model_store")
    (home / "model_store" / "index.json").write_text(
        json.dumps(
            {
                "schema": 1,
                "archives": {
                    packed.path.name: {
                        "name": packed.name,
                        "version": packed.version,
                        "sha256": packed.sha256,
                        "bytes": packed.size,
                    }
                },
            }
        )
    )
    server.bodies.clear()
    ran = bench(home, server.url("/predictions/tiny"), "--rate", "50", "--json")
    assert ran.code == 7
    (scenario,) = ran.json["scenarios"]
    assert scenario["errors"] == {"wrong answer": scenario["planned"]}
    assert set(server.bodies) == {images.photo(index) for index in range(3)}
