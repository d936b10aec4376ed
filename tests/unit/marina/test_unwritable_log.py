"""A log that cannot be written: java goes on, and what happens to it is still noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from marina.server import Server
from marina.settings import ServeSettings
from support.torchserve import eventually

FULL = Path("/dev/full")
NO_TEXT = '{"time":"t","level":"INFO","logger":"l","message":5}'


def launched(folder: Path, log_file: Path) -> Server:
    """A shell in java's place that speaks, waits for the file `go`, speaks again and ends with status 7."""
    server = Server((), ServeSettings(log_file=log_file))
    server.folder = folder
    server._open_log(log_file)
    program = f"echo first; echo '{NO_TEXT}'; until [ -e go ]; do sleep 0.02; done; echo second; exit 7"
    server._launch(["/bin/sh", "-c", program], os.environ)
    return server


@pytest.mark.parametrize(
    ("log_file", "told"),
    [
        pytest.param(
            FULL, 1, id="full", marks=pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
        ),
        pytest.param(Path("log"), 0, id="a line that is not understood"),
    ],
)
def test_java_is_read_to_its_end_whatever_becomes_of_its_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], log_file: Path, told: int
) -> None:
    server = launched(tmp_path, tmp_path / log_file)
    try:
        eventually(lambda: "first" in server.log_tail(), "the first line is read")
        (tmp_path / "go").touch()
        assert server._next_event(20) == "ended"
        assert "second" in server.log_tail()
        assert server._process is not None and server._process.poll() == 7, "nobody has ended it"
    finally:
        server.stop(drain=False)
    assert capsys.readouterr().err.count("the log cannot be written: [Errno 28]") == told
