"""How memory that tensors free is kept for the next ones, and what float32 is on a GPU."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from training.machine import exact, moved, reproducible

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


def float32() -> list[Any]:
    """torch's settings of float32 on a GPU, which are there without one too."""
    backends: Any = torch.backends
    parts = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
    return [backends.cudnn.allow_tf32, *(one.fp32_precision for one in parts)]


def test_float32_on_a_gpu_is_exact_inside_and_as_it_was_outside() -> None:
    before, device = float32(), torch.device("cuda")
    with exact(device):
        inside = float32()
        assert (inside[0], inside[1], inside[3]) == (False, "ieee", "ieee")
        with pytest.raises(RuntimeError, match="stopped"), exact(device):
            raise RuntimeError("stopped")
        assert float32() == inside
    assert float32() == before
    with exact(torch.device("cpu")):
        assert float32() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_what_is_reproducible_on_a_gpu_is_as_exact_as_a_worker() -> None:
    before = float32()
    with reproducible(1):
        assert float32()[1] == "ieee"
    assert float32() == before


def test_a_batch_is_moved_only_when_it_lies_elsewhere() -> None:
    x = torch.arange(3)
    assert moved(x, torch.device("cpu")) is x
    assert moved(x, torch.device("meta")).is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_batch_arrives_on_a_gpu_whatever_becomes_of_where_it_was() -> None:
    rows = torch.arange(1_000_000).view(1000, 1000)
    arrived = []
    for start in range(1000):
        arrived.append(moved(rows[start : start + 1].clone(), torch.device("cuda")))
    assert torch.equal(torch.cat(arrived).cpu(), rows)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two GPUs")
def test_random_state_is_private_without_a_word_about_other_gpus(recwarn: pytest.WarningsRecorder) -> None:
    with reproducible(1):
        torch.rand(1, device="cuda")
    assert not [one for one in recwarn if "available devices" in str(one.message)]
