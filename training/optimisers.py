"""How gradients become new weights: the optimiser by name, penalties, clipping and the average of the weights.

gradient_descent  w -= r * g, g over the whole training split                       Cauchy, 1847
sgd               w -= r * (g + m * v), v = m * v + g (Nesterov's form; m = momentum) Sutskever et al., 2013
adam, adamw       steps of first over root of second moment of g; adamw decays the weights apart from it
                                                          Kingma & Ba, 2015; Loshchilov & Hutter, 2019
rmsprop           w -= r * g / root of the running mean of g^2                      Tieleman & Hinton, 2012
adagrad           w -= r * g / root of the sum of all g^2 so far                    Duchi et al., 2011
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import nn

from training.config import Optimizer, Train


def optimizer(network: nn.Module, train: Train) -> torch.optim.Optimizer:
    """The recipe's optimiser. `weight_decay` is on weights of two or more dimensions; biases and norms are left alone."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return _MAKERS[train.optimizer]([group for group in groups if group["params"]], train)


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
    "adam": _adam,
    "adamw": _adamw,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
}
if set(_MAKERS) != set(get_args(Optimizer)):
    raise AssertionError("every optimiser of a recipe has its maker here")
