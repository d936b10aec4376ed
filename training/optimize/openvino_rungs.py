"""A network as OpenVINO's intermediate representation: pixels in, answers out, in float or in int8.

Normalisation and the task's last step are part of the graph, the batch size is free. Int8 is static quantisation after
calibration (NNCF): weights per output channel, activations per tensor with the ranges that training images showed. It is
made with and without a correction of biases, and the one is taken that strays less from the float network on other
training images.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handlerlib import tasks
from handlerlib.engine_spec import ENGINE_FOLDER
from handlerlib.engines import import_openvino
from handlerlib.spec import ModelSpec, Task

MODEL_FILE = f"{ENGINE_FOLDER}/model.xml"
WEIGHTS_FILE = f"{ENGINE_FOLDER}/model.weights"
"""OpenVINO's `.bin`: that ending is what archives refuse, because elsewhere it stands for pickles."""
CALIBRATION_IMAGES = 500
"""Training images that int8 is made with: three fifths set ranges, NNCF's own default of 300; the others choose."""

_SETS_RANGES = 0.6
"""Part of the images that set the ranges of activations."""
_LEAST = 1e-9
"""Probabilities below are taken as this."""
_LARGEST_BATCH = 4096


def convert(network: nn.Module, spec: ModelSpec) -> Any:
    """The network (on the CPU) -> `openvino.Model`: uint8 `[?, H, W, C]` to float32 answers `[?, outputs]`."""
    openvino = import_openvino()
    shape = spec.architecture
    x_BCHW = torch.zeros(2, shape.channels, shape.height, shape.width)
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            _Finished(network, spec).eval(), (x_BCHW,), dynamic_shapes=({0: batch},), strict=False
        )
        model = openvino.convert_model(exported)
    preprocess = openvino.preprocess.PrePostProcessor(model)
    preprocess.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    mean, std = ([value * 255.0 for value in values] for values in (spec.preprocess.mean, spec.preprocess.std))
    preprocess.input().preprocess().convert_element_type(openvino.Type.f32).mean(mean).scale(std)
    preprocess.input().model().set_layout(openvino.Layout("NCHW"))
    return preprocess.build()


def quantise(model: Any, x_NCHW: Tensor, task: Task = "multi-class", *, transformer: bool = False) -> Any:
    """A float model of `convert` -> the same in int8, from uint8 training images `[N, C, H, W]`.

    NNCF's fast bias correction makes up for what rounded weights add to a layer's mean. It sends the mean of the layer's
    input through the rounding of that, where a mean that is small beside the range is off by up to half a step, as no sum
    over different values is. So it can harm (measured: a ResNet-18 that changes 1.5 % of its answers without it changes
    6.5 % with it): both are made, and `x_NCHW`'s last images, which set no range, decide.
    """
    images = pixels_of(x_NCHW)
    first = max(1, round(_SETS_RANGES * len(images)))
    # A single image does both.
    calibration, held_out = images[:first], images[first:] or images
    expected_NK = answers(model, held_out)
    made = (with_biases(model, calibration, transformer, correct_biases=correct) for correct in (False, True))
    return min(made, key=lambda candidate: divergence(expected_NK, answers(candidate, held_out), task))


def pixels_of(x_NCHW: Tensor) -> list[Any]:
    """Arrays uint8 `[1, H, W, C]`, one per image, as a model of `convert` takes them."""
    return [image.permute(1, 2, 0).unsqueeze(0).contiguous().numpy() for image in x_NCHW]


def with_biases(model: Any, images: Sequence[Any], transformer: bool, *, correct_biases: bool) -> Any:
    """One of the two int8 forms, its ranges set by all `images`."""
    nncf = _nncf()
    advanced = importlib.import_module("nncf.quantization.advanced_parameters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nncf.quantize(
            model.clone(),
            nncf.Dataset(images),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            advanced_parameters=advanced.AdvancedQuantizationParameters(disable_bias_correction=not correct_biases),
        )


def answers(model: Any, images: Sequence[Any]) -> Tensor:
    """What the model answers to `pixels_of` images, `[N, outputs]`."""
    compiled = import_openvino().Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()

    def rows() -> Iterator[Tensor]:
        for image in images:
            request.infer([image])
            yield torch.from_numpy(request.get_output_tensor(0).data.copy())

    return torch.cat(list(rows()))


def divergence(expected_NK: Tensor, found_NK: Tensor, task: Task = "multi-class") -> float:
    """Mean Kullback-Leibler divergence in nats, of labels the sum over them; infinite for what is no probability.

    Raises ValueError for values, which are no probabilities.
    """
    if task == "regression":
        raise ValueError("values have no divergence")
    if task == "multi-label":
        expected_NK, found_NK = (torch.cat([p_NK, 1 - p_NK], dim=1) for p_NK in (expected_NK, found_NK))
    log_ratio_NK = expected_NK.clamp_min(_LEAST).log() - found_NK.clamp_min(_LEAST).log()
    divergence = float((expected_NK * log_ratio_NK).sum(dim=1).mean())
    return divergence if math.isfinite(divergence) else math.inf


def has_attention(network: nn.Module) -> bool:
    """Whether it is a transformer, which NNCF quantises by other patterns."""
    return any("attention" in type(module).__name__.lower() for module in network.modules())


def write(model: Any, folder: Path) -> tuple[str, ...]:
    """Write `folder/engine/`; returns the files' names below `folder`. Weights keep their precision."""
    (folder / ENGINE_FOLDER).mkdir(parents=True, exist_ok=True)
    target = folder / MODEL_FILE
    import_openvino().save_model(model, str(target), compress_to_fp16=False)
    target.with_suffix(".bin").replace(folder / WEIGHTS_FILE)
    return MODEL_FILE, WEIGHTS_FILE


class _Finished(nn.Module):
    def __init__(self, network: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.network, self.finish = network, tasks.finish(spec)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.finish(self.network(x_BCHW))


def _nncf() -> Any:
    import_openvino()  # first: it keeps the usage reports of both away
    nncf: Any = importlib.import_module("nncf")
    nncf.set_log_level(logging.ERROR)
    return nncf
