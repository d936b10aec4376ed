"""One virtual environment per peer, below a cache folder; torch and its like come from the project's own environment."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.errors import NotAvailable

REQUIREMENTS = Path(__file__).parent / "peers" / "requirements"
_INSTALL_SECONDS = 900
_DEBIAN_PYTHON = Path("/usr/bin/python3")
_OLD_STUB = (3, 11, 2)


def python_of(cache: Path, name: str) -> Path:
    """The interpreter of a peer's environment, made when it is not there. Raises NotAvailable with the reason."""
    requirements = REQUIREMENTS / f"{name}.txt"
    folder = cache / "venvs" / name
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if not (stamp.is_file() and stamp.read_text() == wanted):
        _create(folder, _base_python(name), requirements)
        stamp.write_text(wanted)
    return python


def versions_of(cache: Path, name: str) -> dict[str, str]:
    """What is installed in a peer's own environment, by distribution."""
    folders = [str(path) for path in (cache / "venvs" / name / "lib").glob("python*/site-packages")]
    found = importlib.metadata.distributions(path=folders)
    return {distribution.name: distribution.version for distribution in found}


def ignore(cache: Path) -> None:
    """Keep the cache out of git wherever it lies."""
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")


def _base_python(name: str) -> Path:
    if name != "pytriton":
        return Path(sys.executable)
    # PyTriton brings a compiled stub that knows the inside of 3.11.2's locks, and crashes in another 3.11.
    said = ""
    if _DEBIAN_PYTHON.exists():
        answer = subprocess.run([_DEBIAN_PYTHON, "-V"], capture_output=True, text=True, timeout=30, check=False)
        said = answer.stdout.removeprefix("Python").strip()
    if said != ".".join(map(str, _OLD_STUB)):
        raise NotAvailable(
            f"its stub needs Python 3.11.2 as {_DEBIAN_PYTHON}, found {said or 'none'}", remedy="use Debian 12"
        )
    return _DEBIAN_PYTHON


def _create(folder: Path, base: Path, requirements: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    python = folder / "bin" / "python"
    _run([str(base), "-m", "venv", "--without-pip", str(folder)])
    (target,) = (folder / "lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    _run([*pip, "install", "--no-deps", "-r", str(requirements)])
    # Only now, so that pip counts nothing of it as installed; searched after the peer's own packages, which win.
    (target / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotAvailable(f"it cannot be installed: {error}", remedy="see the message") from error
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise NotAvailable(f"it cannot be installed: {last[0]}", remedy="see the message")
