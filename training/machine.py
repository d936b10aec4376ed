"""The device and the threads that training runs on, and how its results stay the same bits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from handlerlib import engines
from training.config import Train
from training.errors import RecipeError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def choose_device(train: Train) -> torch.device:
    """Raises RecipeError when the recipe insists on a GPU that is not there."""
    if train.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("train.device is cuda, but torch sees no GPU", remedy="--set train.device=auto")
    return torch.device("cuda" if train.device != "cpu" and torch.cuda.is_available() else "cpu")


def choose_threads(train: Train) -> int:
    """The recipe's, or those that this process may use: its share of them when torchrun started several here."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    return train.threads or max(1, len(os.sched_getaffinity(0)) // beside)


def slow_precision(train: Train, device: torch.device, capabilities: Mapping[str, object]) -> str | None:
    """What to tell when the recipe's precision is slower here than float32, given `torch.cpu.get_capabilities()`."""
    without = not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    if train.precision == "bf16" and device.type == "cpu" and capabilities.get("architecture") == "x86_64" and without:
        return "this CPU computes bf16 without instructions for it: --set train.precision=fp32 is faster here"
    return None


def check_compiler(device: torch.device) -> None:
    """Compile something small for the device. Raises RecipeError with the reason when torch.compile cannot work."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        wanted = "triton" if device.type == "cuda" else "a C++ compiler such as g++, and Python's header files"
        raise RecipeError(
            f"train.compile: torch.compile does not work here: {reason}",
            remedy=f"install {wanted}, or --set train.compile=false",
        ) from error


def keep_memory() -> None:
    """Let glibc keep what tensors have freed, until this process ends.

    By default it gives large blocks back at once (mallopt(3)), and the system clears each page again for the next
    tensor of the same size: on a CPU a sixth of the time of a training step.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28)):
            mallopt(option, value)


def moved(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device. A GPU fetches it from pinned memory, so that nothing waits for the work that it still has."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """float32 as workers and golden answers have it, see `engines.use_float32`; as before afterwards."""
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends  # torch's annotations know none of these
    conv, rnn, matmul = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
    before = [one.fp32_precision for one in (conv, rnn, matmul)]
    engines.use_float32(device)
    try:
        yield
    finally:
        backends.cudnn.allow_tf32 = before[0] == "tf32"
        conv.fp32_precision, rnn.fp32_precision, matmul.fp32_precision = before


@contextlib.contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Deterministic algorithms, float32 that is float32, a fixed number of threads and private random state; all as
    before afterwards.

    float32 is exact in training too, and not only where answers are judged: recipes that want a GPU's speed say bf16,
    which this leaves alone.
    """
    # Read when CUDA starts; without it cuBLAS may sum in another order each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Only the one that is used: torch's default would start every GPU of the machine.
    private = [torch.cuda.current_device()] if device.type == "cuda" else []
    threads_before = torch.get_num_threads()
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with exact(device), torch.random.fork_rng(private), warnings.catch_warnings():
            # Some GPU kernels have no deterministic form; we take what there is.
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic_before)
        torch.set_num_threads(threads_before)
