"""What torch itself offers beyond eager mode: compiled at the start of a process, or compiled now and packed."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handlerlib import engines, tasks
from handlerlib.engine_spec import ENGINE_FOLDER, Precision
from handlerlib.spec import ModelSpec

PACKAGE_FILE = f"{ENGINE_FOLDER}/model.pt2"

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST_BATCH = 4096


class FromPixels(nn.Module):
    """uint8 `[B, H, W, C]` -> what the model answers, float32 `[B, outputs]`: what a packed graph holds."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        # Not channels_last: freezing chooses the layout itself, and with torch 2.14 it gave wrong answers on weights
        # that had been laid out so before (found by the golden gate on a network with one input channel).
        self.network = network.to(dtype)
        self.dtype = dtype
        self.finish = tasks.finish(spec)
        self.register_buffer("mean", torch.tensor(spec.preprocess.mean).view(1, -1, 1, 1) * 255.0)
        self.register_buffer("std", torch.tensor(spec.preprocess.std).view(1, -1, 1, 1) * 255.0)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BCHW = x_BHWC.permute(0, 3, 1, 2).float().sub(self.mean).div(self.std)
        return self.finish(self.network(x_BCHW.to(self.dtype)).float())


class CompiledEngine:
    """`torch.compile`, as a process would get it: it compiles at its first batches, which is why it is never packed."""

    def __init__(self, network: nn.Module, spec: ModelSpec, precision: Precision, device: torch.device) -> None:
        config: Any = importlib.import_module("torch._inductor.config")
        config.freezing = True
        module = FromPixels(network, spec, _DTYPES[precision])
        self._run = torch.compile(module.eval().requires_grad_(False).to(device), dynamic=True)
        self._device = device

    # Freezing looks for no_grad; tensors made in inference mode would be compiled for apart.
    @torch.no_grad()
    def __call__(self, x_BCHW: Tensor, threads: int) -> Tensor:
        engines.use_threads(threads)
        answers: Tensor = self._run(engines.pixels_last(x_BCHW.to(self._device))).cpu()
        return answers


def package(network: nn.Module, spec: ModelSpec, precision: Precision, device: torch.device, folder: Path) -> str:
    """Compile with AOTInductor into `folder/engine/model.pt2`; needs a C++ compiler. Returns the name below `folder`."""
    inductor = importlib.import_module("torch._inductor")
    shape = spec.architecture
    module = FromPixels(network, spec, _DTYPES[precision]).eval().requires_grad_(False).to(device)
    x_BHWC = torch.zeros(2, shape.height, shape.width, shape.channels, dtype=torch.uint8, device=device)
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    target = folder / PACKAGE_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, (x_BHWC,), dynamic_shapes=({0: batch},), strict=False)
        inductor.aoti_compile_and_package(
            exported,
            package_path=str(target),
            # One package for a lone thread and for all cores.
            inductor_configs={"freezing": True, "cpp.dynamic_threads": True},
        )
    return PACKAGE_FILE
