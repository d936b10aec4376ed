"""Structured pruning: what is removed together, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from handlerlib import architectures
from handlerlib.spec import Architecture
from training.compress import channels
from training.compress.channels import Group


def shape_of(name: str, side: int = 32) -> Architecture:
    return Architecture(name=name, channels=3, height=side, width=side, classes=5)


def trained_looking(shape: Architecture) -> nn.Module:
    """Seeded weights, and batch norms with statistics and scales of their own, so that a mix-up shows."""
    torch.manual_seed(0)
    network = architectures.build(shape).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                assert values is not None
                values.data.uniform_(0.5, 1.5)
    return network


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mlp", 3), ("lenet", 4), ("cnn28", 3), ("cifar_cnn", 3), ("tiny_cnn", 2), ("resnet9", 6),
        ("resnet18", 12), ("mobilenet_v2", 25),
    ],
)  # fmt: skip
def test_a_pruned_network_answers_like_the_whole_one_with_these_channels_silenced(name: str, count: int) -> None:
    shape = shape_of(name)
    network = trained_looking(shape)
    groups = channels.groups(network, shape)
    assert len(groups) == count
    keep = [(group, channels.least_important(channels.importance(network, group, "norm"), 0.4)) for group in groups]
    smaller, described = channels.prune(network, shape, keep)
    x_BCHW = torch.rand(2, 3, 32, 32)
    layers = dict(network.named_modules())
    with torch.no_grad():
        for group, kept in keep:
            gone = torch.ones(group.channels, dtype=torch.bool)
            gone[kept] = False
            for path, repeat in group.consumers:
                weight = layers[path].weight
                assert isinstance(weight, Tensor)
                weight[:, gone.repeat_interleave(repeat)] = 0
        whole, small = network(x_BCHW), smaller.eval()(x_BCHW)
    scale = float(whole.abs().max())
    assert float((whole - small).abs().max()) < 1e-4 * scale
    before, after = (sum(one.numel() for one in net.parameters()) for net in (network, smaller))
    assert after < 0.8 * before
    # What describes the small network is enough to build it anew.
    with torch.device("meta"):
        again = architectures.build(described)
    again.load_state_dict(smaller.state_dict(), strict=True, assign=True)


def test_pruning_twice_describes_the_network_that_is_left() -> None:
    shape = shape_of("resnet9")
    network: nn.Module = trained_looking(shape)
    for _ in range(2):
        groups = channels.groups(network, shape)
        keep = [(one, channels.least_important(channels.importance(network, one, "norm"), 0.5)) for one in groups]
        network, shape = channels.prune(network, shape, keep)
    widths = {width.module: (width.inputs, width.outputs) for width in shape.widths}
    assert widths["5.inner.1.0"] == (128, 128)
    assert architectures.build(shape)(torch.rand(2, 3, 32, 32)).shape == (2, 5)


class Tangle(nn.Module):
    """One layer whose channels may go, beside some that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Conv2d(3, 8, 1)
        self.joined = nn.Conv2d(8, 4, 1)
        self.shared = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        joined = self.joined(self.free(x_BCHW))
        twice = self.shared(self.shared(torch.cat([joined, joined], dim=1)))
        return self.head(self.last(twice).permute(0, 2, 3, 1).mean(dim=(1, 2)))


def test_what_is_not_understood_is_left_alone() -> None:
    shape = shape_of("tiny_cnn", 8)
    assert [group.sources for group in channels.groups(Tangle(), shape)] == [["free"]]


def test_a_network_that_cannot_be_traced_has_nothing_to_remove() -> None:
    class Undecided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, x_BCHW: Tensor) -> Tensor:
            return self.layer(x_BCHW) if x_BCHW.sum() > 0 else x_BCHW

    assert channels.groups(Undecided(), shape_of("tiny_cnn", 8)) == []


@pytest.mark.parametrize(
    ("count", "ratio", "stay"), [(64, 0.5, 32), (64, 0.3, 48), (10, 0.25, 8), (2, 0.9, 1), (40, 0.99, 1)]
)
def test_how_many_stay(count: int, ratio: float, stay: int) -> None:
    scores = torch.rand(count)
    kept = channels.least_important(scores, ratio)
    assert len(kept) == stay
    assert kept.tolist() == sorted(kept.tolist())
    gone = torch.ones(count, dtype=torch.bool)
    gone[kept] = False
    assert not gone.any() or float(scores[gone].max()) <= float(scores[kept].min())


def test_scores_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
    first, norm = network[0], network[1]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert first.bias is not None
    with torch.no_grad():
        first.weight.copy_(torch.tensor([3.0, -4.0]).view(2, 1, 1, 1))
        norm.weight.copy_(torch.tensor([-2.0, 1.0]))
        norm.bias.copy_(torch.tensor([1.0, 5.0]))
    norm.weight.grad, norm.bias.grad = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    group = Group(2, sources=["0"], through=["1"], consumers=[("2", 1)])
    assert channels.importance(network, group, "norm").tolist() == [3.0, 4.0]
    assert channels.importance(network, group, "batch_norm").tolist() == [2.0, 1.0]
    # (weight x gradient)^2 of scale and shift, summed: (-2)^2 + 3^2 and 2^2 + (-5)^2, of which the root.
    assert channels.importance(network, group, "taylor").tolist() == pytest.approx([13**0.5, 29**0.5])
