"""Networks with removed channels: described by data, built without tracing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from handlerlib import architectures
from handlerlib.errors import SpecError
from handlerlib.spec import Architecture, ModelSpec, Width
from support.artifacts import write_artifact

CNN = Architecture(name="tiny_cnn", channels=3, height=16, width=16, classes=3)
NARROW = (Width(module="0.0", inputs=3, outputs=8), Width(module="2", inputs=512, outputs=64))
RESNET = dataclasses.replace(CNN, name="resnet18", height=32, width=32)


def test_widths_survive_the_file_and_are_left_out_when_there_are_none(tmp_path: Path) -> None:
    spec = ModelSpec.load(write_artifact(tmp_path))
    assert "widths" not in json.loads(spec.to_json())["architecture"]
    narrow = dataclasses.replace(spec, architecture=dataclasses.replace(spec.architecture, widths=NARROW))
    assert ModelSpec.from_json(narrow.to_json()) == narrow


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_narrow_network_is_built_as_described(device: str) -> None:
    with torch.device(device):
        network = architectures.build(dataclasses.replace(CNN, widths=NARROW))
    shapes = [tuple(value.shape) for name, value in network.state_dict().items() if name.endswith("weight")]
    assert shapes == [(8, 3, 3, 3), (64, 512), (3, 64)]


def test_batch_norms_and_depthwise_convolutions_become_narrow_too() -> None:
    widths = (
        Width(module="features.1.conv.0.0", inputs=16, outputs=16),
        Width(module="features.1.conv.0.1", inputs=16, outputs=16),
        Width(module="features.1.conv.1", inputs=16, outputs=16),
        Width(module="features.0.0", inputs=3, outputs=16),
        Width(module="features.0.1", inputs=16, outputs=16),
    )
    network = architectures.build(dataclasses.replace(RESNET, name="mobilenet_v2", widths=widths))
    depthwise = network.get_submodule("features.1.conv.0.0")
    assert isinstance(depthwise, torch.nn.Conv2d)
    assert depthwise.groups == 16
    with torch.inference_mode():
        assert network.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("shape", "widths", "message"),
    [
        (CNN, [("0.9", 3, 8)], r"has no module '0\.9', did you mean '0\.0'"),
        (CNN, [("0.0", 3, 64)], r"Conv2d '0\.0' of 'tiny_cnn' \(3 -> 32\) cannot become 3 -> 64"),
        (CNN, [("0.1", 8, 8)], r"ReLU '0\.1' of 'tiny_cnn' \(without a width\) cannot become"),
        (CNN, [("0.0", 3, 8)], "widths of 'tiny_cnn' do not fit each other"),
        (CNN, [("0.0", 0, 8)], r"widths of '0\.0' must be at least 1"),
        (CNN, [("0.0", 3, 8), ("0.0", 3, 9)], "must be one entry per module"),
        (RESNET, [("layer1.0.bn1", 8, 16)], "BatchNorm2d 'layer1.0.bn1' .* cannot become 8 -> 16"),
        (RESNET, [("layer1.0.conv1", 64, 32)], "widths of 'resnet18' do not fit each other"),
    ],
)
def test_widths_that_do_not_belong_to_the_network_are_named(
    shape: Architecture, widths: list[tuple[str, int, int]], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        architectures.build(
            dataclasses.replace(shape, widths=tuple(Width(module=name, inputs=i, outputs=o) for name, i, o in widths))
        )


def test_a_file_with_a_wrong_width_names_the_key(tmp_path: Path) -> None:
    fields = json.loads(ModelSpec.load(write_artifact(tmp_path)).to_json())
    fields["architecture"]["widths"] = [{"module": "0.0", "inputs": 3, "output": 8}]
    with pytest.raises(SpecError, match=r"unknown key 'architecture\.widths\[0\]\.output'.*did you mean 'outputs'"):
        ModelSpec.from_json(json.dumps(fields))
