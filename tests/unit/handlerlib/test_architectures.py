from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from handlerlib import architectures
from handlerlib.errors import SpecError
from handlerlib.spec import Architecture

SHAPE = Architecture(name="mlp", channels=3, height=32, width=32, classes=7)


def widths(network: torch.nn.Module) -> list[tuple[int, ...]]:
    layers = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    return [tuple(layer.weight.shape) for layer in layers]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", [(1024, 3072), (512, 1024), (256, 512), (7, 256)]),
        ("lenet", [(6, 3, 5, 5), (16, 6, 5, 5), (120, 576), (84, 120), (7, 84)]),
        ("cnn28", [(32, 3, 3, 3), (64, 32, 3, 3), (128, 12544), (7, 128)]),
        ("cifar_cnn", [(64, 3, 5, 5), (64, 64, 5, 5), (1024, 4096), (7, 1024)]),
        ("tiny_cnn", [(32, 3, 3, 3), (64, 8192), (7, 64)]),
    ],
)
def test_layers_are_the_documented_ones(name: str, expected: list[tuple[int, ...]]) -> None:
    assert widths(architectures.build(dataclasses.replace(SHAPE, name=name))) == expected


@pytest.mark.parametrize("name", ["mlp", "lenet", "cnn28", "cifar_cnn", "tiny_cnn", "resnet9", "resnet18", "vit_b_32"])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_size_and_classes_come_from_the_data(name: str, channels: int) -> None:
    shape = dataclasses.replace(SHAPE, name=name, channels=channels, classes=5)
    network = architectures.build(shape).eval()
    with torch.inference_mode():
        assert network(torch.rand(2, channels, 32, 32)).shape == (2, 5)


def test_every_torchvision_classification_name_is_known() -> None:
    for name in ("alexnet", "convnext_tiny", "efficientnet_b0", "maxvit_t", "regnet_y_400mf", "swin_t", "vgg16"):
        assert name in architectures.names()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet9x"}, "unknown architecture 'resnet9x', did you mean 'resnet9'"),
        ({"name": "lenet", "height": 4, "width": 4}, "'lenet' does not take 3x4x4 images"),
        ({"name": "vit_b_16", "height": 32, "width": 48}, "takes square images"),
        ({"name": "resnet18", "dropout": 0.5}, "'resnet18' has no dropout layer"),
    ],
)
def test_what_cannot_be_built_is_explained(change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        architectures.build(dataclasses.replace(SHAPE, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mnasnet0_5", "resnet18"])
def test_plain_tensors_are_all_that_loading_needs(name: str) -> None:
    shape = Architecture(name=name, channels=3, height=64, width=64, classes=3)
    torch.manual_seed(0)
    trained = architectures.build(shape).eval()
    with torch.device("meta"):
        network = architectures.build(shape)
    architectures.load_weights(network, dict(trained.state_dict()), assign=True)
    x_BCHW = torch.rand(2, 3, 64, 64)
    assert torch.equal(network.eval()(x_BCHW), trained(x_BCHW))


def test_dropout_reaches_every_dropout_layer() -> None:
    network = architectures.build(dataclasses.replace(SHAPE, name="vgg11", dropout=0.3))
    assert {module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}


def test_the_same_seed_gives_the_same_weights() -> None:
    def seeded() -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        return dict(architectures.build(dataclasses.replace(SHAPE, name="resnet9")).state_dict())

    first, second = seeded(), seeded()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("views", [2, 6])
def test_an_answer_from_several_views_is_their_mean(views: int) -> None:
    torch.manual_seed(0)
    shape = Architecture(name="airbench", channels=3, height=32, width=32, classes=4)
    once = architectures.build(shape).eval()
    several = architectures.build(dataclasses.replace(shape, views=views)).eval()
    several.load_state_dict(once.state_dict())
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        seen = (
            [x]
            if views == 2
            else [x, *(F.pad(x, (1, 1, 1, 1), "reflect")[..., k : k + 32, k : k + 32] for k in (0, 2))]
        )
        rows = [(once(view) + once(view.flip(-1))) / 2 for view in seen]
        expected = rows[0] if views == 2 else rows[0] / 2 + (rows[1] + rows[2]) / 4
        torch.testing.assert_close(several(x), expected)
        mirrored = several(x.flip(-1)) if views == 2 else expected
    torch.testing.assert_close(mirrored, expected)
    torch.manual_seed(1)
    learning = several.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(learning, once.train()(x))


def test_views_belong_to_networks_that_know_them() -> None:
    with pytest.raises(SpecError, match="architecture 'lenet' answers from one view of an image, not 2"):
        architectures.build(Architecture(name="lenet", channels=1, height=28, width=28, classes=4, views=2))
    with pytest.raises(SpecError, match=r"architecture\.views must be one of \(1, 2, 6\)"):
        Architecture(name="airbench", channels=3, height=32, width=32, classes=4, views=3)
