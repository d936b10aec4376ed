"""What a worker takes, and for how many more there is room."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from marina import autoscale_memory
from marina.autoscale_memory import Cost, Free, Gpu

MIB = 1 << 20


def test_the_scarcer_one_decides() -> None:
    cost = Cost(host=100 * MIB, gpu=1000 * MIB)
    assert Free(host=250 * MIB).room(Cost(host=100 * MIB)) == 2
    assert Free(host=250 * MIB).room(Cost(host=100 * MIB), loading=Cost(host=60 * MIB)) == 1
    assert Free(host=250 * MIB, budget=150 * MIB).room(Cost(host=100 * MIB)) == 1
    assert Free(host=250 * MIB, budget=-50 * MIB).room(Cost(host=100 * MIB)) == 0
    two = (Gpu(free=1500 * MIB, total=8000 * MIB), Gpu(free=7000 * MIB, total=8000 * MIB))
    assert Free(host=2500 * MIB, gpus=two).room(cost) == 2, "they are dealt out in turn: one to each"
    assert Free(host=2500 * MIB, gpus=two).room(cost, loading=Cost(host=0, gpu=500 * MIB)) == 2
    assert Free(host=2500 * MIB, gpus=two).room(cost, loading=Cost(host=0, gpu=501 * MIB)) == 0, "they may load on it"
    assert Free(host=2500 * MIB, gpus=two).room(cost, loading=Cost(host=0, gpu=9000 * MIB)) == 0
    assert Free(host=2500 * MIB, gpus=(Gpu(free=900 * MIB, total=8000 * MIB),)).room(cost) == 0


def test_a_real_process_costs_what_it_holds_and_what_it_once_held() -> None:
    """It holds 50 MiB and has held 150."""
    code = (
        "import sys; a = b'x' * (50 << 20); b = b'y' * (100 << 20); del b; print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        found = autoscale_memory.cost([child.pid])
        held = psutil.Process(child.pid).memory_full_info().uss
        child.kill()
    assert found is not None and found.gpu == 0
    assert held >= 50 * MIB and 145 * MIB < found.host < 220 * MIB
    assert autoscale_memory.cost([child.pid]) is None, "it is no more"


def test_a_budget_is_less_what_the_workers_take() -> None:
    free = autoscale_memory.free(budget=10_000 * MIB, workers=[os.getpid()])
    assert free.budget is not None and 0 < free.budget < 10_000 * MIB
    assert 0 < free.host < psutil.virtual_memory().total


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 1\ninactive_file 200\n"},
        {
            "memory/memory.limit_in_bytes": "1000",
            "memory/memory.usage_in_bytes": "700",
            "memory/memory.stat": "total_inactive_file 200\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_a_control_groups_limit_counts(tmp_path: Path, files: dict[str, str]) -> None:
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert autoscale_memory._limits(tmp_path) == [(1000, 500)]
    assert autoscale_memory._host_free(tmp_path) == 450, "less the reserve of 5 %"


def test_no_limit_is_none(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert autoscale_memory._limits(tmp_path) == []


def test_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name with the answers of a machine that has two GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\ncase $1 in\n*gpu=*) echo '1000, 8000'; echo '7000, 8000';;\n*apps=*) echo '4711, 900';;\nesac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert autoscale_memory.gpus() == [
        Gpu(free=1000 * MIB, total=8000 * MIB),
        Gpu(free=7000 * MIB, total=8000 * MIB),
    ]
    assert autoscale_memory.free(on_gpu=True).gpus[0].free == 600 * MIB, "less the reserve of 5 %"
    assert autoscale_memory._gpu_bytes([4711], 2) == 900 * MIB
    assert autoscale_memory._gpu_bytes([1], 2) == 4000 * MIB, "who takes what is not known: a share of all"
    for visible, free in (("1", [7000]), ("1, 0", [1000, 7000]), ("", [1000, 7000]), ("10", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [gpu.free // MIB for gpu in autoscale_memory.gpus()] == free, "nvidia-smi lists all of them all the same"
