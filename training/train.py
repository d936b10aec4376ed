"""The training loop.

Every random decision comes from (seed, what for, epoch, step) and the position is part of the checkpoint, so that a
run stopped after any step and resumed ends with the same bits as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import threading
import time
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import f1_score
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from handlerlib import architectures, imaging
from handlerlib.errors import SpecError
from handlerlib.spec import Architecture
from training import files
from training.augment import augment
from training.config import Model, Recipe, Train
from training.data import Dataset
from training.errors import Interrupted, NumericFailure, RecipeError
from training.progress import Report, Step

CHECKPOINT = "checkpoint.pt"
HISTORY = "history.jsonl"
BEST_SO_FAR = "best_so_far.pt"

_EVALUATION_BATCH = 256
Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Fitted:
    """What training found. `weights` are those of the best epoch, on the CPU."""

    weights: Weights
    best_epoch: int
    history: tuple[dict[str, float], ...]


def fit(dataset: Dataset, recipe: Recipe, folder: Path, *, report: Report) -> Fitted:
    """Train, or go on from the checkpoint in `folder`, until the epochs are done or nothing improves any more.

    Call it inside `reproducible`. Raises NumericFailure when the loss stops being a number and Interrupted, with a
    checkpoint written, on SIGINT or when `report` raises KeyboardInterrupt.
    """
    device = choose_device(recipe.train)
    network = start_network(architecture(dataset, recipe), recipe.model, recipe.seed, report=report).to(device)
    optimizer = _optimizer(network, recipe.train)
    state = _State()
    checkpoint = _read_checkpoint(folder / CHECKPOINT, report)
    if checkpoint is not None:
        state = _restore(checkpoint, network, optimizer)
        report(Step("train", 0, 0, f"resuming in epoch {state.epoch + 1} after step {state.step}"))
    batches = _batch_count(len(dataset.rows["train"]), recipe.train.batch_size)
    saved_at = time.monotonic()
    with _interrupts() as interrupted:
        while not state.finished(recipe.train):
            for rows in _batches(dataset, recipe, state.epoch)[state.step :]:
                _train_step(network, optimizer, dataset, rows, recipe, state, batches)
                stop = _tell(report, state, recipe.train, batches) or interrupted.is_set()
                if stop or time.monotonic() - saved_at > 60 * recipe.train.checkpoint_minutes:
                    state.save(folder, network, optimizer)
                    saved_at = time.monotonic()
                if stop:
                    raise Interrupted(f"stopped in epoch {state.epoch + 1}, step {state.step}; saved in {folder}")
            _end_epoch(network, dataset, recipe, state, folder)
        state.save(folder, network, optimizer)
    (folder / BEST_SO_FAR).unlink(missing_ok=True)
    return Fitted(state.best, state.best_epoch, tuple(state.history))


def architecture(dataset: Dataset, recipe: Recipe) -> Architecture:
    """The recipe's network for this data's channels, size and classes."""
    shape = dataset.preprocess
    return Architecture(
        name=recipe.model.architecture,
        channels=shape.channels,
        height=shape.height,
        width=shape.width,
        classes=len(dataset.classes),
        dropout=recipe.model.dropout,
    )


def start_network(shape: Architecture, model: Model, seed: int, *, report: Report) -> nn.Module:
    """A network with seeded random weights, or torchvision's where wanted. Raises RecipeError when it cannot be had."""
    torch.manual_seed(derive(seed, "weights"))
    try:
        network = architectures.build(shape)
    except SpecError as error:
        raise RecipeError(str(error), remedy="change model.architecture, data.image_size or model.dropout") from error
    if model.pretrained:
        taken, total = _take_pretrained(network, shape.name)
        report(Step("train", 0, 0, f"{taken} of {total} tensors start from torchvision's pretrained {shape.name}"))
    return network


def choose_device(train: Train) -> torch.device:
    """Raises RecipeError when the recipe insists on a GPU that is not there."""
    if train.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("train.device is cuda, but torch sees no GPU", remedy="--set train.device=auto")
    return torch.device("cuda" if train.device != "cpu" and torch.cuda.is_available() else "cpu")


def choose_threads(train: Train) -> int:
    return train.threads or len(os.sched_getaffinity(0))


@contextlib.contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Deterministic algorithms, a fixed number of threads and private random state; all as before afterwards."""
    # Read when CUDA starts; without it cuBLAS may sum in another order each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads_before = torch.get_num_threads()
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # Some GPU kernels have no deterministic form; we take what there is.
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic_before)
        torch.set_num_threads(threads_before)


def learning_rate(train: Train, step: int, total: int) -> float:
    """The rate of step 0 .. total - 1. A function of the position alone, so there is no schedule to save."""
    if train.schedule == "constant":
        return train.learning_rate
    if train.schedule == "cosine":
        return train.learning_rate * _half_cosine(step / total)
    # One cycle (Smith & Topin, 2018): 30 % of the steps up from 1/25 of the peak, then down to 1/10,000 of that.
    peak, start = train.learning_rate, train.learning_rate / 25
    rise = 0.3 * total
    if step < rise:
        return peak + (start - peak) * _half_cosine(step / rise)
    end = start / 10_000
    return end + (peak - end) * _half_cosine((step - rise) / max(total - 1 - rise, 1))


def derive(seed: int, *position: object) -> int:
    """An independent seed for one purpose and position."""
    digest = hashlib.sha256(repr((seed, *position)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# ------------------------------------------------------------------------------------------------------------ one step


def _train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    rows: Tensor,
    recipe: Recipe,
    state: _State,
    batches: int,
) -> None:
    device = next(network.parameters()).device
    rate = learning_rate(recipe.train, state.epoch * batches + state.step, recipe.train.epochs * batches)
    for group in optimizer.param_groups:
        group["lr"] = rate
    x_BCHW = imaging.normalise(dataset.x_NCHW[rows].to(device), dataset.preprocess)
    x_BCHW = augment(x_BCHW, recipe.augment, _generator(recipe.seed, "augment", state.epoch, state.step))
    targets_B = dataset.targets_N[rows].to(device)
    # Dropout and stochastic depth draw from torch's own generator.
    torch.manual_seed(derive(recipe.seed, "network", state.epoch, state.step))
    logits_BK = network.train()(x_BCHW)
    loss = F.cross_entropy(logits_BK, targets_B, label_smoothing=recipe.train.label_smoothing)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericFailure(
            epoch=state.epoch + 1, step=state.step + 1, learning_rate=rate, loss=value, kept=state.what_is_kept()
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    state.add(value, int((logits_BK.argmax(dim=1) == targets_B).sum()), len(rows), rate)


def _end_epoch(network: nn.Module, dataset: Dataset, recipe: Recipe, state: _State, folder: Path) -> None:
    """Judge the epoch on the validation split; keep its weights when they are the best so far."""
    record = state.record() | _validate(network, dataset)
    value = record[f"validation_{recipe.train.monitor}"]
    rank = (-value if recipe.train.monitor == "loss" else value, -record["validation_loss"])
    if not all(map(math.isfinite, rank)):
        raise NumericFailure(
            epoch=state.epoch + 1,
            step=state.step,
            learning_rate=record["learning_rate"],
            loss=record["validation_loss"],
            kept=state.what_is_kept(),
        )
    state.close_epoch(record, rank, network)
    files.write_text(folder / HISTORY, "".join(json.dumps(line) + "\n" for line in state.history))
    if state.best_epoch == state.epoch:
        files.write(folder / BEST_SO_FAR, lambda path: torch.save(state.best, path))


@torch.no_grad()
def _validate(network: nn.Module, dataset: Dataset) -> dict[str, float]:
    device = next(network.parameters()).device
    network.eval()
    loss = 0.0
    predicted: list[int] = []
    rows = torch.tensor(dataset.rows["validation"])
    for part in torch.split(rows, _EVALUATION_BATCH):
        logits_BK = network(imaging.normalise(dataset.x_NCHW[part].to(device), dataset.preprocess))
        loss += float(F.cross_entropy(logits_BK, dataset.targets_N[part].to(device), reduction="sum"))
        predicted += logits_BK.argmax(dim=1).tolist()
    true = dataset.targets_N[rows].tolist()
    right = sum(guess == truth for guess, truth in zip(predicted, true, strict=True))
    return {
        "validation_loss": loss / len(true),
        "validation_accuracy": right / len(true),
        "validation_macro_f1": float(f1_score(true, predicted, average="macro", zero_division=0)),
    }


def _tell(report: Report, state: _State, train: Train, batches: int) -> bool:
    """Report the position; true when the one who listens wants to stop."""
    note = f"epoch {state.epoch + 1}/{train.epochs}  loss {state.loss_sum / state.seen:.3f}"
    if state.history:
        last = state.history[-1]
        note += f"  validation {train.monitor.replace('_', ' ')} {last[f'validation_{train.monitor}']:.4f}"
    try:
        report(Step("train", state.epoch * batches + state.step, train.epochs * batches, note))
    except KeyboardInterrupt:
        return True
    return False


# ------------------------------------------------------------------------------------------------- order and optimiser


def _batches(dataset: Dataset, recipe: Recipe, epoch: int) -> list[Tensor]:
    """The epoch's rows in batches. A last batch of one joins the one before: batch norm cannot learn from one image."""
    rows = torch.tensor(dataset.rows["train"])
    shuffled = rows[torch.randperm(len(rows), generator=_generator(recipe.seed, "order", epoch))]
    parts = list(torch.split(shuffled, recipe.train.batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _batch_count(images: int, batch_size: int) -> int:
    return max(1, math.ceil(images / batch_size) - (images % batch_size == 1))


def _generator(seed: int, *position: object) -> Generator:
    return Generator().manual_seed(derive(seed, *position))


def _optimizer(network: nn.Module, train: Train) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.learning_rate)
    return torch.optim.SGD(groups, lr=train.learning_rate, momentum=train.momentum, nesterov=train.momentum > 0)


def _half_cosine(position: float) -> float:
    """1 at 0, falling to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * min(position, 1.0)))


def _take_pretrained(network: nn.Module, name: str) -> tuple[int, int]:
    """Copy torchvision's DEFAULT weights where name and shape match; how many of how many tensors."""
    import torchvision

    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError) as error:
        raise RecipeError(
            f"there are no pretrained weights for '{name}'", remedy="--set model.pretrained=false"
        ) from error
    try:
        given = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise RecipeError(
            f"the pretrained weights of '{name}' cannot be fetched from {weights.url}: {error}",
            remedy="connect to the internet, or --set model.pretrained=false",
        ) from error
    own = network.state_dict()
    fitting = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
    network.load_state_dict(fitting, strict=False)
    return len(fitting), len(own)


# ------------------------------------------------------------------------------------------------------ state on disk


@dataclass(slots=True)
class _State:
    """Where training stands; with weights and optimiser it is the whole checkpoint."""

    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Steps done in the current epoch."""
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    rate: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best: Weights = field(default_factory=dict)
    best_epoch: int = 0
    best_rank: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def add(self, loss: float, correct: int, images: int, rate: float) -> None:
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

    def close_epoch(self, record: dict[str, float], rank: tuple[float, float], network: nn.Module) -> None:
        self.history.append(record)
        self.epoch += 1
        self.step, self.loss_sum, self.correct, self.seen, self.seconds = 0, 0.0, 0, 0, 0.0
        self.began = time.monotonic()
        if list(rank) > self.best_rank:
            self.best_rank, self.best_epoch = list(rank), self.epoch
            self.best = {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}

    def finished(self, train: Train) -> bool:
        patience = train.early_stopping
        return self.epoch >= train.epochs or bool(patience and self.epoch - self.best_epoch >= patience)

    def what_is_kept(self) -> str:
        return f"the weights of epoch {self.best_epoch} are kept in {BEST_SO_FAR}" if self.best else "no epoch was done"

    def save(self, folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        now = time.monotonic()
        self.seconds, self.began = self.seconds + now - self.began, now
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "began"}
        content = {"state": values, "network": network.state_dict(), "optimizer": optimizer.state_dict()}
        files.write(folder / CHECKPOINT, lambda path: torch.save(content, path))


def _read_checkpoint(path: Path, report: Report) -> dict[str, Any] | None:
    """None when there is none, or when it is damaged: training anew is always right."""
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a torn or foreign file raises anything
        report(Step("train", 0, 0, f"{path} is damaged ({type(error).__name__}): starting from the beginning"))
        return None
    return content


def _restore(content: dict[str, Any], network: nn.Module, optimizer: torch.optim.Optimizer) -> _State:
    network.load_state_dict(content["network"])
    optimizer.load_state_dict(content["optimizer"])
    return _State(**content["state"])


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """The event is set by the first Ctrl-C; a second one raises KeyboardInterrupt at once."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def note(number: int, frame: types.FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
