"""A run that was stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from training import pipeline
from training.config import Recipe
from training.errors import Interrupted, RunBusy
from training.pipeline import Trained
from training.progress import Report, Step, silent
from training.train import CHECKPOINT

ROOT = Path(__file__).resolve().parents[3]

WriteTree = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]
RunRecipe = Callable[..., Trained]


def stop_at(*steps: int) -> Report:
    """Presses Ctrl-C, so to speak, when these training steps are reported."""
    left = list(steps)

    def report(step: Step) -> None:
        if step.phase == "train" and step.total and left and step.done == left[0]:
            left.pop(0)
            raise KeyboardInterrupt

    return report


@pytest.fixture
def recipe(tree: WriteTree, folder_recipe: MakeRecipe) -> Recipe:
    """Batch norm, dropout, momentum and augmentation all carry state or draw at random."""
    return folder_recipe(
        tree(zero=14, one=14, two=14),
        "model.architecture=resnet9",
        "model.dropout=0.2",
        "train.epochs=3",
        "train.batch_size=8",
        "augment.cutout=0.3",
        "train.optimizer=sgd",
        "train.learning_rate=0.02",
        "serve.tolerance=1e-5",
    )


@pytest.fixture
def run(tmp_path: Path) -> RunRecipe:
    def start(recipe: Recipe, place: str = "a", report: Report = silent, again: bool = False) -> Trained:
        folder = tmp_path / place
        return pipeline.train(recipe, runs=folder / "runs", artifacts=folder / "artifacts", report=report, again=again)

    return start


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_stopped_three_times_and_resumed_equals_uninterrupted(recipe: Recipe, run: RunRecipe) -> None:
    whole = run(recipe, "whole")
    # In the middle of an epoch, at the last step of one, and in the last epoch.
    report = stop_at(2, 4, 10)
    for _ in range(3):
        with pytest.raises(Interrupted, match="saved in") as caught:
            run(recipe, "parts", report)
        assert caught.value.exit_code == 130
        assert "same command" in caught.value.remedy
    resumed = run(recipe, "parts", report)
    assert resumed.run.name == whole.run.name
    assert not resumed.reused
    assert files(resumed.artifact) == files(whole.artifact)
    assert resumed.metrics == whole.metrics
    assert not (resumed.run / CHECKPOINT).exists()


def test_resuming_does_not_train_done_steps_again(recipe: Recipe, run: RunRecipe) -> None:
    with pytest.raises(Interrupted):
        run(recipe, report=stop_at(5))
    seen: list[Step] = []
    run(recipe, report=seen.append)
    counted = [step.done for step in seen if step.phase == "train" and step.total]
    assert counted[0] == 6
    assert any("resuming in epoch" in step.note for step in seen)


def test_a_damaged_checkpoint_means_starting_anew_and_is_said(recipe: Recipe, run: RunRecipe) -> None:
    whole = run(recipe, "whole")
    with pytest.raises(Interrupted):
        run(recipe, "parts", stop_at(5))
    (checkpoint,) = (whole.run.parents[2] / "parts").rglob(CHECKPOINT)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    seen: list[Step] = []
    again = run(recipe, "parts", seen.append)
    assert any("damaged" in step.note for step in seen)
    assert files(again.artifact) == files(whole.artifact)


def test_interrupted_while_reading(recipe: Recipe, run: RunRecipe) -> None:
    def report(step: Step) -> None:
        if step.phase == "read":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(recipe, report=report)


def test_interrupted_while_evaluating_goes_on_after_training(recipe: Recipe, run: RunRecipe) -> None:
    def stop(step: Step) -> None:
        if step.phase == "evaluate":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(recipe, report=stop)
    seen: list[Step] = []
    run(recipe, report=seen.append)
    assert not [step for step in seen if step.phase == "train" and step.total]


SCRIPT = """
import sys
from pathlib import Path
from training import pipeline
from training.config import parse
from training.errors import Interrupted
import json

recipe = parse(json.loads(sys.argv[1]), where="argument")
def report(step):
    if step.phase == "train" and step.total:
        print(step.done, flush=True)
try:
    pipeline.train(recipe, runs=Path("runs"), artifacts=Path("artifacts"), report=report)
except Interrupted as error:
    sys.exit(error.exit_code)
"""


def start_process(recipe: Recipe, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'handlers'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", SCRIPT, recipe.model_dump_json()]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def saving_always(recipe: Recipe) -> Recipe:
    """The same run, with a checkpoint after every step."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"checkpoint_minutes": 1e-9})})


def test_a_real_ctrl_c_saves_and_the_same_command_ends_as_if_nothing_had_happened(
    recipe: Recipe, run: RunRecipe, tmp_path: Path
) -> None:
    whole = run(recipe, "whole")
    folder = tmp_path / "process"
    process = start_process(recipe, folder)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(folder.rglob(CHECKPOINT))
    resumed = run(recipe, "process")
    assert files(resumed.artifact) == files(whole.artifact)


def test_killed_without_warning_the_run_can_be_started_again(recipe: Recipe, run: RunRecipe, tmp_path: Path) -> None:
    whole = run(recipe, "whole")
    folder = tmp_path / "process"
    # A checkpoint after every step: the kill falls between writes or into one.
    process = start_process(saving_always(recipe), folder)
    assert process.stdout is not None
    assert process.stdout.readline()
    assert process.stdout.readline()
    process.kill()
    process.communicate(timeout=60)
    resumed = run(recipe, "process")
    assert files(resumed.artifact) == files(whole.artifact)


def test_two_processes_do_not_train_the_same_run(recipe: Recipe, run: RunRecipe) -> None:
    refused: list[str] = []

    def report(step: Step) -> None:
        if step.phase == "train" and step.done == 1 and not refused:
            with pytest.raises(RunBusy, match="another process is at work in") as caught:
                run(recipe)
            refused.append(str(caught.value))

    run(recipe, report=report)
    assert refused


def test_a_checkpoint_is_written_by_the_clock(recipe: Recipe, run: RunRecipe, tmp_path: Path) -> None:
    found: list[bool] = []

    def report(step: Step) -> None:
        if step.phase == "train" and step.done > 1:
            found.append(bool(list((tmp_path / "a").rglob(CHECKPOINT))))

    run(saving_always(recipe), report=report)
    assert found
    assert all(found)
