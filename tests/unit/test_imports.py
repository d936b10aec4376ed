"""Imports point one way: handlerlib <- training, handlerlib.{spec, errors} <- marina, and operations never load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("handlerlib", "training", "marina", "support", "tests")
MARINA_COMMANDS_THAT_TRAIN = {
    f"{name}.py" for name in ("training_cli", "demo", "compress_cli", "optimize_cli", "compare_cli", "search_cli")
}


def imported(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own(path: Path) -> set[str]:
    return {name for name in imported(path) if name.partition(".")[0] in FOLDERS}


@pytest.mark.parametrize("path", sorted((ROOT / "handlers").rglob("*.py")), ids=lambda path: path.name)
def test_handlers_know_only_their_library(path: Path) -> None:
    assert {name.partition(".")[0] for name in own(path)} <= {"handlerlib"}


@pytest.mark.parametrize("path", sorted((ROOT / "training").glob("*.py")), ids=lambda path: path.name)
def test_training_knows_no_operations(path: Path) -> None:
    assert {name.partition(".")[0] for name in own(path)} <= {"handlerlib", "training"}


@pytest.mark.parametrize("path", sorted((ROOT / "marina").glob("*.py")), ids=lambda path: path.name)
def test_operations_know_the_format_and_not_the_code(path: Path) -> None:
    names = own(path)
    assert {name for name in names if name.startswith("handlerlib.")} <= {
        name for name in names if name.startswith(("handlerlib.spec", "handlerlib.engine_spec", "handlerlib.errors"))
    }
    if path.name not in MARINA_COMMANDS_THAT_TRAIN:
        assert not any(name.startswith("training") for name in names)
    assert "torch" not in {name.partition(".")[0] for name in imported(path)}


def test_the_command_line_starts_without_torch() -> None:
    heavy = {"torch", "torchvision", "numpy", "training"}
    code = f"import sys, marina.cli; sys.exit(', '.join({heavy} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_spec_and_errors_need_the_standard_library_alone() -> None:
    code = (
        "import sys; sys.path.insert(0, 'handlers'); import handlerlib.spec, handlerlib.engine_spec, handlerlib.errors"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
