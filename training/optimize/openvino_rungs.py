"""A network as OpenVINO's intermediate representation: pixels in, probabilities out, in float or in int8.

Normalisation and softmax are part of the graph, the batch size is free. Int8 is static quantisation after calibration
(NNCF): weights per output channel, activations per tensor with the ranges that training images showed.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from handlerlib.engine_spec import ENGINE_FOLDER
from handlerlib.engines import import_openvino
from handlerlib.spec import ModelSpec

MODEL_FILE = f"{ENGINE_FOLDER}/model.xml"
WEIGHTS_FILE = f"{ENGINE_FOLDER}/model.weights"
"""OpenVINO's `.bin`: that ending is what archives refuse, because elsewhere it stands for pickles."""
CALIBRATION_IMAGES = 300
"""NNCF's own default; more images change the ranges of activations little."""

_LARGEST_BATCH = 4096


def convert(network: nn.Module, spec: ModelSpec) -> Any:
    """The network (on the CPU) -> `openvino.Model`: uint8 `[?, H, W, C]` to float32 `[?, classes]`."""
    openvino = import_openvino()
    shape = spec.architecture
    x_BCHW = torch.zeros(2, shape.channels, shape.height, shape.width)
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            _WithSoftmax(network).eval(), (x_BCHW,), dynamic_shapes=({0: batch},), strict=False
        )
        model = openvino.convert_model(exported)
    preprocess = openvino.preprocess.PrePostProcessor(model)
    preprocess.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    mean, std = ([value * 255.0 for value in values] for values in (spec.preprocess.mean, spec.preprocess.std))
    preprocess.input().preprocess().convert_element_type(openvino.Type.f32).mean(mean).scale(std)
    preprocess.input().model().set_layout(openvino.Layout("NCHW"))
    return preprocess.build()


def quantise(model: Any, x_NCHW: Tensor, *, transformer: bool = False) -> Any:
    """A float model of `convert` -> the same in int8, calibrated on uint8 training images `[N, C, H, W]`."""
    nncf = _nncf()
    images = [image.permute(1, 2, 0).unsqueeze(0).contiguous().numpy() for image in x_NCHW]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nncf.quantize(
            model,
            nncf.Dataset(images),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        )


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


class _WithSoftmax(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> Tensor:
        answers: Tensor = self.network(x_BCHW).softmax(dim=1)
        return answers


def _nncf() -> Any:
    import_openvino()  # first: it keeps the usage reports of both away
    nncf: Any = importlib.import_module("nncf")
    nncf.set_log_level(logging.ERROR)
    return nncf
