"""Staged training: the stages of a recipe, resolved for the data at hand, and what each changes about the network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from handlerlib.spec import closest
from training.config import Stage, Train
from training.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Phase:
    """One stage in numbers. Steps and epochs count from 0 at the start of the whole training."""

    stage: Stage
    size: tuple[int, int]
    """Height and width of the images."""
    images: int
    """Seen in one epoch."""
    batch_size: int
    batches: int
    """Steps in one epoch. A last batch of one joins the one before."""
    accumulate: int
    """Batches to one update of the weights; the last update of an epoch may have fewer."""
    first_step: int
    first_update: int

    @property
    def steps(self) -> int:
        return self.stage.epochs * self.batches

    @property
    def updates_per_epoch(self) -> int:
        return math.ceil(self.batches / self.accumulate)

    @property
    def updates(self) -> int:
        return self.stage.epochs * self.updates_per_epoch


def plan(train: Train, images: int, size: tuple[int, int]) -> tuple[Phase, ...]:
    """The phases of a training on `images` images with a network for `size` (height, width).

    Without stages it is a single one. Raises RecipeError when a stage wants larger images than the network takes.
    """
    phases: list[Phase] = []
    for number, stage in enumerate(train.stages or (Stage(epochs=train.epochs),), start=1):
        seen = max(1, round(images * stage.part))
        batch_size = stage.batch_size or train.batch_size
        batches = max(1, math.ceil(seen / batch_size) - (seen % batch_size == 1))
        phases.append(
            Phase(
                stage=stage.model_copy(update={"freeze": (*train.freeze, *stage.freeze)}),
                size=_size(stage, size, number),
                images=seen,
                batch_size=batch_size,
                batches=batches,
                accumulate=batches if train.optimizer == "gradient_descent" else train.accumulate,
                first_step=sum(phase.steps for phase in phases),
                first_update=sum(phase.updates for phase in phases),
            )
        )
    return tuple(phases)


def updates_of(phases: tuple[Phase, ...], epochs: float) -> int:
    """Updates of the first so many epochs, which may end within one."""
    updates = 0.0
    for phase in phases:
        here = min(epochs, phase.stage.epochs)
        updates += here * phase.updates_per_epoch
        epochs -= here
    return round(updates)


def check(network: nn.Module, phases: tuple[Phase, ...], channels: int) -> None:
    """Raises RecipeError when the network does not take a stage's images or has no module that a stage freezes.

    The network is left in evaluation mode, otherwise as it was.
    """
    known = [name for name, _ in network.named_modules() if name]
    for number, phase in enumerate(phases, start=1):
        for name in phase.stage.freeze:
            if name not in known:
                raise RecipeError(
                    f"stage {number} freezes '{name}', which the network does not have{closest(name, known)}",
                    remedy=f"its modules are {', '.join(name for name in known if '.' not in name)} and those below",
                )
        if not any(parameter.requires_grad for parameter in trainable(network, phase.stage.freeze)):
            raise RecipeError(f"stage {number} freezes every weight", remedy="leave one module out of freeze")
        try:
            with torch.no_grad():
                device = next(network.parameters()).device
                network.eval()(torch.zeros(1, channels, *phase.size, device=device))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise RecipeError(
                f"the network does not take the {phase.size[1]}x{phase.size[0]} images of stage {number}: {error}",
                remedy="leave image_size out of that stage, or take an architecture for any size, such as resnet9",
            ) from error


def trainable(network: nn.Module, frozen: tuple[str, ...]) -> list[nn.Parameter]:
    """The parameters outside the frozen modules."""
    inside = {id(parameter) for name in frozen for parameter in network.get_submodule(name).parameters()}
    return [parameter for parameter in network.parameters() if id(parameter) not in inside]


def enter(network: nn.Module, frozen: tuple[str, ...]) -> None:
    """Training mode, in which frozen modules keep their weights and their running statistics."""
    network.train()
    network.requires_grad_(True)
    for name in frozen:
        network.get_submodule(name).eval().requires_grad_(False)


def _size(stage: Stage, size: tuple[int, int], number: int) -> tuple[int, int]:
    if stage.image_size is None:
        return size
    height, width = size
    longer = max(size)
    if stage.image_size > longer:
        raise RecipeError(
            f"stage {number} wants images of {stage.image_size} pixels a side, the network takes {width}x{height}",
            remedy="give data.image_size the largest size, and smaller ones to the stages",
        )
    scale = stage.image_size / longer
    return max(1, round(height * scale)), max(1, round(width * scale))
