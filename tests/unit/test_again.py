"""`.ci/again` may turn a red run green: only after few failures of single tests, and only when they pass the second time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

AGAIN = Path(__file__).resolve().parents[2] / ".ci" / "again"
STEADY = "def test_steady():\n    pass\n"
# Fails while there is no file of its name, and leaves one.
UNSTEADY = """
import pathlib, pytest
@pytest.mark.parametrize("number", range({}))
def test_unsteady(number):
    seen = pathlib.Path(f"seen{{number}}")
    was, _ = seen.exists(), seen.touch()
    assert was
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=folder, text=True, capture_output=True, check=False)


def twice(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """The tests once, then what `.ci/again` makes of it."""
    (folder / "test_it.py").write_text(tests)
    options = ["-p", "no:cacheprovider", "-o", "junit_family=xunit1", "--junitxml=first.xml"]
    assert run(folder, "-m", "pytest", *options).returncode != 0
    return run(folder, str(AGAIN), "first.xml")


@pytest.mark.parametrize("failing", [1, 3])
def test_few_tests_that_pass_the_second_time_are_named_and_let_through(failing: int, tmp_path: Path) -> None:
    ended = twice(tmp_path, UNSTEADY.format(failing) + STEADY)
    assert ended.returncode == 0
    assert "UNSTEADY" in ended.stdout and f"test_it.py::test_unsteady[{failing - 1}]" in ended.stdout


def test_a_fourth_failure_is_no_accident(tmp_path: Path) -> None:
    ended = twice(tmp_path, UNSTEADY.format(4))
    assert ended.returncode == 1 and "4 tests failed: not run again" in ended.stdout


def test_what_fails_twice_has_failed(tmp_path: Path) -> None:
    ended = twice(tmp_path, "def test_broken():\n    assert False\n" + STEADY)
    assert ended.returncode == 1 and "UNSTEADY" not in ended.stdout


def test_a_file_that_could_not_be_imported_is_no_failure_of_one_test(tmp_path: Path) -> None:
    once = "import pathlib\nseen = pathlib.Path('seen')\nwas, _ = seen.exists(), seen.touch()\nassert was\n"
    ended = twice(tmp_path, once + STEADY)
    assert ended.returncode == 1 and "is no failure of one test" in ended.stdout


def test_a_run_that_did_not_get_to_its_end_stays_red(tmp_path: Path) -> None:
    twice(tmp_path, UNSTEADY.format(1))
    ended = run(tmp_path, str(AGAIN), "first.xml", "second.xml")
    assert ended.returncode == 1 and "second.xml is missing" in ended.stdout


def test_no_failure_on_record_explains_no_red_run(tmp_path: Path) -> None:
    (tmp_path / "first.xml").write_text(
        "<testsuites><testsuite><testcase name='a' file='b.py'/></testsuite></testsuites>"
    )
    ended = run(tmp_path, str(AGAIN), "first.xml")
    assert ended.returncode == 1 and "0 tests failed" in ended.stdout
