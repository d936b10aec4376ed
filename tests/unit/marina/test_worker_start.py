"""What starts beside workers that answer stays behind them: imports of a new worker, and the check of an archive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from marina import replay, worker_start

NICE = os.getpriority(os.PRIO_PROCESS, 0)
"""Of the tests themselves: what starts here begins with it."""
OWN = "os.getpriority(os.PRIO_PROCESS, threading.get_native_id())"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An unpacked archive whose handler notes the priority that it is imported with."""
    (tmp_path / "MAR-INF").mkdir()
    (tmp_path / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": {"handler": "own_handler.py"}}))
    (tmp_path / "handlerlib").mkdir()
    (tmp_path / "own_handler.py").write_text(f"import os, threading\nnice = {OWN}\n")
    return tmp_path


def _run(code: str, *arguments: Path) -> list[str]:
    """The words that a process of its own, in a session of its own, prints."""
    lines = f"import os, sys, threading\nsys.path[:0] = [*sys.argv[1:], {str(Path(replay.__file__).parent)!r}]\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", lines, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=True,
        start_new_session=True,
    )  # fmt: skip
    return done.stdout.split()


IMPORT = "import worker_start\nworker_start.import_gently([*worker_start.handlers(sys.path)])\n"


def test_a_worker_imports_at_low_priority_and_answers_at_its_own(archive: Path, tmp_path: Path) -> None:
    code = f"print('own_handler' in sys.modules)\nimport own_handler\nprint(own_handler.nice, {OWN})"
    low = min(19, NICE + worker_start.NICE)
    assert _run(IMPORT + code, archive, tmp_path / "nothing") == ["True", str(low), str(NICE)]


LOAD = f"""
import worker_start
started, stop = threading.Event(), threading.Event()

def load(fails):
    def others():
        print({OWN})
        started.set()
        stop.wait(30)
        print({OWN})

    print({OWN})
    threading.Thread(target=others).start()
    started.wait(30)
    if fails:
        raise ValueError

try:
    worker_start.gently(load)(FAILS)
except ValueError:
    pass
print({OWN})
stop.set()
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_loaded_at_low_priority_and_answers_at_its_own(fails: bool) -> None:
    """Threads that it starts too."""
    low = min(19, NICE + worker_start.NICE) if _may_raise() else NICE
    assert _run(LOAD.replace("FAILS", str(fails))) == [str(low), str(low), str(NICE), str(NICE)]


def test_a_load_that_takes_long_gets_its_share(tmp_path: Path) -> None:
    code = (
        "import time, worker_start\n"
        "worker_start.GENTLE_SECONDS = 0.01\n"
        "def load():\n"
        "    end = time.monotonic() + 30\n"
        f"    while {OWN} != {NICE} and time.monotonic() < end: time.sleep(0.01)\n"
        f"    print({OWN})\n"
        "worker_start.gently(load)()"
    )
    assert _run(code) == [str(NICE)]


def _may_raise() -> bool:
    code = f"os.setpriority(os.PRIO_PROCESS, 0, {NICE + 1})\ntry: os.setpriority(os.PRIO_PROCESS, 0, {NICE})\n"
    return _run(code + "except OSError: print('no')") == []


def test_whoever_cannot_raise_a_priority_again_does_not_lower_it() -> None:
    """As an ordinary user without the limit for it."""
    code = (
        "import resource, worker_start\n"
        "resource.setrlimit(resource.RLIMIT_NICE, (0, 0))\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        f"worker_start.gently(lambda: print({OWN}))()"
    )
    assert _run(code) == [str(NICE)]


def test_a_handler_that_is_not_ours_is_left_to_torchserve(archive: Path) -> None:
    """It may set at import what holds for one thread only."""
    (archive / "handlerlib").rmdir()
    assert _run(IMPORT + "print('own_handler' in sys.modules)", archive) == ["False"]


def test_what_cannot_be_imported_says_so_to_the_worker(archive: Path) -> None:
    (archive / "own_handler.py").write_text("import no_such_module\n")
    code = "try: import own_handler\nexcept ImportError as error: print(error.name)"
    assert _run(IMPORT + code, archive) == ["no_such_module"]


def test_the_check_of_an_archive_gives_way_to_what_serves() -> None:
    code = (
        "import replay; replay.give_way()\n"
        "print(os.getpriority(os.PRIO_PROCESS, 0))\n"
        "try: print(open('/proc/self/autogroup').read().split()[-1])\n"
        "except OSError: pass\n"
    )
    own, *session = _run(code)
    assert int(own) == min(19, NICE + replay.NICE)
    assert session in ([], [str(replay.NICE)])
