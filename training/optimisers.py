"""How gradients become new weights: the optimiser by name, penalties, clipping and the average of the weights.

gradient_descent  w -= r * g, g over the whole training split                       Cauchy, 1847
sgd               w -= r * (g + m * v), v = m * v + g (Nesterov's form; m = momentum) Sutskever et al., 2013
muon              w -= r * o(g + m * v), v as above, o the nearest matrix whose singular values are all about 1
                                                                                    K. Jordan et al., 2024
adam, adamw       steps of first over root of second moment of g; adamw decays the weights apart from it
                                                          Kingma & Ba, 2015; Loshchilov & Hutter, 2019
rmsprop           w -= r * g / root of the running mean of g^2                      Tieleman & Hinton, 2012
adagrad           w -= r * g / root of the sum of all g^2 so far                    Duchi et al., 2011
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from training.config import Kind, Optimizer, Train

FACTOR = "factor"
"""Of a group of parameters, on the schedule's rate."""
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ITERATIONS = 3
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial a s + b s^3 + c s^5 that draws singular values up to 1 to about 1 when applied repeatedly."""


def optimizer(network: nn.Module, train: Train) -> torch.optim.Optimizer:
    """The recipe's optimiser, its parameters in groups by kind.

    `weight_decay` is on weights of two or more dimensions, and on the others with `decay_biases`. A factor of
    `train.rates` is on the gradient's part of a step alone, so that all weights decay at the same speed.
    """
    head = _head(network)
    inner = {id(layer.weight) for layer in network.modules() if isinstance(layer, _LAYERS)} - {id(head)}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        kind = _kind(name, parameter, head)
        factor = 1.0 if kind is None else train.rates.get(kind, 1.0)
        if not parameter.requires_grad:
            continue
        # At a factor of 0 the group is there for its gradients to be cleared.
        decays = factor > 0 and (parameter.ndim > 1 or train.decay_biases)
        orthogonal = train.optimizer == "muon" and id(parameter) in inner
        group = groups.setdefault(
            (not decays, factor, orthogonal),
            {
                "params": [],
                "weight_decay": train.weight_decay / factor if decays else 0.0,
                FACTOR: factor,
                **({"orthogonal": True} if orthogonal else {}),
            },
        )
        group["params"].append(parameter)
    # Weights before biases, whatever comes first in the network.
    return _MAKERS[train.optimizer]([groups[key] for key in sorted(groups)], train)


def _head(network: nn.Module) -> Tensor | None:
    """The weight of the last linear layer."""
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    return linear[-1].weight if linear else None


def _kind(name: str, parameter: Tensor, head: Tensor | None) -> Kind | None:
    if parameter is head:
        return "head"
    if parameter.ndim > 1:
        return None
    return "bias" if name.rpartition(".")[2].endswith("bias") else "norm"


def penalise(network: nn.Module, train: Train) -> None:
    """Add the gradient of l1 * sum |w| + l2 / 2 * sum w^2 to that of the loss, for weights of two or more dimensions.

    In the gradient and not in the loss, so that losses of runs with different penalties stay comparable. The gradient
    of |w| at 0 is taken as 0.
    """
    if not (train.l1 or train.l2):
        return
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is None or parameter.ndim <= 1:
                continue
            if train.l1:
                parameter.grad.add_(parameter.sign(), alpha=train.l1)
            if train.l2:
                parameter.grad.add_(parameter, alpha=train.l2)


def clip(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Shorten the gradient of all weights together to length `most` (Pascanu et al., 2013); 0 leaves it."""
    if most:
        nn.utils.clip_grad_norm_(parameters, most)


class Average:
    """The exponential moving average of a network's weights and statistics (Polyak & Juditsky, 1992).

    average = d * average + (1 - d) * weights after each update, with d the smaller of `decay` and (1 + t) / (10 + t)
    at update t, so that it does not hang on the random weights of the start.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        mine, theirs = self.network.state_dict(), network.state_dict()
        floating = [key for key, value in mine.items() if value.is_floating_point()]
        torch._foreach_lerp_([mine[key] for key in floating], [theirs[key] for key in floating], 1 - decay)
        for key in mine.keys() - set(floating):
            mine[key].copy_(theirs[key])

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.updates = state["updates"]


class Muon(torch.optim.Optimizer):
    """Momentum whose steps change every direction of a weight equally much (K. Jordan et al., "Muon: An optimizer for
    hidden layers in neural networks", 2024), in the form of "airbench94_muon" for networks with norms.

    In groups marked `orthogonal`, a weight seen as a matrix [outputs, rest] is first brought to the Frobenius length
    root(outputs), which takes the place of weight decay, and then moved by rate times the step with its singular
    values set to about 1. The other groups, and the head, are for `sgd` with the same momentum.
    """

    def __init__(self, groups: list[dict[str, Any]], rate: float, momentum: float, *, nesterov: bool) -> None:
        usual = {"lr": rate, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.0, "orthogonal": False}
        super().__init__(groups, usual)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"] and not group["orthogonal"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        speed = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        change = gradient.add(speed, alpha=group["momentum"]) if group["nesterov"] else speed
        if group["orthogonal"]:
            parameter.mul_(len(parameter) ** 0.5 / parameter.norm().clamp_min(1e-12))
            change = orthogonalised(change.reshape(len(change), -1)).view_as(change)
        parameter.add_(change, alpha=-group["lr"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix with the same singular vectors whose singular values are drawn to about 1, float32.

    Newton-Schulz iterations with Jordan's coefficients: those far below the largest stay below 1.
    """
    a, b, c = _COEFFICIENTS
    x: Tensor = matrix / matrix.norm().clamp_min(1e-12)
    x = x.T if len(matrix) > matrix.shape[1] else x
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


def _muon(groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
    return Muon(groups, train.learning_rate, train.momentum, nesterov=train.nesterov and train.momentum > 0)


def _gradient_descent(groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=train.learning_rate)


def _sgd(groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
    nesterov = train.nesterov and train.momentum > 0
    return torch.optim.SGD(groups, lr=train.learning_rate, momentum=train.momentum, nesterov=nesterov)


def _adam(groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=train.learning_rate)


def _adamw(groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=train.learning_rate)


def _rmsprop(groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, lr=train.learning_rate)


def _adagrad(groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(groups, lr=train.learning_rate)


_MAKERS = {
    "gradient_descent": _gradient_descent,
    "sgd": _sgd,
    "muon": _muon,
    "adam": _adam,
    "adamw": _adamw,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
}
if set(_MAKERS) != set(get_args(Optimizer)):
    raise AssertionError("every optimiser of a recipe has its maker here")
