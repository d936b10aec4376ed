"""Ctrl-C while the last epoch is judged stops the run, which then goes on after the training."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from training import data
from training.config import Recipe
from training.errors import Interrupted
from training.progress import Step, silent
from training.train import CHECKPOINT, fit, reproducible

WriteTree = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]


def test_interrupted_while_the_last_epoch_is_judged(tmp_path: Path, tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    recipe = folder_recipe(tree(zero=9, one=9))
    dataset = data.prepare(
        data.survey(recipe, threads=1, report=silent), recipe, threads=1, report=silent
    )  # fmt: skip

    def press(history: Sequence[dict[str, float]]) -> None:
        if len(history) == recipe.train.epochs:
            os.kill(os.getpid(), signal.SIGINT)

    with reproducible(1):
        with pytest.raises(Interrupted, match="after the last epoch; saved in"):
            fit(dataset, recipe, tmp_path, report=silent, judged=press)
        assert (tmp_path / CHECKPOINT).exists()
        seen: list[Step] = []
        fitted = fit(dataset, recipe, tmp_path, report=seen.append)
    assert len(fitted.history) == recipe.train.epochs and fitted.weights
    assert not [step for step in seen if step.total]
