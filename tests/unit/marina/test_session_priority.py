"""A session's share of the cores, as an ordinary user sets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, subprocess, sys
sys.path.insert(0, sys.argv[1])
from marina import processes

if os.geteuid() == 0:
    os.setgroups([])
    os.setuid(65534)
sleepers = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(3)]
try:
    for nice in (6, 0):
        for sleeper in sleepers:
            processes.set_priority(sleeper.pid, nice)
        print(*(open(f"/proc/{sleeper.pid}/autogroup").read().split()[-1] for sleeper in sleepers))
finally:
    for sleeper in sleepers:
        sleeper.kill()
        sleeper.wait()
"""


def test_several_are_set_one_after_the_other_though_the_kernel_lets_users_write_seldom() -> None:
    if not Path("/proc/self/autogroup").exists():
        pytest.skip("this kernel does not share cores out by session")
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split("\n")[:2] == ["6 6 6", "0 0 0"], done.stderr
