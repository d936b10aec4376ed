"""Which processes the watchdog takes for a worker of its server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from marina.watchdog import is_starting


def test_a_worker_of_another_server_with_the_same_number_is_not_ours(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    command = [sys.executable, "-c", "print(flush=True); input()", "--sock-name", str(other / ".ts.sock.9000")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert is_starting(other, "9000")
        assert not is_starting(ours, "9000")
        assert not is_starting(other, "900")
        process.kill()
