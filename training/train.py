"""The training loop.

Every random decision comes from (seed, what for, epoch, step) and the position is part of the checkpoint, so that a
run stopped after any step and resumed ends with the same bits as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training import files, learner, schedules, stages, state, validation
from training.augment import Draws, alternating, augment
from training.config import Recipe, Train
from training.data import Dataset
from training.distributed import ALONE, Group, Joined
from training.errors import Interrupted, NumericFailure
from training.evaluate import batch_size
from training.learner import Learner
from training.losses import Loss
from training.machine import choose_device, choose_threads, keep_memory, moved, reproducible
from training.networks import architecture, start_network
from training.progress import Report, Step
from training.schedules import Position
from training.seeds import derive, generator
from training.stages import Phase
from training.state import BEST_SO_FAR, CHECKPOINT, State, Weights

__all__ = [
    "BEST_SO_FAR",
    "CHECKPOINT",
    "HISTORY",
    "Fitted",
    "Judged",
    "Loss",
    "Weights",
    "architecture",
    "choose_device",
    "choose_threads",
    "derive",
    "fit",
    "reproducible",
    "start_network",
]

HISTORY = "history.jsonl"
Judged = Callable[[Sequence[dict[str, float]]], None]
"""Sees the history's lines so far."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What training found. `weights` are those of the best epoch of the last stage, on the CPU."""

    weights: Weights
    best_epoch: int
    history: tuple[dict[str, float], ...]


def fit(
    dataset: Dataset,
    recipe: Recipe,
    folder: Path,
    *,
    report: Report,
    network: nn.Module | None = None,
    loss: Loss | None = None,
    group: Group = ALONE,
    judged: Judged | None = None,
) -> Fitted:
    """Train, or go on from the checkpoint in `folder`, until the epochs are done or nothing improves any more.

    `network` takes the place of the recipe's own, weights included; `loss` that of the cross entropy. `group` are
    the processes that train it together, each of which calls this. `judged` sees the epochs so far after each of
    them and at the start; what it raises ends the training.

    Call it inside `reproducible`. Raises NumericFailure when the loss stops being a number and Interrupted, with a
    checkpoint written, on SIGINT or when `report` raises KeyboardInterrupt.
    """
    keep_memory()
    pupil = learner.start(dataset, recipe, report, network, loss, group)
    now = state.restore(folder, pupil, report, group)
    joined = Joined(pupil.network, group)
    saved_at = time.monotonic()
    if judged is not None:
        judged(now.history)
    with _interrupts(group) as interrupted:
        while now.stage < len(pupil.phases):
            batches = _batches(dataset, pupil.phases[now.stage], recipe.seed, now.epoch)
            while now.step < len(batches):
                _train_step(pupil, joined, dataset, batches, recipe, now, group)
                told = _tell(report, now, recipe.train, pupil.phases)
                late = time.monotonic() - saved_at > 60 * recipe.train.checkpoint_minutes
                stop, due = group.either(told or interrupted.is_set(), late)
                if stop or due:
                    _save(pupil, dataset, batches[now.step - 1], now, folder, group)
                    saved_at = time.monotonic()
                if stop:
                    raise Interrupted(f"stopped in epoch {now.epoch + 1}, step {now.step}; saved in {folder}")
            _end_epoch(pupil, dataset, batches[-1], recipe, now, folder, group)
            if judged is not None:
                judged(now.history)
        if group.leads:
            state.save(now, pupil, folder)
        # Pressed while the last epoch was judged, after which there is no step to ask again.
        (stop,) = group.either(interrupted.is_set())
        if stop:
            raise Interrupted(f"stopped after the last epoch; saved in {folder}")
    if group.leads:
        (folder / BEST_SO_FAR).unlink(missing_ok=True)
    return Fitted(now.best, now.best_epoch, tuple(now.history))


# ------------------------------------------------------------------------------------------------------------ one step


def _train_step(
    pupil: Learner,
    joined: Joined,
    dataset: Dataset,
    batches: Sequence[Tensor],
    recipe: Recipe,
    now: State,
    group: Group,
) -> None:
    """Learn from this process's part of the next batch; update the weights when it is the last of its bundle."""
    phase, rows = pupil.phases[now.stage], batches[now.step]
    part = group.mine(len(rows))
    x_BCHW = dataset.input(rows[part], phase.size, pupil.device)
    mirrored = None
    if recipe.augment.flip == "alternating":
        mirrored = alternating(rows[part], len(dataset.targets_N), recipe.seed, now.epoch)
    drawn = Draws(generator(recipe.seed, "augment", now.epoch, now.step), len(rows), part, mirrored)
    x_BCHW = augment(x_BCHW, recipe.augment, drawn)
    targets_B = moved(dataset.targets_N[rows[part]], pupil.device)
    # Dropout and stochastic depth draw from torch's own generator, in each process other masks.
    torch.manual_seed(derive(recipe.seed, "network", now.epoch, now.step, *([group.rank] if group.rank else [])))
    stages.enter(pupil.network, phase.stage.freeze)
    with pupil.precise():
        loss, logits_BK = pupil.loss(joined.network(phase.stage.freeze), pupil.input(x_BCHW), targets_B)
    correct = validation.right(recipe.task, logits_BK, targets_B)
    value, correct = _over_all(pupil, dataset, rows, float(loss.detach()), correct, group)
    rate = _rate(recipe.train, pupil.phases, now)
    if not math.isfinite(value):
        raise _failure(f"the loss became {value}", dataset, rows, recipe.train, now, now.step + 1, rate)
    first = now.step - now.step % phase.accumulate
    bundle = batches[first : first + phase.accumulate]
    # A part counts by its images (or their classes' weights), so that a bundle's gradient is that of one large batch.
    # Processes take the mean of their gradients, not the sum. Gradients are shared with every batch and not only at a
    # bundle's end: what a checkpoint holds of them is then the same in every process.
    share = pupil.mass(dataset.targets_N, rows[part]) / pupil.mass(dataset.targets_N, torch.cat(list(bundle)))
    pupil.backward(loss * (share * group.size))
    if now.step == first + len(bundle) - 1:
        pupil.update(rate)
    now.add(value, correct, len(rows), rate)


def _over_all(
    pupil: Learner, dataset: Dataset, rows: Tensor, loss: float, correct: int, group: Group
) -> tuple[float, int]:
    """The loss of the whole batch and its right answers, of this process's part of it."""
    if group.size == 1:
        return loss, correct
    mine = rows[group.mine(len(rows))]
    # The mean over no image is not a number.
    total, right = group.totals(loss * pupil.mass(dataset.targets_N, mine) if len(mine) else 0.0, correct)
    return total / pupil.mass(dataset.targets_N, rows), round(right)


def _rate(train: Train, phases: tuple[Phase, ...], now: State) -> float:
    """The learning rate at this position, of the stage's own schedule or of the one over all stages."""
    phase = phases[now.stage]
    update = now.epoch_in_stage * phase.updates_per_epoch + now.step // phase.accumulate
    part = (now.step // phase.accumulate) / phase.updates_per_epoch
    # It belongs to the schedule that the first stage follows.
    warmed = now.stage == 0 or (phase.stage.schedule is None and phases[0].stage.schedule is None)
    warmup = stages.updates_of(phases, train.warmup) if warmed else 0
    judged = [_worth(train, line) for line in now.history[len(now.history) - now.epoch_in_stage :]]
    if phase.stage.schedule is None:
        total = sum(one.updates for one in phases)
        position = Position(phase.first_update + update, total, now.epoch + part, judged)
    else:
        position = Position(update, phase.updates, now.epoch_in_stage + part, judged)
    rate = schedules.learning_rate(train, position, warmup=warmup, schedule=phase.stage.schedule)
    return phase.stage.learning_rate * rate


def _worth(train: Train, record: dict[str, float]) -> float:
    """What the recipe's monitor says of an epoch; more is better."""
    value = record[f"validation_{train.monitor}"]
    return -value if train.monitor == "loss" else value


def _end_epoch(
    pupil: Learner, dataset: Dataset, rows: Tensor, recipe: Recipe, now: State, folder: Path, group: Group
) -> None:
    """Judge the epoch, whose last batch was `rows`, on the validation split; keep its weights when they are the best."""
    record = now.record() | _validate(pupil, dataset, recipe, pupil.phases[now.stage].size, group)
    if recipe.task == "regression":
        del record["train_accuracy"]
    rank = (_worth(recipe.train, record), -record["validation_loss"])
    if not all(map(math.isfinite, rank)):
        what = f"the validation loss became {record['validation_loss']}"
        raise _failure(what, dataset, rows, recipe.train, now, now.step, now.rate)
    now.close_epoch(record, rank, pupil.judged.state_dict())
    if group.leads:
        files.write_text(folder / HISTORY, "".join(json.dumps(line) + "\n" for line in now.history))
        if now.best_epoch == now.epoch:
            files.write_tensors(folder / BEST_SO_FAR, now.best)
    now.close_stage(recipe.train, pupil.phases)


@torch.no_grad()
def _validate(
    pupil: Learner, dataset: Dataset, recipe: Recipe, size: tuple[int, int], group: Group
) -> dict[str, float]:
    network = pupil.judged.eval()
    judged = validation.figures(recipe.task, recipe.train, len(dataset.classes))
    # The split is in an order drawn at random, so its first images are a fair sample of it.
    rows = torch.tensor(dataset.rows["validation"])[: recipe.train.validation_images or None]
    rows = rows[group.mine(len(rows))]
    for part in torch.split(rows, batch_size(*size)):
        x_BCHW = dataset.input(part, size, pupil.device)
        with pupil.precise():
            logits_BK = network(pupil.input(x_BCHW)).float()
        judged.add(logits_BK, moved(dataset.targets_N[part], pupil.device))
    return judged.record(group)


def _save(pupil: Learner, dataset: Dataset, rows: Tensor, now: State, folder: Path, group: Group) -> None:
    """Write a checkpoint. Raises NumericFailure instead when the weights are spoilt: the one before stays."""
    if not pupil.finite():
        raise _failure("a weight became infinite or NaN", dataset, rows, pupil.train, now, now.step, now.rate)
    if group.leads:
        state.save(now, pupil, folder)


def _failure(
    what: str, dataset: Dataset, rows: Tensor, train: Train, now: State, step: int, rate: float
) -> NumericFailure:
    return NumericFailure(
        what=what,
        epoch=now.epoch + 1,
        step=step,
        learning_rate=rate,
        images=[dataset.images[row].entry.name for row in rows.tolist()],
        kept=now.what_is_kept(),
        recipe_rate=train.learning_rate,
        clipped=train.clip > 0,
    )


def _tell(report: Report, now: State, train: Train, phases: tuple[Phase, ...]) -> bool:
    """Report the position; true when the one who listens wants to stop."""
    note = f"epoch {now.epoch + 1}/{train.epochs}  loss {now.loss_sum / now.seen:.3f}"
    phase = phases[now.stage]
    if train.stages:
        height, width = phase.size
        note = f"stage {now.stage + 1}/{len(phases)} ({width}x{height})  {note}"
    if now.history:
        last = now.history[-1]
        note += f"  validation {train.monitor.replace('_', ' ')} {last[f'validation_{train.monitor}']:.4f}"
    try:
        done = phase.first_step + now.epoch_in_stage * phase.batches + now.step
        report(Step("train", done, sum(one.steps for one in phases), note))
    except KeyboardInterrupt:
        return True
    return False


def _batches(dataset: Dataset, phase: Phase, seed: int, epoch: int) -> list[Tensor]:
    """The epoch's rows in batches. A last batch of one joins the one before: batch norm cannot learn from one image."""
    rows = torch.tensor(dataset.rows["train"])
    shuffled = rows[torch.randperm(len(rows), generator=generator(seed, "order", epoch))]
    parts = list(torch.split(shuffled[: phase.images], phase.batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


@contextlib.contextmanager
def _interrupts(group: Group) -> Iterator[threading.Event]:
    """The event is set by the first Ctrl-C; a second one raises KeyboardInterrupt at once.

    In a group, torchrun passes the terminal's signals on, more than once and also as SIGTERM: none of them raises, so
    that all processes stop after the same step.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def note(number: int, frame: types.FrameType | None) -> None:
        if pressed.is_set() and group.size == 1:
            raise KeyboardInterrupt
        pressed.set()

    wanted = (signal.SIGINT,) if group.size == 1 else (signal.SIGINT, signal.SIGTERM)
    before = [(number, signal.signal(number, note)) for number in wanted]
    try:
        yield pressed
    finally:
        for number, handler in before:
            signal.signal(number, handler)
