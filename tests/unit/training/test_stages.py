"""Training in stages: sizes, parts, rates and frozen layers; resuming in any of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training import data, stages
from training.config import Recipe, load_recipe
from training.data import Dataset
from training.errors import Interrupted, RecipeError
from training.progress import Report, Step, silent
from training.train import HISTORY, Fitted, fit, reproducible

# Batch norm, dropout and momentum in a network that takes images of any size.
BASE = (
    *("model.architecture=mobilenet_v3_small", "model.dropout=0.2", "data.max_images=120", "data.image_size=16"),
    *("train.batch_size=16", "train.device=cpu", "train.threads=1", "train.optimizer=sgd", "train.learning_rate=0.02"),
)
STAGES = (
    "{epochs=1, image_size=8, freeze=['classifier']}",
    "{epochs=2, image_size=12, part=0.5, batch_size=8, learning_rate=0.5}",
    "{epochs=1, part=0.3, schedule='constant', freeze=['features.0', 'features.1']}",
)
# 86 images train: in 6 batches of 16 at most, then 43 in 6 of 8, twice, then 26 in 2.
STEPS = 6 + 2 * 6 + 2


def recipe_of(*overrides: str, staged: tuple[str, ...] = STAGES) -> Recipe:
    return load_recipe("digits", [*BASE, f"train.stages=[{', '.join(staged)}]", *overrides])


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    recipe = recipe_of()
    return data.prepare(data.survey(recipe, threads=1, report=silent), recipe, threads=1, report=silent)


Run = Callable[..., Fitted]


@pytest.fixture
def run(dataset: Dataset, tmp_path: Path) -> Run:
    def train(recipe: Recipe, place: str = "a", report: Report = silent, network: nn.Module | None = None) -> Fitted:
        (tmp_path / place).mkdir(exist_ok=True)
        with reproducible(1):
            return fit(dataset, recipe, tmp_path / place, report=report, network=network)

    return train


def stopping_at(done: list[int]) -> Report:
    def report(step: Step) -> None:
        if step.total and done and step.done == done[0]:
            done.pop(0)
            raise KeyboardInterrupt

    return report


def test_stages_run_one_after_the_other_and_are_told(dataset: Dataset, run: Run, tmp_path: Path) -> None:
    seen: list[Step] = []
    fitted = run(recipe_of(), report=seen.append)
    assert len(dataset.rows["train"]) == 86
    assert [step.done for step in seen] == list(range(1, STEPS + 1))
    assert {step.total for step in seen} == {STEPS}
    assert [step.note.split("  ")[0] for step in seen] == [
        *["stage 1/3 (8x8)"] * 6,
        *["stage 2/3 (12x12)"] * 12,
        *["stage 3/3 (16x16)"] * 2,
    ]
    lines = [json.loads(line) for line in (tmp_path / "a" / HISTORY).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["learning_rate"] == pytest.approx(0.02)
    assert fitted.best_epoch == 4


def test_the_best_epoch_is_one_of_the_last_stage_even_when_an_earlier_one_was_better(run: Run) -> None:
    ruined = ("{epochs=4, learning_rate=0.5}", "{epochs=1, learning_rate=20}")
    fitted = run(recipe_of("train.schedule=constant", "train.monitor=loss", staged=ruined))
    losses = [line["validation_loss"] for line in fitted.history]
    assert min(losses) < losses[-1]
    assert fitted.best_epoch == 5


def test_early_stopping_ends_the_stage_not_the_training(run: Run) -> None:
    hopeless = ("{epochs=9, learning_rate=1e-12}", "{epochs=1}")
    fitted = run(recipe_of("train.early_stopping=1", "train.monitor=accuracy", staged=hopeless))
    assert len(fitted.history) < 10
    assert fitted.best_epoch == len(fitted.history)


def test_frozen_modules_keep_weights_and_statistics_and_thaw_afterwards(dataset: Dataset, run: Run) -> None:
    from training.networks import architecture, start_network

    once = recipe_of(staged=("{freeze=['features.0', 'features.4.block']}",))
    network = start_network(architecture(dataset, once), once.model, once.seed, report=silent)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    after = run(once).weights
    for key, value in before.items():
        frozen = key.startswith(("features.0.", "features.4.block."))
        assert torch.equal(value, after[key]) is frozen, key
    thawed = run(recipe_of(staged=("{freeze=['features.0', 'features.4.block']}", "{}")), "thawed").weights
    assert not any(torch.equal(value, thawed[key]) for key, value in before.items() if value.is_floating_point())


def test_modules_frozen_for_the_whole_training_stay_so_in_every_stage(run: Run) -> None:
    after = run(recipe_of("train.freeze=['features.0']", staged=("{freeze=['features.1']}", "{}"))).weights
    start = run(recipe_of("train.freeze=['features.0', 'features.1']", staged=("{}",)), "other").weights
    keys = [key for key in after if key.startswith("features.0.")]
    assert keys
    assert all(torch.equal(after[key], start[key]) for key in keys)
    assert not torch.equal(after["features.1.block.0.0.weight"], start["features.1.block.0.0.weight"])


@pytest.mark.parametrize("average", ["0", "0.9"])
def test_stopped_in_every_stage_and_at_each_border_and_resumed_gives_the_same_bits(average: str, run: Run) -> None:
    recipe = recipe_of(f"train.ema={average}", "train.accumulate=2", "augment.cutout=0.2")
    whole = run(recipe, "whole")
    stops = [3, 6, 7, 12, 17, 18, 19]
    report = stopping_at(stops)
    while stops:
        with pytest.raises(Interrupted):
            run(recipe, "parts", report)
    resumed = run(recipe, "parts", report)
    assert all(torch.equal(whole.weights[key], resumed.weights[key]) for key in whole.weights)
    assert [one["validation_loss"] for one in whole.history] == [one["validation_loss"] for one in resumed.history]


def test_an_epoch_of_a_part_draws_other_images_each_time(dataset: Dataset, run: Run) -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        """Remembers what it was trained on."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(256, 10)

        def forward(self, x_BCHW: Tensor) -> Tensor:
            if self.training:
                seen.append(x_BCHW.detach())
            logits_BK: Tensor = self.head(x_BCHW.flatten(1))
            return logits_BK

    plain = ("augment.shift=0", "augment.rotation=0", "augment.scale=0")
    run(recipe_of(*plain, staged=("{epochs=2, part=0.5}",)), network=Spy())
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert len(first) == len(second) == 43
    same = (first.flatten(1).unsqueeze(1) == second.flatten(1).unsqueeze(0)).all(dim=2).any(dim=1).sum()
    assert 0 < int(same) < 43


def test_validation_can_be_a_sample(dataset: Dataset, run: Run) -> None:
    fitted = run(recipe_of("train.validation_images=5", staged=("{}",)))
    accuracy = fitted.history[0]["validation_accuracy"]
    assert accuracy * 5 == pytest.approx(round(accuracy * 5))
    assert len(dataset.rows["validation"]) > 5


def test_sizes_keep_the_proportions_of_the_input() -> None:
    train = load_recipe("digits", ["train.stages=[{image_size=20}, {}]"]).train
    assert [phase.size for phase in stages.plan(train, 100, (30, 40))] == [(15, 20), (30, 40)]


@pytest.mark.parametrize(
    ("overrides", "staged", "message"),
    [
        ((), ("{image_size=32}", "{}"), "stage 1 wants images of 32 pixels a side, the network takes 16x16"),
        ((), ("{freeze=['feature.0']}",), r"stage 1 freezes 'feature.0', .* did you mean 'features.0'"),
        ((), ("{freeze=['features', 'classifier']}",), "stage 1 freezes every weight"),
        (("model.architecture=resnet9",), ("{image_size=4}", "{}"), "does not take the 4x4 images of stage 1"),
        (("model.architecture=mlp",), ("{image_size=8}", "{}"), "does not take the 8x8 images of stage 1"),
    ],
)
def test_stages_that_do_not_fit_the_network(
    overrides: tuple[str, ...], staged: tuple[str, ...], message: str, run: Run
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        run(recipe_of(*overrides, staged=staged))
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.stages=[{image_size=8}]", "train: the last stage trains at the network's own size"),
        ("train.epochs=7", "train: epochs is 7 but the stages have 4"),
        ("train.stages=[{epoch=3}]", r"unknown key 'train.stages.0.epoch', did you mean 'train.stages.0.epochs'"),
        ("train.stages=[{part=0}]", r"train.stages.0.part: .* greater than 0 \(got 0\)"),
        ("train.stages=[{epochs='2'}]", "train.stages.0.epochs: .* valid integer"),
        ("train.stages.5.epochs=2", "there is no train.stages.5"),
        ("train.warmup=3", "a warm-up of 3 epochs leaves nothing of 3 before a stage has a schedule of its own"),
        ("train.schedule=plateau", "plateau judges the epochs of one stage by each other: give the stages a schedule"),
    ],
)
def test_stages_that_contradict_themselves(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(setting)


def test_a_warm_up_cannot_outlast_a_first_stage_with_a_schedule_of_its_own() -> None:
    staged = ("{epochs=2, schedule='cosine'}", "{epochs=4}")
    with pytest.raises(RecipeError, match="a warm-up of 2 epochs leaves nothing of 2 before"):
        recipe_of("train.warmup=2", staged=staged)
    assert recipe_of("train.warmup=1.5", staged=staged).train.warmup == 1.5


def test_a_plateau_of_one_stage_is_taken() -> None:
    staged = ("{epochs=2, schedule='plateau'}", "{epochs=4}")
    assert recipe_of("train.schedule=plateau", staged=staged).train.schedule == "plateau"


def test_a_warm_up_counts_the_epochs_of_each_stage_as_long_as_they_are() -> None:
    phases = stages.plan(recipe_of().train, 86, (16, 16))
    assert [phase.updates_per_epoch for phase in phases] == [6, 6, 2]
    assert [stages.updates_of(phases, epochs) for epochs in (0.5, 1, 2.5, 3.5)] == [3, 6, 15, 19]


def test_one_value_of_a_stage_can_be_set() -> None:
    recipe = recipe_of("train.stages.1.epochs=5")
    assert [stage.epochs for stage in recipe.train.stages] == [1, 5, 1]
    assert recipe.train.epochs == 7


def test_a_staged_recipe_survives_writing_and_reading() -> None:
    from training.config import parse

    recipe = recipe_of()
    assert parse(json.loads(recipe.model_dump_json()), where="test") == recipe
