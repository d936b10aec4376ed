"""What runs a network: eager float32 torch, which every artifact can fall back to, and the faster forms of `engine.json`.

An engine takes uint8 pixels and gives what the model answers, so that normalisation and the task's last step can be part
of its graph. Other runtimes than torch are imported when an artifact brings a form for them, and only then.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from handlerlib import cores
from handlerlib.engine_spec import EngineFile, Kind, Precision, TorchOptions
from handlerlib.errors import SpecError
from handlerlib.spec import ModelSpec, Preprocess
from handlerlib.tasks import Finish, finish, softmax

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Form(Protocol):
    """The part of `engine.json` that says how to open it."""

    @property
    def engine(self) -> Kind: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def options(self) -> TorchOptions: ...
    @property
    def files(self) -> tuple[EngineFile, ...]: ...


class Engine(Protocol):
    """What runs the network on one kind of hardware. Normalisation belongs to it, so that it can be fused."""

    def __call__(self, x_BCHW: Tensor, threads: int) -> Tensor:
        """uint8 `[B, C, height, width]` as decoded -> softmax over classes, float32 `[B, classes]` on the CPU; of another
        task what `handlerlib.tasks` makes of the logits.

        The pixels may lie in memory channel by channel or with each pixel's channels side by side. `threads` is the
        number of CPU threads that it may use for this batch, at least 1. One call at a time.
        """


@dataclass(frozen=True, slots=True)
class PlainEngine:
    """torch in eager mode, float32: the reference that every other engine is measured against."""

    network: nn.Module
    preprocess: Preprocess
    device: torch.device
    finish: Finish = softmax

    @torch.inference_mode()
    def __call__(self, x_BCHW: Tensor, threads: int) -> Tensor:
        from handlerlib import imaging  # a worker for texts has no need of Pillow and torchvision

        use_threads(threads)
        # Bytes go to a GPU, a quarter of what floats would be, and the kernels after them are queued while they are on
        # their way. Not pinned first: CUDA has read ordinary memory when it returns, so that would be one copy more.
        logits: Tensor = self.network(imaging.normalise(x_BCHW.to(self.device, non_blocking=True), self.preprocess))
        return self.finish(logits.float()).cpu()


@dataclass(frozen=True, slots=True)
class TextEngine:
    """The same for a network that takes the numbers of terms: int32 `[B, terms]`, filled up with 0."""

    network: nn.Module
    device: torch.device
    small: bool = False
    """So little is to be done that waking another thread takes longer."""
    finish: Finish = softmax

    @torch.inference_mode()
    def __call__(self, x_BCHW: Tensor, threads: int) -> Tensor:
        use_threads(1 if self.small else threads)
        logits: Tensor = self.network(x_BCHW.to(self.device, non_blocking=True))
        return self.finish(logits.float()).cpu()


def plain_engine(network: nn.Module, spec: ModelSpec, device: torch.device) -> Engine:
    """The reference for the spec's kind of input; `network` is on `device`."""
    if spec.text is None:
        if device.type == "cuda":
            # As batches are: cuDNN would otherwise rearrange the weights for every one of them.
            network = network.to(memory_format=torch.channels_last)
        return PlainEngine(network, spec.preprocess, device, finish(spec))
    return TextEngine(network, device, small=spec.architecture.name == "embedding_bag", finish=finish(spec))


class TorchEngine:
    """torch in eager mode with another memory layout, folded batch normalisation or a lower precision."""

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess,
        device: torch.device,
        *,
        precision: Precision,
        options: TorchOptions,
        finish: Finish = softmax,
    ) -> None:
        if precision not in _DTYPES:
            raise SpecError(f"torch's eager mode has no precision {precision}", remedy="optimise the artifact again")
        if options.fold:
            network = folded(network)
        network = network.eval().requires_grad_(False)
        self._dtype = _DTYPES[precision]
        self._autocast = options.autocast
        self._format = torch.channels_last if options.channels_last else torch.contiguous_format
        weights = torch.float32 if options.autocast else self._dtype
        # torch's annotations know no call with all three.
        self._network = network.to(device=device, dtype=weights).to(memory_format=self._format)
        self._preprocess, self._device, self._finish = preprocess, device, finish

    @torch.inference_mode()
    def __call__(self, x_BCHW: Tensor, threads: int) -> Tensor:
        from handlerlib import imaging  # as above

        use_threads(threads)
        x_BCHW = imaging.normalise(x_BCHW.to(self._device, non_blocking=True), self._preprocess)
        x_BCHW = x_BCHW.contiguous(memory_format=self._format)
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._autocast):
            logits: Tensor = self._network(x_BCHW if self._autocast else x_BCHW.to(self._dtype))
        return self._finish(logits.float()).cpu()


class OpenVinoEngine:
    """OpenVINO's CPU plugin on an IR that takes `[B, height, width, C]` uint8 and gives answers.

    One compiled form per number of threads, made when it is first asked for; they share the IR. The batch size is free:
    measured here, a form with a fixed one is no faster.
    """

    def __init__(self, model: Path, weights: Path, *, precision: Precision) -> None:
        openvino = import_openvino()
        self._tensor: Callable[..., Any] = openvino.Tensor
        self._core = openvino.Core()
        self._model = self._core.read_model(model, weights)
        self._hint = "bf16" if precision == "bf16" else "f32"
        self._cores = cores.usable()
        self._requests: dict[int, Any] = {}

    def __call__(self, x_BCHW: Tensor, threads: int) -> Tensor:
        request = self._request(thread_step(threads, self._cores))
        request.infer([self._tensor(pixels_last(x_BCHW).numpy(), shared_memory=True)], share_outputs=True)
        # The output's memory is the request's own and is overwritten by the next batch.
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    def _request(self, threads: int) -> Any:
        if threads not in self._requests:
            settings = {
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                # Two workers that pin their threads would pin them to the same cores.
                "ENABLE_CPU_PINNING": False,
                "INFERENCE_PRECISION_HINT": self._hint,
            }
            self._requests[threads] = self._core.compile_model(self._model, "CPU", settings).create_infer_request()
        return self._requests[threads]


class AotiEngine:
    """A package of torch's AOTInductor: compiled when it was built, loaded as it is."""

    def __init__(self, package: Path, device: torch.device) -> None:
        from torch._inductor import aoti_load_package

        # Without a number it would be the first GPU, whichever one holds the pixels.
        number = -1 if device.index is None else device.index
        self._run: Callable[[Tensor], Tensor] = aoti_load_package(package, device_index=number)
        self._device = device

    @torch.inference_mode()
    def __call__(self, x_BCHW: Tensor, threads: int) -> Tensor:
        use_threads(threads)
        return self._run(pixels_last(x_BCHW.to(self._device, non_blocking=True))).cpu()


def open_engine(
    form: Form, folder: Path, spec: ModelSpec, device: torch.device, network: Callable[[], nn.Module]
) -> Engine:
    """The engine of `engine.json` in `folder`; `network` builds the plain network for the kind that runs its weights.

    Raises what the runtime raises when it cannot load its files.
    """
    paths = [folder / file.path for file in form.files]
    if form.engine == "openvino":
        (model,) = (path for path in paths if path.suffix == ".xml")
        (weights,) = (path for path in paths if path.suffix != ".xml")
        return OpenVinoEngine(model, weights, precision=form.precision)
    if form.engine == "aoti":
        (package,) = paths
        return AotiEngine(package, device)
    return TorchEngine(
        network(), spec.preprocess, device, precision=form.precision, options=form.options, finish=finish(spec)
    )


def use_float32(device: torch.device) -> None:
    """Have float32 be float32 on a GPU too, in this process.

    There torch computes convolutions in TF32 when nothing is said, with 10 bits after the point instead of 23. Golden
    answers come from a CPU, and a tolerance of 1e-4 is less than what a deep network loses by that.
    """
    if device.type == "cuda":
        backends: Any = torch.backends  # torch's annotations know none of these
        # The older name too: torch's compiler asks for it, and gets an error where the two contradict each other.
        backends.cudnn.allow_tf32 = False
        backends.cudnn.conv.fp32_precision = "ieee"
        backends.cuda.matmul.fp32_precision = "ieee"


def use_threads(threads: int) -> None:
    """torch's own number of threads, set only when it changes: setting it costs microseconds."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def thread_step(threads: int, cores: int) -> int:
    """`threads`, or the next smaller power of two unless it is all cores: bounds the compiled forms on large machines."""
    wanted = max(1, min(threads, cores))
    return wanted if wanted == cores else 1 << (wanted.bit_length() - 1)


def folded(network: nn.Module) -> nn.Module:
    """A copy in eval mode with batch normalisations folded into the convolutions before them (torch.fx traces it)."""
    from torch.fx.experimental.optimization import fuse

    return fuse(network.eval())


def import_openvino() -> Any:
    """OpenVINO without its usage reports: importing it would otherwise send one, from a server's worker."""
    # None makes the import of the reporting package fail, upon which OpenVINO (and NNCF) put an empty one in its place.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


def pixels_last(x_BCHW: Tensor) -> Tensor:
    """`[B, C, H, W]` -> `[B, H, W, C]` with that memory layout; no copy when the channels already lie side by side."""
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    if x_BHWC.is_contiguous():
        return x_BHWC
    # Channel by channel: a quarter of the time that one permuting copy of bytes takes.
    out_BHWC = torch.empty(x_BHWC.shape, dtype=x_BHWC.dtype, device=x_BHWC.device)
    for channel in range(x_BCHW.shape[1]):
        out_BHWC[..., channel] = x_BCHW[:, channel]
    return out_BHWC
