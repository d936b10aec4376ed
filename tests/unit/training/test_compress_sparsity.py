"""Masks: what they drop, and that nothing grows back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.compress import sparsity


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))


def test_the_smallest_weights_of_all_layers_go() -> None:
    whole = network()
    masks = sparsity.global_masks(whole, 0.75)
    assert set(masks) == {"0.weight", "4.weight"}
    weights = dict(whole.named_parameters())
    kept = torch.cat([weights[name].detach()[mask].abs() for name, mask in masks.items()])
    gone = torch.cat([weights[name].detach()[~mask].abs() for name, mask in masks.items()])
    assert len(gone) == round(0.75 * (len(gone) + len(kept)))
    assert float(gone.max()) <= float(kept.min())


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    ],
)
def test_masked_weights_stay_zero_while_the_others_learn(optimiser: type[torch.optim.Optimizer]) -> None:
    trained, other = network(), network()
    masks = sparsity.global_masks(trained, 0.5)
    dense = sparsity.global_masks(other, 0.0)
    assert all(mask.all() for mask in dense.values())
    before = trained[0].weight.detach().clone()
    steps = optimiser(trained.parameters())
    with sparsity.held(trained, masks):
        for _ in range(3):
            loss = trained(torch.rand(4, 4, 4, 4)).square().mean()
            steps.zero_grad()
            loss.backward()
            steps.step()
            for name, mask in masks.items():
                assert (dict(trained.named_parameters())[name][~mask] == 0).all()
    assert not torch.equal(trained[0].weight[masks["0.weight"]], before[masks["0.weight"]])
    # Outside, no optimiser is watched any more.
    loss = trained(torch.rand(4, 4, 4, 4)).square().mean()
    loss.backward()
    steps.step()
    assert not (trained[0].weight[~masks["0.weight"]] == 0).all()
