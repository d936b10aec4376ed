"""Rounding as int8 does it, with a gradient that passes."""

from __future__ import annotations

import torch
from torch import nn

from training.compress import quantise
from training.compress.quantise import ActivationRounding, WeightRounding


def test_weights_lie_on_255_levels_per_output_and_move_half_a_step_at_most() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([0.01, 1.0, 100.0, 5.0]).view(4, 1, 1, 1)
    rounded = WeightRounding()(weight)
    for one, original in zip(rounded, weight, strict=True):
        step = original.abs().max() / 127
        levels = one / step
        assert torch.allclose(levels, levels.round(), atol=1e-4)
        assert float((one - original).abs().max()) <= 0.5001 * float(step)


def test_the_gradient_passes_as_if_nothing_had_been_rounded() -> None:
    weight = torch.randn(2, 5, requires_grad=True)
    (WeightRounding()(weight) * torch.arange(10.0).view(2, 5)).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.arange(10.0).view(2, 5))


def test_activations_are_cut_to_a_range_that_follows_what_is_seen() -> None:
    layer = ActivationRounding()
    layer(torch.tensor([-1.0, 3.0]))
    assert (float(layer.low), float(layer.high)) == (-1.0, 3.0)
    layer(torch.tensor([-1.0, 23.0]))
    assert float(layer.high) == 3.0 + 0.05 * 20
    layer.eval()
    outside = layer(torch.tensor([-100.0, 0.0, 100.0]))
    assert float(outside[1]) == 0.0
    assert float(outside[0]) >= -1.02
    assert float(outside[2]) <= 4.02
    assert float(layer.high) == 4.0


def test_a_prepared_network_gives_its_plain_weights_back() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    x_BCHW = torch.randn(8, 1, 8, 8)
    prepared = quantise.prepare(network, [x_BCHW])
    with torch.no_grad():
        whole, rounded = network(x_BCHW), prepared(x_BCHW)
    assert not torch.equal(whole, rounded)
    assert torch.allclose(whole, rounded, atol=0.05)
    back = quantise.plain(prepared.state_dict())
    assert set(back) == set(network.state_dict())
    network.load_state_dict(back, strict=True)
    with torch.no_grad():
        assert torch.equal(network(x_BCHW), whole)
