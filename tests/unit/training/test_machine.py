"""How memory that tensors free is kept for the next ones."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource, torch
from training.machine import keep_memory

def pages_cleared():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10_000_000)  # 40 MB: beyond what glibc keeps by itself after a while
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = pages_cleared()
keep_memory()
pages_cleared()
print(given_back, pages_cleared())
"""


def test_memory_that_was_freed_is_not_cleared_again_for_the_next_tensor() -> None:
    given_back, kept = map(int, subprocess.check_output([sys.executable, "-c", PROGRAM], text=True).split())
    assert given_back > 20 * 40_000_000 / 2**21  # a fault for each block of 2 MiB at least
    assert kept < 0.1 * given_back
