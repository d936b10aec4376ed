"""The command line as users run it: a process, a project folder of its own, exit code and output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Ran:
    """One command's outcome."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object of --json, on a stdout that holds nothing else."""
        return json.loads(self.out)


def project(folder: Path) -> Path:
    """A project folder with this checkout's handlers and configuration, and nothing trained or packed."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "handlers", folder / "handlers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "config.properties", folder / "config.properties")
    return folder


def environment(home: Path, **extra: str) -> dict[str, str]:
    """What the command inherits: MARINA_HOME, and this checkout's packages."""
    return {**os.environ, "MARINA_HOME": str(home), "PYTHONPATH": f"{ROOT / 'handlers'}:{ROOT}", **extra}


def marina(home: Path, *arguments: str | Path, timeout: float = 240, **extra: str) -> Ran:
    """Run `marina ARGUMENTS` to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "marina", *map(str, arguments)],
        env=environment(home, **extra),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Fails after four minutes, or with the words of `process` once it has ended."""
    deadline = time.monotonic() + 240
    while not ready():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise AssertionError(process.communicate()[1] if process is not None and process.poll() is not None else "")
        time.sleep(0.05)
