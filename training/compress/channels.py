"""Structured pruning: whole channels leave a trained network, which then really is smaller and does less work.

Which layers share their channels is read from the traced graph (dependency groups, after Fang et al., "DepGraph:
Towards Any Structural Pruning", 2023): a group is every layer whose channel number i must go or stay together, because
additions, multiplications, batch norms or depthwise convolutions tie them. Operations that this module does not know
freeze the channels that they touch, so an exotic network loses fewer channels, never its meaning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from handlerlib import architectures
from handlerlib.spec import Architecture, Width

Importance = Literal["norm", "batch_norm", "taylor"]
MULTIPLE = 8
"""Groups keep a multiple of this many channels where they have more than four times it: what vector units work in."""


@dataclass(slots=True)
class Group:
    """Layers that share their channels."""

    channels: int
    sources: list[str] = field(default_factory=list)
    """Layers whose outputs these channels are."""
    through: list[str] = field(default_factory=list)
    """Batch norms and depthwise convolutions in between."""
    consumers: list[tuple[str, int]] = field(default_factory=list)
    """Layers that take them, each with the number of inputs per channel (above 1 behind a flatten)."""


def groups(network: nn.Module, shape: Architecture) -> list[Group]:
    """All groups whose channels may be removed, in the order of the graph; none when the network cannot be traced."""
    try:
        graph = fx.symbolic_trace(network)
    except Exception:  # noqa: BLE001 - control flow that depends on values raises whatever it runs into
        return []
    device = next(network.parameters()).device
    with _evaluating(network), torch.no_grad():
        ShapeProp(graph).propagate(torch.zeros(2, shape.channels, shape.height, shape.width, device=device))
    return _Tracer(graph).run()


def prune(
    network: nn.Module, shape: Architecture, keep: Sequence[tuple[Group, Tensor]]
) -> tuple[nn.Module, Architecture]:
    """A new, smaller network with the weights of the channels that are kept, on the CPU, and what describes it.

    Each group comes with the sorted numbers of the channels to keep.
    """
    weights = {key: value.detach().cpu() for key, value in network.state_dict().items()}
    layers = dict(network.named_modules())
    for group, kept in keep:
        for path in group.sources:
            _cut(weights, path, kept, dimension=0)
        for path in group.through:
            _cut(weights, path, kept, dimension=0)
        for path, repeat in group.consumers:
            columns = (kept[:, None] * repeat + torch.arange(repeat)).flatten()
            _cut(weights, path, columns, dimension=1, only="weight")
    touched = {path for group, _ in keep for path in (*group.sources, *group.through, *(c for c, _ in group.consumers))}
    touched |= {width.module for width in shape.widths}
    widths = tuple(_width(path, layers[path], weights) for path in layers if path in touched)
    smaller = dataclasses.replace(shape, widths=widths)
    built = architectures.build(smaller)
    built.load_state_dict(weights)
    return built, smaller


def least_important(scores: Tensor, ratio: float) -> Tensor:
    """Sorted numbers of the channels that stay when about `ratio` of them, those of the lowest scores, go."""
    count = len(scores)
    stay = count * (1 - ratio)
    whole = MULTIPLE * round(stay / MULTIPLE) if count > 4 * MULTIPLE else round(stay)
    return scores.topk(max(1, min(whole, count))).indices.sort().values


def importance(network: nn.Module, group: Group, kind: Importance) -> Tensor:
    """A score per channel of the group; higher is more worth keeping.

    norm: L2 norm of each filter (after Li et al., "Pruning Filters for Efficient ConvNets", 2017, who take L1).
    batch_norm: magnitude of the scale behind the filter (Liu et al., "Network Slimming", 2017); the norm where no
    batch norm follows. taylor: (sum of weight x gradient over the filter)^2, on the batch norm's scale and shift where
    there is one (Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019); gradients must be there.
    """
    layers = dict(network.named_modules())
    norms = [layer for path in group.through if isinstance(layer := layers[path], nn.BatchNorm2d) and layer.affine]
    if kind == "batch_norm" and norms:
        return torch.stack([layer.weight.detach().abs() for layer in norms]).sum(0).cpu()
    measured = norms if kind == "taylor" and norms else [layers[path] for path in group.sources]
    score = torch.zeros(group.channels)
    for layer in measured:
        for parameter in layer.parameters(recurse=False):
            if kind == "taylor":
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                score += (parameter.detach() * gradient).reshape(group.channels, -1).sum(1).square().cpu()
            elif parameter.ndim > 1:
                score += parameter.detach().reshape(group.channels, -1).square().sum(1).cpu()
    return score.sqrt()


def _cut(weights: dict[str, Tensor], path: str, kept: Tensor, *, dimension: int, only: str = "") -> None:
    """Keep these rows (or columns) of every tensor of a layer."""
    for name in (only,) if only else ("weight", "bias", "running_mean", "running_var"):
        key = f"{path}.{name}"
        if key in weights:
            weights[key] = weights[key].index_select(dimension, kept)


def _width(path: str, layer: nn.Module, weights: Mapping[str, Tensor]) -> Width:
    outputs = weights[f"{path}.weight"].shape[0]
    depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
    per_output = outputs if depthwise or isinstance(layer, nn.BatchNorm2d) else weights[f"{path}.weight"].shape[1]
    return Width(module=path, inputs=per_output, outputs=outputs)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


# ------------------------------------------------------------------------------------------------- the graph's groups

_SAME_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.Dropout, nn.Dropout2d, nn.Identity,
)  # fmt: skip
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_SAME_FUNCTIONS: set[Callable[..., Any]] = {
    F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.dropout, F.leaky_relu, torch.relu, torch.sigmoid,
}  # fmt: skip
_POOL_FUNCTIONS: set[Callable[..., Any]] = {F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d}
_SAME_NAMES = {"stochastic_depth", "relu", "relu_", "contiguous", "clone"}
_TYING: set[Callable[..., Any]] = {operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul}


@dataclass(frozen=True, slots=True)
class _Channels:
    """Which axis of a tensor carries a group's channels, each as `repeat` consecutive elements."""

    group: int
    axis: int
    repeat: int = 1


class _Tracer:
    """Follows channels through the graph; groups that prove to be one are united."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._layers = dict(graph.named_modules())
        self._values: dict[fx.Node, _Channels | None] = {}
        self._groups: list[Group] = []
        self._parent: list[int] = []
        self._frozen: set[int] = set()
        self._called: dict[str, fx.Node] = {}

    def run(self) -> list[Group]:
        for node in self._graph.graph.nodes:
            value = self._visit(node)
            self._values[node] = value
        frozen = {self._root(index) for index in self._frozen}
        merged: dict[int, Group] = {}
        for index, group in enumerate(self._groups):
            root = self._root(index)
            into = merged.setdefault(root, Group(group.channels))
            into.sources += group.sources
            into.through += group.through
            into.consumers += group.consumers
        return [group for root, group in merged.items() if root not in frozen and group.consumers]

    def _visit(self, node: fx.Node) -> _Channels | None:
        if node.op == "call_module":
            return self._module(node)
        if node.op in ("call_function", "call_method"):
            return self._function(node)
        return self._unknown(node)

    def _unknown(self, node: fx.Node) -> _Channels | None:
        """Nothing may change about what flows into this operation, nor about what comes out."""
        for given in node.all_input_nodes:
            self._freeze(self._values[given])
        return None

    def _module(self, node: fx.Node) -> _Channels | None:
        path = str(node.target)
        layer = self._layers[path]
        given = self._values[node.all_input_nodes[0]] if len(node.all_input_nodes) == 1 else None
        if path in self._called and architectures.widths_of(layer):
            # A layer that is used twice ties all its uses; too rare to be worth more than leaving it alone.
            self._freeze(self._values[self._called[path]])
            for before in self._called[path].all_input_nodes:
                self._freeze(self._values[before])
            return self._unknown(node)
        self._called[path] = node
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            return self._layer(node, path, layer, given)
        if isinstance(layer, nn.Flatten):
            return self._flatten(node, given) if layer.start_dim == 1 and layer.end_dim == -1 else self._unknown(node)
        pool = isinstance(layer, _POOLS) and given is not None and given.axis == 1
        return given if pool or isinstance(layer, _SAME_MODULES) else self._unknown(node)

    def _layer(self, node: fx.Node, path: str, layer: nn.Module, given: _Channels | None) -> _Channels | None:
        axis = len(_shape(node)) - 1 if isinstance(layer, nn.Linear) else 1
        if given is not None and given.axis != axis:
            return self._unknown(node)
        if isinstance(layer, nn.BatchNorm2d) or (isinstance(layer, nn.Conv2d) and architectures.is_depthwise(layer)):
            if given is None or given.repeat != 1:
                return self._unknown(node)
            self._groups[given.group].through.append(path)
            return given
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            return self._unknown(node)
        if given is not None:
            self._groups[given.group].consumers.append((path, given.repeat))
        widths = architectures.widths_of(layer)
        assert widths is not None
        return self._new(Group(widths[1], sources=[path]), axis)

    def _function(self, node: fx.Node) -> _Channels | None:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        inputs = node.all_input_nodes
        given = self._values[inputs[0]] if inputs else None
        if node.target in _TYING:
            return given if len(inputs) == 1 else self._tie(node)
        if len(inputs) != 1:
            return self._unknown(node)
        if node.target in _SAME_FUNCTIONS or name in _SAME_NAMES:
            return given
        if node.target in _POOL_FUNCTIONS and given is not None and given.axis == 1:
            return given
        if name == "flatten" and node.args[1:] == (1,) and not node.kwargs:
            return self._flatten(node, given)
        spatial_mean = name == "mean" and list(node.args[1:]) in ([[2, 3]], [(2, 3)])
        if spatial_mean and given is not None and given.axis == 1:
            return given
        return self._unknown(node)

    def _flatten(self, node: fx.Node, given: _Channels | None) -> _Channels | None:
        if given is None or given.axis != 1:
            return self._unknown(node)
        size = _shape(node.all_input_nodes[0])
        return _Channels(given.group, 1, given.repeat * math.prod(size[2:]))

    def _tie(self, node: fx.Node) -> _Channels | None:
        """A sum or product of two tensors: their channels are one group, when both have them on the same axis."""
        one, other = (self._values[given] for given in node.all_input_nodes)
        if one is None or other is None or (one.axis, one.repeat) != (other.axis, other.repeat):
            return self._unknown(node)
        sizes = [_shape(given) for given in node.all_input_nodes]
        if len(sizes[0]) != len(sizes[1]) or sizes[0][one.axis] != sizes[1][one.axis]:
            return self._unknown(node)
        self._parent[self._root(other.group)] = self._root(one.group)
        return one

    def _new(self, group: Group, axis: int) -> _Channels:
        self._groups.append(group)
        self._parent.append(len(self._parent))
        return _Channels(len(self._groups) - 1, axis)

    def _root(self, index: int) -> int:
        while self._parent[index] != index:
            index = self._parent[index]
        return index

    def _freeze(self, value: _Channels | None) -> None:
        if value is not None:
            self._frozen.add(value.group)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)
