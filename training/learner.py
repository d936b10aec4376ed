"""A network and everything that changes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training import distributed_norm, losses, networks, optimisers, stages
from training.config import Precision, Recipe, Train
from training.data import Dataset
from training.distributed import ALONE, Group
from training.errors import RecipeError
from training.losses import Loss
from training.machine import check_compiler, choose_device, slow_precision
from training.optimisers import Average
from training.progress import Report, Step
from training.stages import Phase

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Learner:
    """What a step works with; all that changes in it is in `state_dict`."""

    network: nn.Module
    average: Average | None
    """The moving average of the network, when the recipe wants one."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss: Loss
    phases: tuple[Phase, ...]
    train: Train
    device: torch.device
    weights_K: Tensor | None = None
    """Of the classes in the loss; None when all images count the same, as they do in other tasks."""

    @property
    def judged(self) -> nn.Module:
        """The network whose answers and weights count."""
        return self.network if self.average is None else self.average.network

    def mass(self, targets_N: Tensor, rows: Tensor) -> float:
        """What these rows count beside others: their number, or the sum of their classes' weights."""
        return float(len(rows)) if self.weights_K is None else float(self.weights_K[targets_N[rows]].sum())

    def precise(self) -> torch.autocast:
        """The context in which network and loss run in the recipe's precision."""
        precision = self.train.precision
        return torch.autocast(self.device.type, dtype=_DTYPES[precision], enabled=precision != "fp32")

    def input(self, x_BCHW: Tensor) -> Tensor:
        """The batch in the recipe's order of memory."""
        return x_BCHW.contiguous(memory_format=torch.channels_last) if self.train.channels_last else x_BCHW

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this loss to what there is."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self, rate: float) -> None:
        """One step of the optimiser with the gradients there are, which are used up."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group[optimisers.FACTOR]
        self.scaler.unscale_(self.optimizer)
        optimisers.penalise(self.network, self.train)
        optimisers.clip(self.network.parameters(), self.train.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.network)

    def finite(self) -> bool:
        """Whether every weight is a number."""
        return all(bool(value.isfinite().all()) for value in self.network.state_dict().values())

    def state_dict(self) -> dict[str, Any]:
        gradients = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return parts | {"gradients": gradients}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(content[name])
        for name, parameter in self.network.named_parameters():
            gradient = content["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"network": self.network, "optimizer": self.optimizer, "scaler": self.scaler}
        return parts if self.average is None else parts | {"average": self.average}


def start(
    dataset: Dataset,
    recipe: Recipe,
    report: Report,
    network: nn.Module | None = None,
    loss: Loss | None = None,
    group: Group = ALONE,
) -> Learner:
    """The learner before the first step; `network` and `loss` take the place of the recipe's own.

    Raises RecipeError when recipe, data and machine do not fit each other.
    """
    train = recipe.train
    device = choose_device(train)
    if train.precision == "fp16" and device.type != "cuda":
        raise RecipeError("train.precision fp16 needs a GPU", remedy="--set train.precision=bf16 on a CPU")
    if note := slow_precision(train, device, torch.cpu.get_capabilities()):
        report(Step("train", 0, 0, note))
    shape = networks.architecture(dataset, recipe)
    phases = stages.plan(train, len(dataset.rows["train"]), (shape.height, shape.width))
    if network is None:
        network = networks.start(dataset, recipe, report=report)
    network = network.to(device)
    stages.check(network, phases, shape.channels)
    if train.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if group.size > 1:
        network = distributed_norm.synchronise(network, device)
    average = Average(network, train.ema) if train.ema else None
    classes = loss is None and recipe.task == "multi-class"
    weights_K = losses.class_weights(train, dataset) if classes else None
    if train.compile:
        check_compiler(device)
        network.compile()
    return Learner(
        network=network,
        average=average,
        optimizer=optimisers.optimizer(network, train),
        scaler=torch.amp.GradScaler(device.type, enabled=train.precision == "fp16"),
        loss=loss or losses.of_recipe(recipe, dataset, weights_K, device),
        phases=phases,
        train=train,
        device=device,
        weights_K=weights_K,
    )
