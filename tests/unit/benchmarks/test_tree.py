"""No process of a measured server outlives its measurement, whatever it did to get away."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.tree import Tree

pytestmark = pytest.mark.unit

ESCAPE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
os.wait()
print("escaped", flush=True)
time.sleep(600)
"""
WORK = """
import os, time
if os.fork() == 0:
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    os._exit(0)
os.wait()
held = bytearray(64 << 20)
print("worked", flush=True)
time.sleep(600)
"""


def start(tmp_path, code, *, seconds=60.0):
    return Tree(
        [sys.executable, "-c", code],
        environment=dict(os.environ),
        folder=tmp_path,
        log=tmp_path / "log",
        seconds=seconds,
    )


def wait_for(condition, what, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def alive(pids):
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_orphans_in_a_session_of_their_own_that_ignore_sigterm_end_with_the_tree(tmp_path, monkeypatch):
    with start(tmp_path, ESCAPE) as tree:
        wait_for(lambda: "escaped" in tree.log_tail(), "the program did not start")
        pids = [process.pid for process in tree.processes()]
        assert len(pids) == 2
    assert tree.ended()
    assert not alive(pids)


def test_a_tree_ends_when_its_time_is_over(tmp_path):
    tree = start(tmp_path, "import time; time.sleep(600)", seconds=1.0)
    wait_for(tree.ended, "it outlived its time")


def test_a_tree_ends_when_its_owner_is_killed(tmp_path):
    owner = f"""
import os, sys, time
from pathlib import Path
from benchmarks.tree import Tree
folder = Path({str(tmp_path)!r})
tree = Tree([sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)"],
            environment=dict(os.environ), folder=folder, log=folder / "log", seconds=60)
while "up" not in tree.log_tail():
    time.sleep(0.01)
print(*[process.pid for process in tree.processes()], tree.pid, flush=True)
time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    with process.stdout:
        pids = [int(pid) for pid in process.stdout.readline().split()]
    assert alive(pids) == pids
    process.kill()
    process.wait()
    wait_for(lambda: not alive(pids), "the tree outlived its owner")


def test_time_and_memory_of_the_whole_tree_are_counted(tmp_path):
    with start(tmp_path, WORK) as tree:
        wait_for(lambda: "worked" in tree.log_tail(), "the program did not start")
        usage = tree.usage()
    assert usage.processes == 1
    # The child that did the work has ended, and its time counts all the same.
    assert usage.cpu_seconds >= 0.3
    assert usage.pss_mib >= 64


def test_a_command_that_ends_is_seen(tmp_path):
    with start(tmp_path, "print('last words')") as tree:
        wait_for(tree.ended, "it did not end")
        assert tree.log_tail() == "last words"
        assert tree.processes() == []
