"""The rungs by name, what each needs, and how it is built and opened."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from handlerlib import engine_spec, engines
from handlerlib.engine_spec import (
    BuiltFor,
    Device,
    EngineFile,
    Kind,
    Package,
    Precision,
    TorchOptions,
)
from handlerlib.engines import Engine
from handlerlib.loading import PLAIN
from handlerlib.spec import ModelSpec, closest
from training.errors import RecipeError
from training.optimize import openvino_rungs, torch_rungs


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One way to run a network."""

    name: str
    engine: Kind
    precision: Precision
    options: TorchOptions = field(default_factory=TorchOptions)
    devices: tuple[Device, ...] = ("cpu",)
    packed: bool = True
    """False: only measured, because it cannot serve without doing at each start what an archive must not do."""

    @property
    def lossless(self) -> bool:
        """float32 throughout: only the order of sums differs from the plain weights."""
        return self.precision == "fp32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A rung that was built and not judged yet; opens like the engine that it may become."""

    rung: str
    engine: Kind
    precision: Precision
    options: TorchOptions
    files: tuple[EngineFile, ...]
    built_for: BuiltFor


_FAST = TorchOptions(channels_last=True, fold=True)
_BOTH: tuple[Device, ...] = ("cpu", "cuda")
RUNGS = (
    Rung(name=PLAIN, engine="torch", precision="fp32", devices=_BOTH),
    Rung(
        name="torch-channels-last",
        engine="torch",
        precision="fp32",
        options=TorchOptions(channels_last=True),
        devices=_BOTH,
    ),
    Rung(name="torch-folded", engine="torch", precision="fp32", options=_FAST, devices=_BOTH),
    Rung(name="torch-bf16", engine="torch", precision="bf16", options=_FAST, devices=_BOTH),
    Rung(
        name="torch-bf16-autocast",
        engine="torch",
        precision="bf16",
        options=TorchOptions(channels_last=True, fold=True, autocast=True),
    ),
    Rung(name="torch-fp16", engine="torch", precision="fp16", options=_FAST, devices=("cuda",)),
    Rung(name="torch-int8", engine="torch", precision="int8", devices=("cuda",)),
    Rung(name="compile-fp32", engine="aoti", precision="fp32", devices=_BOTH, packed=False),
    Rung(name="compile-bf16", engine="aoti", precision="bf16", devices=_BOTH, packed=False),
    Rung(name="aoti-fp32", engine="aoti", precision="fp32", devices=_BOTH),
    Rung(name="aoti-bf16", engine="aoti", precision="bf16", devices=_BOTH),
    Rung(name="aoti-fp16", engine="aoti", precision="fp16", devices=("cuda",)),
    Rung(name="openvino-fp32", engine="openvino", precision="fp32"),
    Rung(name="openvino-bf16", engine="openvino", precision="bf16"),
    Rung(name="openvino-int8", engine="openvino", precision="int8"),
)
"""To add a rung: an entry here, and in `build` and `handlerlib.engines.open_engine` if its kind is a new one. What a GPU
runs shares the code of the CPU's rungs and has not been tried on one."""

_INSTRUCTIONS: dict[Precision, tuple[str, ...]] = {
    "fp32": ("avx512f", "avx2", "asimd"),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "fp16": (),
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "avx2"),
}
"""Per precision, what a processor multiplies it with, best first; the first one found here is what the rung needs."""
# fmt: off
_COMPILED_FOR = (
    "sse", "ssse", "avx", "fma", "f16c", "bmi", "abm", "popcnt", "movbe", "adx", "amx", "gfni", "vaes", "vpclmul", "sha",
    "asimd", "sve", "sme", "fphp", "bf16", "i8mm",
)
# fmt: on
"""Beginnings of the names of features that a compiler may use by itself."""


def find(name: str) -> Rung:
    """The rung of that name. Raises RecipeError naming the nearest one."""
    for rung in RUNGS:
        if rung.name == name:
            return rung
    known = [rung.name for rung in RUNGS]
    raise RecipeError(f"there is no rung '{name}'{closest(name, known)}", remedy=f"rungs: {', '.join(known)}")


def for_device(device: Device) -> tuple[Rung, ...]:
    """The rungs that a device has, the reference first."""
    return tuple(rung for rung in RUNGS if device in rung.devices)


def missing(rung: Rung, device: Device, *, calibration: bool) -> str:
    """Why the rung cannot be built on this machine; empty when it can."""
    if rung.engine == "torch" and rung.precision == "int8":
        return "torch has no int8 convolutions for a GPU"
    if rung.engine == "openvino":
        for package in ("openvino", "nncf") if rung.precision == "int8" else ("openvino",):
            if importlib.util.find_spec(package) is None:
                return f"the package {package} is not installed (extra 'optimize')"
    if rung.engine == "aoti" and shutil.which("g++") is None and shutil.which("c++") is None:
        return "there is no C++ compiler"
    if rung.precision == "int8" and not calibration:
        return "there are no training images to calibrate it on"
    if device == "cpu" and _INSTRUCTIONS[rung.precision] and not _instruction(rung.precision):
        return f"this processor has no instructions for {rung.precision}"
    return ""


def build(name: str, network: nn.Module, spec: ModelSpec, calibration_NCHW: Tensor | None, folder: Path) -> Draft:
    """Build a rung for the device that `network` lies on; its files go to `folder/engine/`.

    `calibration_NCHW` are uint8 training images, needed for int8. The network may be changed: give each rung its own.
    Raises RecipeError for an unknown rung and one that cannot be built here, and whatever the builders raise.
    """
    rung = find(name)
    place = next(network.parameters()).device
    device: Device = "cuda" if place.type == "cuda" else "cpu"
    reason = missing(rung, device, calibration=calibration_NCHW is not None)
    if reason:
        raise RecipeError(f"{name}: {reason}", remedy="leave this rung out, or provide what it lacks")
    network = network.eval().requires_grad_(False)
    files: tuple[str, ...] = ()
    if rung.engine == "openvino":
        model = openvino_rungs.convert(network, spec)
        if rung.precision == "int8":
            assert calibration_NCHW is not None
            transformer = openvino_rungs.has_attention(network)
            model = openvino_rungs.quantise(model, calibration_NCHW, spec.task, transformer=transformer)
        files = openvino_rungs.write(model, folder)
    elif rung.engine == "aoti" and rung.packed:
        files = (torch_rungs.package(network, spec, rung.precision, place, folder),)
    return Draft(
        rung=rung.name,
        engine=rung.engine,
        precision=rung.precision,
        options=rung.options,
        files=tuple(EngineFile(path=name, sha256=engine_spec.sha256_of(folder / name)) for name in files),
        built_for=_built_for(rung, device),
    )


def open_engine(
    draft: Draft, folder: Path, network: Callable[[], nn.Module], spec: ModelSpec, device: torch.device
) -> Engine:
    """The engine of a draft whose files lie in `folder`, as a worker would open it.

    `network` gives the plain network on the CPU, in eval mode; it is called only by the rungs that run its weights.
    """
    rung = find(draft.rung)
    if rung.name == PLAIN:
        return engines.plain_engine(network().to(device), spec, device)
    if not rung.packed:
        return torch_rungs.CompiledEngine(network(), spec, rung.precision, device)
    return engines.open_engine(draft, folder, spec, device, network)


def _built_for(rung: Rung, device: Device) -> BuiltFor:
    package = "openvino" if rung.engine == "openvino" else "torch"
    version = engine_spec.installed_version(package) or ""
    major, minor = (int(part) for part in version.split(".")[:2])
    # OpenVINO reads the representations of older releases of a year; torch promises nothing between two minors.
    below = f"{major + 1}" if package == "openvino" else f"{major}.{minor + 1}"
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else None
    return BuiltFor(
        device=device,
        machine=platform.machine(),
        cpu_features=_needed(rung, device),
        gpu_capability=capability,
        packages=(Package(name=package, at_least=f"{major}.{minor}", below=below),),
    )


def _needed(rung: Rung, device: Device) -> tuple[str, ...]:
    """Features without which the numbers would be others, the gain lost, or (compiled here) the process killed."""
    if rung.engine != "aoti":
        return _instruction(rung.precision) if device == "cpu" else ()
    # The compiler was told to use whatever this processor has; also for what runs on it around a GPU's kernels.
    return tuple(sorted(name for name in engine_spec.cpu_features() if name.startswith(_COMPILED_FOR)))


def _instruction(precision: Precision) -> tuple[str, ...]:
    here = engine_spec.cpu_features()
    return next(((name,) for name in _INSTRUCTIONS[precision] if name in here), ())
