"""Architectures by name: the one place where training and the worker turn a spec into a network.

The small ones follow widely used teaching networks, with input channels, image size and class count taken from the
data; every other name is a classification network of torchvision, which is imported when one is asked for. All take a
float batch `x_BCHW` and return logits `[B, classes]`; those for texts are described in `handlerlib.text_networks`.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handlerlib import text_networks
from handlerlib.errors import SpecError
from handlerlib.spec import Architecture, Width, closest


def build(architecture: Architecture) -> nn.Module:
    """A freshly initialised network.

    Raises SpecError for an unknown name, an image too small for it, or widths that do not belong to it.
    """
    try:
        network = (_OWN | _TEXT).get(architecture.name, _torchvision)(architecture)
    except SpecError:
        raise
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:
        size = f"{architecture.channels}x{architecture.height}x{architecture.width}"
        raise SpecError(f"architecture '{architecture.name}' does not take {size} images: {error}") from error
    if architecture.views > 1 and not isinstance(network, _OfViews):
        raise SpecError(
            f"architecture '{architecture.name}' answers from one view of an image, not {architecture.views}",
            remedy="architecture airbench knows several",
        )
    if architecture.dropout is not None:
        _set_dropout(network, architecture)
    return _narrow(network, architecture) if architecture.widths else network


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Weights of a network of this very code, as safetensors holds them. Raises RuntimeError when they do not fit.

    A state dict of torch also says in which version each module wrote it, and some (mnasnet) read one without a version
    as their oldest; safetensors holds tensors only.
    """
    state: Any = OrderedDict(weights)
    state._metadata = cast(Any, network.state_dict())._metadata
    network.load_state_dict(state, strict=True, assign=assign)


@functools.cache
def names() -> tuple[str, ...]:
    """Every name that `build` knows for images: ours first, then torchvision's classification networks."""
    models = _torchvision_models()
    return (*_OWN, *models.list_models(module=models))


def own_names() -> tuple[str, ...]:
    """Those for images that are ours."""
    return tuple(_OWN)


def text_names() -> tuple[str, ...]:
    """Every name that `build` knows for texts."""
    return tuple(_TEXT)


def mlp(shape: Architecture) -> nn.Module:
    """Fully connected: 1024, 512, 256, classes."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = shape.channels * shape.height * shape.width
    for hidden in (1024, 512, 256):
        layers += [nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Dropout(0.0)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, shape.classes))


def lenet(shape: Architecture) -> nn.Module:
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling: 6@5x5, 16@5x5, 120, 84, classes."""
    features = nn.Sequential(
        nn.Conv2d(shape.channels, 6, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )
    head = [nn.LazyLinear(120), nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Linear(120, 84), nn.ReLU(inplace=True)]
    return _with_head(features, [*head, nn.Linear(84, shape.classes)], shape)


def cnn28(shape: Architecture) -> nn.Module:
    """The usual MNIST network: 32@3x3, 64@3x3, pool, 128, classes."""
    features = nn.Sequential(
        nn.Conv2d(shape.channels, 32, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )
    head = [nn.Dropout(0.0), nn.LazyLinear(128), nn.ReLU(inplace=True), nn.Dropout(0.0)]
    return _with_head(features, [*head, nn.Linear(128, shape.classes)], shape)


def cifar_cnn(shape: Architecture) -> nn.Module:
    """Two 5x5 convolutions of 64, each pooled, then 1024, classes."""
    features = nn.Sequential(
        nn.Conv2d(shape.channels, 64, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(64, 64, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    head = [nn.LazyLinear(1024), nn.ReLU(inplace=True), nn.Dropout(0.0)]
    return _with_head(features, [*head, nn.Linear(1024, shape.classes)], shape)


def tiny_cnn(shape: Architecture) -> nn.Module:
    """32@3x3, pool, then two linear layers: the smallest network that still looks at neighbourhoods."""
    features = nn.Sequential(nn.Conv2d(shape.channels, 32, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    head = [nn.LazyLinear(64), nn.ReLU(inplace=True), nn.Dropout(0.0)]
    return _with_head(features, [*head, nn.Linear(64, shape.classes)], shape)


def resnet9(shape: Architecture) -> nn.Module:
    """Nine layers with batch norm and two residual connections (after D. Page's DAWNBench network for CIFAR-10).

    As there, the logits are scaled by 1/8: without it the first steps of training overshoot.
    """
    return nn.Sequential(
        _conv_block(shape.channels, 64),
        _conv_block(64, 128, pool=True),
        _Residual(nn.Sequential(_conv_block(128, 128), _conv_block(128, 128))),
        _conv_block(128, 256, pool=True),
        _conv_block(256, 512, pool=True),
        _Residual(nn.Sequential(_conv_block(512, 512), _conv_block(512, 512))),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.0),
        nn.Linear(512, shape.classes),
        _Scale(0.125),
    )


def airbench(shape: Architecture) -> nn.Module:
    """Three groups of two 3x3 convolutions after K. Jordan's "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024).

    As there, 2x2 convolution of twice as many channels as a patch has values (so that it can hold a whitening and its
    mirror image), pooling before each group's first norm, GELU, logits scaled by 1/9, and convolutions that start as
    the identity for as many channels as there are. When it does not train it answers, as there, the mean over
    `shape.views` views of the image.
    """
    patch = 2 * 2 * shape.channels
    network = _OfViews(
        shape.views,
        nn.Conv2d(shape.channels, 2 * patch, 2),
        nn.GELU(),
        _conv_group(2 * patch, 64),
        _conv_group(64, 256),
        _conv_group(256, 256),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.0),
        nn.Linear(256, shape.classes, bias=False),
        _Scale(1 / 9),
    )
    with torch.no_grad():
        network.eval()(torch.zeros(1, shape.channels, shape.height, shape.width))
    return network.train()


class _OfViews(nn.Sequential):
    """Layers in a row whose answer, outside training, is the mean over views of the image: itself and its mirror image,
    and for six views, with half the weight, both moved by one pixel up and left, and down and right."""

    def __init__(self, views: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.views = views

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.views == 1:
            return self._once(x)
        mean = self._both_sides(x)
        if self.views == 2:
            return mean
        height, width = x.shape[-2:]
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        moved = self._both_sides(padded[..., :height, :width]) + self._both_sides(padded[..., 2:, 2:])
        return 0.5 * mean + 0.25 * moved

    def _both_sides(self, x: Tensor) -> Tensor:
        return 0.5 * (self._once(x) + self._once(x.flip(-1)))

    def _once(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def _conv_group(channels_in: int, channels_out: int) -> nn.Sequential:
    first = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    second = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
    for convolution in (first, second):
        if not convolution.weight.is_meta:
            nn.init.dirac_(convolution.weight[: convolution.in_channels])
    return nn.Sequential(
        *(first, nn.MaxPool2d(2), nn.BatchNorm2d(channels_out), nn.GELU()),
        *(second, nn.BatchNorm2d(channels_out), nn.GELU()),
    )


class _Scale(nn.Module):
    """x * factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class _Residual(nn.Module):
    """x + inner(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = x_BCHW + self.inner(x_BCHW)
        return out


def _conv_block(channels_in: int, channels_out: int, *, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers, nn.MaxPool2d(2)) if pool else nn.Sequential(*layers)


def _with_head(features: nn.Module, head: list[nn.Module], shape: Architecture) -> nn.Module:
    """Features, flatten, head; the first linear layer learns its width from one empty image of the right size."""
    network = nn.Sequential(features, nn.Flatten(), *head)
    with torch.no_grad():
        network.eval()(torch.zeros(1, shape.channels, shape.height, shape.width))
    return network.train()


def _torchvision_models() -> Any:
    from handlerlib.lean import import_torchvision

    import_torchvision()
    from torchvision import models

    return models


def _torchvision(shape: Architecture) -> nn.Module:
    """A torchvision classification network with random weights, its stem adapted to the data's channels."""
    if shape.name not in names():
        raise SpecError(f"unknown architecture '{shape.name}'{closest(shape.name, names())}")
    options: dict[str, object] = {}
    if shape.name.startswith("vit_"):
        options["image_size"] = _square(shape)
    elif shape.name.startswith("maxvit"):
        options["input_size"] = (shape.height, shape.width)
    elif shape.name in ("googlenet", "inception_v3"):
        # The auxiliary heads double the outputs in training and are dropped for serving anyway.
        options |= {"aux_logits": False, "init_weights": True}
    network: nn.Module = _torchvision_models().get_model(shape.name, weights=None, num_classes=shape.classes, **options)
    if shape.channels != 3:
        _adapt_stem(network, shape.channels)
    with torch.no_grad():
        network.eval()(torch.zeros(1, shape.channels, shape.height, shape.width))
    return network.train()


def resized(layer: nn.Module, inputs: int, outputs: int) -> nn.Module | None:
    """A fresh layer like this one with other widths; None when that cannot be.

    A convolution in groups can only be depthwise (one group, one input and one output per channel), and it and a batch
    norm give as many channels as they take.
    """
    if isinstance(layer, nn.BatchNorm2d) and inputs == outputs:
        return nn.BatchNorm2d(outputs, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs, outputs, layer.bias is not None)
    if isinstance(layer, nn.Conv2d) and (layer.groups == 1 or (is_depthwise(layer) and inputs == outputs)):
        return _resized_convolution(layer, inputs, outputs)
    return None


def is_depthwise(layer: nn.Conv2d) -> bool:
    """Whether each output channel sees its own input channel alone."""
    return layer.groups == layer.in_channels == layer.out_channels and layer.groups > 1


def widths_of(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a layer that `resized` knows, None for any other."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return (layer.num_features, layer.num_features) if isinstance(layer, nn.BatchNorm2d) else None


def replace(network: nn.Module, path: str, layer: nn.Module) -> None:
    """Put `layer` where the module of that dotted name is."""
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, layer)


def _narrow(network: nn.Module, architecture: Architecture) -> nn.Module:
    """Exchange the layers that the widths name for narrower ones, and try the result on an empty image."""
    for width in architecture.widths:
        replace(network, width.module, _narrowed(network, width, architecture.name))
    size = (1, architecture.channels, architecture.height, architecture.width)
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(size))
    except (RuntimeError, ValueError) as error:
        raise SpecError(f"architecture.widths of '{architecture.name}' do not fit each other: {error}") from error
    return network.train()


def _narrowed(network: nn.Module, width: Width, name: str) -> nn.Module:
    layers = dict(network.named_modules())
    if width.module not in layers:
        known = [path for path, layer in layers.items() if widths_of(layer)]
        raise SpecError(
            f"architecture.widths: '{name}' has no module '{width.module}'{closest(width.module, known)}",
            remedy="spec and weights must come from the same export",
        )
    layer = layers[width.module]
    own = widths_of(layer)
    narrower = None
    if own is not None and width.inputs <= own[0] and width.outputs <= own[1]:
        narrower = resized(layer, width.inputs, width.outputs)
    if narrower is None:
        described = f"{own[0]} -> {own[1]}" if own else "without a width"
        raise SpecError(
            f"architecture.widths: {type(layer).__name__} '{width.module}' of '{name}' ({described}) "
            f"cannot become {width.inputs} -> {width.outputs}",
            remedy="spec and weights must come from the same export",
        )
    return narrower


def _resized_convolution(layer: nn.Conv2d, inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(
        inputs,
        outputs,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        inputs if is_depthwise(layer) else layer.groups,
        layer.bias is not None,
        layer.padding_mode,
    )


def _set_dropout(network: nn.Module, architecture: Architecture) -> None:
    layers = [module for module in network.modules() if isinstance(module, nn.Dropout)]
    if not layers:
        raise SpecError(f"architecture '{architecture.name}' has no dropout layer: leave dropout out")
    for layer in layers:
        layer.p = architecture.dropout or 0.0


def _square(shape: Architecture) -> int:
    if shape.height != shape.width:
        raise SpecError(f"architecture '{shape.name}' takes square images, got {shape.height}x{shape.width}")
    return shape.height


def _adapt_stem(network: nn.Module, channels: int) -> None:
    """Replace the first convolution (torchvision's all take three channels) by one for `channels`."""
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            replace(network, path, _resized_convolution(module, channels, module.out_channels))
            return


_OWN: dict[str, Callable[[Architecture], nn.Module]] = {
    "mlp": mlp,
    "lenet": lenet,
    "cnn28": cnn28,
    "cifar_cnn": cifar_cnn,
    "tiny_cnn": tiny_cnn,
    "resnet9": resnet9,
    "airbench": airbench,
}
_TEXT: dict[str, Callable[[Architecture], nn.Module]] = {
    "embedding_bag": text_networks.embedding_bag,
    "text_cnn": text_networks.text_cnn,
}
