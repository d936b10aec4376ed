"""Where training stands, in memory and on disk.

`State` and the parts of a `Learner` are the whole checkpoint: a training that is put back into them goes on with the
same bits.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import files
from training.config import Train
from training.distributed import ALONE, Group
from training.learner import Learner
from training.progress import Report, Step
from training.stages import Phase

CHECKPOINT = "checkpoint.pt"
BEST_SO_FAR = "best_so_far.pt"
Weights = dict[str, Tensor]

_NOT_SAVED = ("began",)


@dataclass(slots=True)
class State:
    """The position, the epoch so far, and the best epoch."""

    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Steps done in the current epoch."""
    stage: int = 0
    """Stages done."""
    epoch_in_stage: int = 0
    """Epochs done in the current stage."""
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    rate: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best: Weights = field(default_factory=dict)
    best_epoch: int = 0
    best_rank: list[float] = field(default_factory=list)
    saved: str = ""
    """Where the last checkpoint stands, for people."""
    began: float = field(default_factory=time.monotonic)

    def add(self, loss: float, correct: int, images: int, rate: float) -> None:
        """Count one step."""
        self.loss_sum += loss * images
        self.correct += correct
        self.seen += images
        self.rate = rate
        self.step += 1

    def record(self) -> dict[str, float]:
        """The epoch's line of the history."""
        return {
            "epoch": self.epoch + 1,
            "learning_rate": self.rate,
            "train_loss": self.loss_sum / self.seen,
            "train_accuracy": self.correct / self.seen,
            "seconds": round(self.seconds + time.monotonic() - self.began, 3),
        }

    def close_epoch(self, record: dict[str, float], rank: tuple[float, float], weights: Weights) -> None:
        """Add the epoch to the history; `weights` are kept when its `rank` is the highest of the stage."""
        if self.epoch_in_stage == 0:
            # Another stage is another measure, of other images: its first epoch starts the comparison anew.
            self.best_rank = []
        self.history.append(record)
        self.epoch += 1
        self.epoch_in_stage += 1
        self.step, self.loss_sum, self.correct, self.seen, self.seconds = 0, 0.0, 0, 0, 0.0
        self.began = time.monotonic()
        if list(rank) > self.best_rank:
            self.best_rank, self.best_epoch = list(rank), self.epoch
            self.best = {key: value.detach().cpu().clone() for key, value in weights.items()}

    def close_stage(self, train: Train, phases: tuple[Phase, ...]) -> None:
        """Go on to the next stage when this one is done or nothing improves any more."""
        patience = train.early_stopping
        enough = bool(patience and self.epoch - self.best_epoch >= patience)
        if enough or self.epoch_in_stage >= phases[self.stage].stage.epochs:
            self.stage += 1
            self.epoch_in_stage = 0

    def what_is_kept(self) -> str:
        kept = [f"the weights of epoch {self.best_epoch} are kept in {BEST_SO_FAR}"] if self.best else []
        kept += [f"the checkpoint of {self.saved} is kept in {CHECKPOINT}"] if self.saved else []
        return ", ".join(kept) or "no epoch was done"


def save(state: State, learner: Learner, folder: Path) -> None:
    """Write the checkpoint. It appears whole or not at all."""
    now = time.monotonic()
    state.seconds, state.began = state.seconds + now - state.began, now
    state.saved = f"epoch {state.epoch + 1}, step {state.step}"
    values = {one.name: getattr(state, one.name) for one in dataclasses.fields(state) if one.name not in _NOT_SAVED}
    content = {"state": values, "learner": learner.state_dict()}
    files.write_tensors(folder / CHECKPOINT, content)


def restore(folder: Path, learner: Learner, report: Report, group: Group = ALONE) -> State:
    """The state of the checkpoint in `folder`, with the learner put back to it; a new one when there is none.

    A damaged checkpoint is named in the report and counts as none: training anew is always right. In a group the
    first process reads for all, so that they start from the same position.
    """
    content = group.first_does(lambda: _read(folder / CHECKPOINT, report))
    if content is None:
        return State()
    learner.load_state_dict(content["learner"])
    state = State(**content["state"])
    report(Step("train", 0, 0, f"resuming in epoch {state.epoch + 1} after step {state.step}"))
    return state


def _read(path: Path, report: Report) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a torn or foreign file raises anything
        report(Step("train", 0, 0, f"{path} is damaged ({type(error).__name__}): starting from the beginning"))
        return None
    return content
