"""A folder with spec and weights -> a network on its device, proved against its golden samples and warmed up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from handlerlib import architectures, imaging
from handlerlib.errors import MarinaError, SpecError
from handlerlib.spec import SPEC_FILE, WEIGHTS_FILE, ModelSpec, Preprocess

logger = logging.getLogger(__name__)

WARM_UP_SECONDS = 20.0
"""Budget of the warm-up; the sizes that did not fit into it are named in the log."""


class SelfTestFailed(MarinaError):
    """The model in this process does not give the answers that it gave when it was exported."""

    exit_code = 5


class Engine(Protocol):
    """What runs the network on one kind of hardware. Normalisation belongs to it, so that it can be fused."""

    def __call__(self, x_BCHW: Tensor, threads: int) -> Tensor:
        """uint8 `[B, C, height, width]` as decoded -> softmax over classes, float32 `[B, classes]` on the CPU.

        `threads` is the number of CPU threads that it may use for this batch, at least 1.
        """


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to answer, with its spec and the device it lives on."""

    spec: ModelSpec
    engine: Engine
    device: torch.device

    def probabilities(self, x_BCHW: Tensor, threads: int = 0) -> Tensor:
        """uint8 `[B, C, height, width]` -> probabilities, float32 `[B, classes]` on the CPU; 0 threads: as they are."""
        return self.engine(x_BCHW, threads or torch.get_num_threads())


@dataclass(frozen=True, slots=True)
class PlainEngine:
    """torch in eager mode, float32: the reference that every other engine is measured against."""

    network: nn.Module
    preprocess: Preprocess
    device: torch.device

    @torch.inference_mode()
    def __call__(self, x_BCHW: Tensor, threads: int) -> Tensor:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        logits: Tensor = self.network(imaging.normalise(x_BCHW.to(self.device), self.preprocess))
        return logits.float().softmax(dim=1).cpu()


def load(folder: Path, device: torch.device) -> LoadedModel:
    """Read spec and weights (safetensors only) from `folder`.

    Raises SpecError when the spec is wrong or the weights do not belong to its architecture.
    """
    spec = ModelSpec.load(folder)
    weights = _read_weights(folder / WEIGHTS_FILE)
    network = _assemble(spec, weights)
    plain = PlainEngine(network.eval().requires_grad_(False).to(device), spec.preprocess, device)
    return LoadedModel(spec, plain, device)


def self_test(model: LoadedModel, answer: Callable[[bytes], Tensor], folder: Path) -> float:
    """Run every golden sample through `answer` (encoded bytes -> probabilities `[classes]`).

    Returns the largest difference seen. Raises SelfTestFailed naming the sample, what was expected and what came.
    """
    worst = 0.0
    for sample in model.spec.golden.samples:
        got = answer(_read_golden(folder / sample.file, sample.file))
        expected = torch.tensor(sample.probabilities)
        difference = (got - expected).abs()
        index = int(difference.argmax())
        # Written so that a NaN fails too.
        if not float(difference.max()) <= model.spec.golden.tolerance:
            label = model.spec.labels[index]
            raise SelfTestFailed(
                f"golden sample {sample.file}: probability of '{label}' expected {float(expected[index]):.6f}, "
                f"got {float(got[index]):.6f}, tolerance {model.spec.golden.tolerance:g}",
                remedy="serve with the torch version and device that the archive was built for, or export and pack again",
            )
        worst = max(worst, float(difference.max()))
    return worst


def warm_up(model: LoadedModel, sizes: Iterable[int], budget: float = WARM_UP_SECONDS) -> tuple[int, ...]:
    """One forward pass of an empty batch per size, in the given order, until `budget` seconds are spent.

    Kernels and buffers are chosen per shape, so the first request of a size would otherwise pay for it. Returns the
    sizes that were run.
    """
    shape = model.spec.architecture
    deadline = time.monotonic() + budget
    done: list[int] = []
    pending = list(sizes)
    for size in pending:
        if time.monotonic() > deadline:
            logger.warning("warm-up stopped after %.0f s, batch sizes not run: %s", budget, pending[len(done) :])
            break
        model.probabilities(torch.zeros(size, shape.channels, shape.height, shape.width, dtype=torch.uint8))
        done.append(size)
    return tuple(done)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise SpecError(f"{path.name} cannot be read: {error}", remedy="export and pack the model again") from error


def _assemble(spec: ModelSpec, weights: dict[str, Tensor]) -> nn.Module:
    # On the meta device building costs no memory and no random numbers: the weights are assigned, not copied.
    with torch.device("meta"):
        network = architectures.build(spec.architecture)
    try:
        network.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise SpecError(
            f"{WEIGHTS_FILE} does not fit architecture '{spec.architecture.name}' of {SPEC_FILE}: {error}",
            remedy="spec and weights must come from the same export",
        ) from error
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        # Buffers that are no part of the state dict exist only after a real construction.
        network = architectures.build(spec.architecture)
        network.load_state_dict(weights, strict=True)
    return network


def _read_golden(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(f"golden sample {name} cannot be read: {error}", remedy="pack the model again") from error
