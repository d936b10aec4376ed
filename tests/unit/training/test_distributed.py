"""Several processes: how batches are divided, the same losses as one process, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from handlerlib.errors import MarinaError
from handlerlib.spec import WEIGHTS_FILE
from support import commands
from training import distributed_launch, pipeline
from training.augment import Draws, augment
from training.config import Augment, Recipe, load_recipe
from training.distributed import ALONE, Group
from training.errors import Interrupted, ProcessDied, RecipeError
from training.pipeline import Trained
from training.progress import Report, Step, silent
from training.seeds import generator
from training.train import HISTORY

pytestmark = pytest.mark.timeout(600)

# Batch norm, class weights, moving average, accumulation, penalties, augmentation, and batches that do not divide evenly:
# 136 images train, in 5 batches of 25 and one of 11, in three bundles of two.
SETTINGS = (
    *("data.max_images=200", "data.image_size=8", "train.device=cpu", "train.threads=1", "train.epochs=2"),
    *("model.architecture=resnet9", "model.dropout=0", "train.batch_size=25", "train.accumulate=2", "train.ema=0.5"),
    *("train.class_weights={3=3.0}", "train.clip=1", "train.l2=1e-4", "augment.cutout=0.2", "augment.contrast=0.1"),
    *("train.optimizer=sgd", "train.learning_rate=0.1", "train.schedule=constant", "train.checkpoint_minutes=1e-9"),
)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("digits", SETTINGS)


Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """In two processes, unless told otherwise."""

    def start(
        recipe: Recipe, report: Report = silent, processes: int = 2, restarts: int = 0, folder: Path | None = None
    ) -> Trained:
        folder = folder or tmp_path_factory.mktemp("home")
        places = {"runs": folder / "runs", "artifacts": folder / "artifacts"}
        if processes == 1:
            return pipeline.train(recipe, report=report, **places)
        return distributed_launch.train(recipe, report=report, processes=processes, restarts=restarts, **places)

    return start


@pytest.fixture(scope="module")
def two(recipe: Recipe, train: Train) -> Trained:
    return train(recipe)


def history(trained: Trained) -> list[dict[str, float]]:
    return [json.loads(line) for line in (trained.run / HISTORY).read_text().splitlines()]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 48])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_parts_make_the_whole_and_differ_by_one_at_most(count: int, size: int) -> None:
    parts = [range(count)[Group(rank, size).mine(count)] for rank in range(size)]
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_part_is_augmented_as_it_would_be_in_the_whole_batch() -> None:
    settings = Augment(shift=0.2, flip=True, rotation=20, scale=0.2, contrast=0.2, brightness=0.3, cutout=0.3)
    x_BCHW = torch.rand(7, 3, 9, 8, generator=generator(1))
    whole = augment(x_BCHW, settings, generator(2))
    for rank in range(3):
        part = Group(rank, 3).mine(7)
        alone = augment(x_BCHW[part], settings, Draws(generator(2), 7, part))
        torch.testing.assert_close(alone, whole[part], rtol=0, atol=0)


def test_one_process_agrees_with_itself() -> None:
    assert ALONE.totals(0.1, 3) == (0.1, 3)
    assert ALONE.either(True, False) == (True, False)
    assert ALONE.collect([3, 1]) == [3, 1]
    assert ALONE.first_does(lambda: 5) == 5
    assert ALONE.leads


def test_two_processes_give_the_losses_of_one(recipe: Recipe, two: Trained, train: Train) -> None:
    one = train(recipe, processes=1)
    assert one.run.name != two.run.name
    for mine, theirs in zip(history(one), history(two), strict=True):
        for key in ("train_loss", "validation_loss", "learning_rate"):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-3), key
        assert theirs["train_accuracy"] == pytest.approx(mine["train_accuracy"], abs=0.01)
        assert theirs["validation_accuracy"] == pytest.approx(mine["validation_accuracy"], abs=0.03)
    # That is far closer than an epoch of training moves it.
    first, second = (line["train_loss"] for line in history(one))
    assert second < 0.95 * first


def test_stopped_once_and_with_a_process_killed_later_it_ends_with_the_same_bits(
    recipe: Recipe, two: Trained, train: Train, tmp_path: Path
) -> None:
    def press(step: Step) -> None:
        if step.phase == "train" and step.total and step.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="stopped in epoch 1, step"):
        train(recipe, press, folder=tmp_path)
    killed: list[int] = []
    seen: list[Step] = []

    def report(step: Step) -> None:
        seen.append(step)
        if step.phase == "train" and step.total and step.done == 8 and not killed:
            victims = [
                process.pid
                for process in psutil.Process().children(recursive=True)
                if process.environ().get("RANK") == "1"
            ]
            os.kill(victims[0], signal.SIGKILL)
            killed.append(victims[0])

    trained = train(recipe, report, restarts=2, folder=tmp_path)
    assert len(killed) == 1
    assert sum("resuming in epoch" in step.note for step in seen) == 2
    counted = [step.done for step in seen if step.phase == "train" and step.total]
    assert counted[0] > 3
    assert counted[-1] == 12
    assert (trained.artifact / WEIGHTS_FILE).read_bytes() == (two.artifact / WEIGHTS_FILE).read_bytes()
    for mine, theirs in zip(history(two), history(trained), strict=True):
        assert mine | {"seconds": 0} == theirs | {"seconds": 0}


def test_killed_without_a_word_it_leaves_its_checkpoint_and_no_process(tmp_path: Path) -> None:
    home = commands.project(tmp_path / "home")
    words = ["train", "digits", "--processes", "2", "--json"]
    words += [word for setting in (*SETTINGS, "train.epochs=1000") for word in ("--set", setting)]
    command = [sys.executable, "-m", "marina", *words]
    temp = tmp_path / "temp"
    temp.mkdir()
    environment = commands.environment(home, TMPDIR=str(temp))
    process = subprocess.Popen(
        command, cwd=home, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        commands.wait_for(lambda: bool(list(home.glob("runs/*/checkpoint.pt"))), process)
        started = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.communicate()
    assert len(started) >= 3, "torchrun and its two"
    _, alive = psutil.wait_procs(started, timeout=120)
    for one in alive:
        one.kill()
    assert not alive
    assert list(home.glob("runs/*/checkpoint.pt"))
    told = [json.loads(path.read_text()) for path in temp.glob("marina-*/outcome-*.json")]
    assert told, "they stopped of their own accord, and did not die of a pipe that nobody reads"
    assert all("stopped" in one["error"] for one in told)


def test_processes_that_keep_dying_end_the_training_with_their_last_words(recipe: Recipe, train: Train) -> None:
    def report(step: Step) -> None:
        if step.phase == "train" and step.total and step.done == 2:
            for process in psutil.Process().children(recursive=True):
                if process.environ().get("RANK") == "1":
                    process.kill()

    with pytest.raises(ProcessDied, match="was not to be started again") as caught:
        train(recipe, report)
    assert "SIGKILL" in caught.value.log_tail


def test_an_error_of_the_recipe_is_told_once_and_not_tried_again(recipe: Recipe, train: Train) -> None:
    wild = recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": 1e20})})
    with pytest.raises(MarinaError, match=r"the loss became .* in epoch 1, step \d+ \(learning rate") as caught:
        train(wild, restarts=2)
    assert type(caught.value).__name__ == "NumericFailure"
    assert caught.value.exit_code == 3
    assert "--set train.learning_rate=" in caught.value.remedy


def test_numbers_of_processes_that_make_no_sense(recipe: Recipe, train: Train) -> None:
    with pytest.raises(RecipeError, match="0 processes"):
        train(recipe, processes=0)
