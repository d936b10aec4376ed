"""The training loop on small real data: every network, optimiser and schedule, failure and determinism."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
import torchvision

from handlerlib import architectures
from training import data
from training.config import Optimizer, Recipe, Schedule, load_recipe
from training.data import Dataset
from training.errors import NumericFailure, RecipeError
from training.progress import Step, silent
from training.train import (
    BEST_SO_FAR,
    CHECKPOINT,
    HISTORY,
    Fitted,
    architecture,
    fit,
    reproducible,
    start_network,
)

WriteTree = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]

FitDigits = Callable[..., Fitted]


def dataset_of(recipe: Recipe) -> Dataset:
    return data.prepare(data.survey(recipe, threads=1, report=silent), recipe, threads=1, report=silent)


@pytest.fixture(scope="session")
def few_digits() -> Dataset:
    return dataset_of(load_recipe("digits", ["data.max_images=400", "data.image_size=8"]))


@pytest.fixture(scope="session")
def larger_digits() -> Dataset:
    """The same at 16x16, which every network of ours takes."""
    return dataset_of(load_recipe("digits", ["data.max_images=400", "data.image_size=16"]))


@pytest.fixture
def fit_digits(few_digits: Dataset, tmp_path: Path) -> FitDigits:
    """Train on 400 real digits at 8x8."""

    def run(*overrides: str) -> Fitted:
        base = (
            "model.architecture=mlp",
            "train.epochs=4",
            "train.batch_size=32",
            "train.device=cpu",
            "train.threads=1",
        )
        recipe = load_recipe("digits", [*base, *overrides])
        with reproducible(1):
            return fit(few_digits, recipe, tmp_path, report=silent)

    return run


PLAIN = ["model.dropout=0", "augment.shift=0", "augment.rotation=0", "augment.scale=0"]
RATES = {
    "gradient_descent": 0.5,
    "sgd": 0.1,
    "muon": 0.05,
    "adam": 1e-3,
    "adamw": 1e-3,
    "rmsprop": 3e-4,
    "adagrad": 1e-2,
}


def learns(history: tuple[dict[str, float], ...]) -> bool:
    first, *_, last = history
    fell = last["train_loss"] < 0.6 * first["train_loss"] and last["validation_loss"] < first["validation_loss"]
    return fell and last["validation_accuracy"] > 0.5


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_optimizer_learns(name: str, fit_digits: FitDigits) -> None:
    epochs = 60 if name == "gradient_descent" else 8  # one update an epoch
    settings = [f"optimizer={name}", f"learning_rate={RATES[name]}", f"epochs={epochs}", "weight_decay=0"]
    assert learns(fit_digits(*PLAIN, *(f"train.{setting}" for setting in settings)).history)


@pytest.mark.parametrize("name", get_args(Schedule))
def test_every_schedule_learns(name: str, fit_digits: FitDigits) -> None:
    assert learns(fit_digits(*PLAIN, f"train.schedule={name}", "train.warmup=0.5", "train.epochs=8").history)


def test_the_best_epoch_is_kept_not_the_last(fit_digits: FitDigits) -> None:
    """At a rate that wrecks the network in the end, the best epoch's weights are what comes out."""
    fitted = fit_digits("train.optimizer=sgd", "train.learning_rate=0.5", "train.schedule=constant", "train.epochs=8")
    accuracies = [line["validation_accuracy"] for line in fitted.history]
    assert accuracies[fitted.best_epoch - 1] == max(accuracies)


@pytest.mark.parametrize(("monitor", "better"), [("loss", min), ("accuracy", max), ("macro_f1", max)])
def test_monitor_decides_which_epoch_is_best(
    monitor: str, better: Callable[[list[float]], float], fit_digits: FitDigits
) -> None:
    fitted = fit_digits(f"train.monitor={monitor}", "train.learning_rate=0.01", "train.schedule=constant")
    values = [line[f"validation_{monitor}"] for line in fitted.history]
    assert values[fitted.best_epoch - 1] == better(values)


def test_early_stopping_ends_after_epochs_without_progress(fit_digits: FitDigits) -> None:
    fitted = fit_digits("train.early_stopping=2", "train.epochs=40", "train.learning_rate=3e-3")
    assert len(fitted.history) == fitted.best_epoch + 2
    assert len(fitted.history) < 40


def test_weight_decay_label_smoothing_and_dropout_each_change_the_result(fit_digits: FitDigits, tmp_path: Path) -> None:
    def loss(*overrides: str) -> float:
        (tmp_path / CHECKPOINT).unlink(missing_ok=True)
        return fit_digits("train.epochs=1", *overrides).history[0]["validation_loss"]

    losses = [loss(), loss("train.weight_decay=1.0"), loss("train.label_smoothing=0.2"), loss("model.dropout=0.5")]
    assert losses[0] == loss()
    assert len(set(losses)) == 4


def test_a_loss_that_is_no_number_stops_with_place_and_rate_and_keeps_the_best(
    fit_digits: FitDigits, tmp_path: Path
) -> None:
    with pytest.raises(NumericFailure, match=r"epoch 1, step 2 \(learning rate 1e\+20, batch") as caught:
        fit_digits("train.optimizer=sgd", "train.learning_rate=1e20", "train.schedule=constant")
    assert "--set train.learning_rate=1e+19 or --set train.clip=1" in caught.value.remedy
    assert len(caught.value.images) == 32
    assert caught.value.images[0] in str(caught.value)
    assert caught.value.exit_code == 3
    assert not (tmp_path / CHECKPOINT).exists()


def test_the_remedy_of_a_numeric_failure_starts_from_what_the_recipe_says(fit_digits: FitDigits) -> None:
    with pytest.raises(NumericFailure, match=r"\(learning rate \d\.?\d*e\+18, batch") as caught:
        fit_digits("train.optimizer=sgd", "train.learning_rate=1e20", "train.schedule=one_cycle", "train.clip=1e30")
    assert caught.value.remedy.endswith("--set train.learning_rate=1e+19")


def test_best_weights_and_last_checkpoint_survive_a_numeric_failure(fit_digits: FitDigits, tmp_path: Path) -> None:
    """A one-cycle that starts tame and peaks far too high fails after some good epochs."""
    with pytest.raises(NumericFailure, match=r"weights of epoch \d+ are kept .* checkpoint of epoch \d+, step \d+ is"):
        fit_digits(
            *("train.optimizer=sgd", "train.learning_rate=4", "train.schedule=one_cycle", "train.epochs=12"),
            "train.checkpoint_minutes=1e-9",
        )
    best = torch.load(tmp_path / BEST_SO_FAR, weights_only=True)
    last = torch.load(tmp_path / CHECKPOINT, weights_only=True)["learner"]["network"]
    for weights in (best, last):
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_spoilt_weights_are_not_saved(fit_digits: FitDigits, tmp_path: Path) -> None:
    with pytest.raises(NumericFailure, match="a weight became infinite or NaN in epoch 1, step 1"):
        fit_digits("train.optimizer=sgd", "train.learning_rate=1e20", "train.l2=1e25", "train.checkpoint_minutes=1e-9")
    assert not (tmp_path / CHECKPOINT).exists()


def test_the_history_has_a_line_per_epoch(fit_digits: FitDigits, tmp_path: Path) -> None:
    fitted = fit_digits()
    lines = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert tuple(lines) == fitted.history
    assert all(math.isfinite(value) for line in lines for value in line.values())


OWN = {
    "mlp": (4, 3e-3),
    "lenet": (8, 3e-3),
    "cnn28": (4, 3e-3),
    "cifar_cnn": (4, 3e-3),
    "tiny_cnn": (4, 3e-3),
    "resnet9": (2, 3e-3),
    "airbench": (4, 1e-2),
}
"""Epochs and learning rate that suffice to learn digits."""
TORCHVISION = [("resnet18", 32), ("mobilenet_v3_small", 32), ("squeezenet1_1", 40)]


def test_every_network_of_ours_is_held_to_learn() -> None:
    assert tuple(OWN) == architectures.own_names()


@pytest.mark.parametrize("name", OWN)
def test_every_network_of_ours_learns(name: str, larger_digits: Dataset, tmp_path: Path) -> None:
    epochs, rate = OWN[name]
    settings = ["batch_size=32", "device=cpu", "threads=1", f"epochs={epochs}", f"learning_rate={rate}"]
    overrides = [f"model.architecture={name}", *PLAIN, *(f"train.{setting}" for setting in settings)]
    with reproducible(1):
        assert learns(fit(larger_digits, load_recipe("digits", overrides), tmp_path, report=silent).history)


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [*((own, 16, 3) for own in OWN), *((*other, channels) for other in TORCHVISION for channels in (1, 3))],
)
def test_every_network_takes_a_step_with_finite_weights(
    name: str, size: int, channels: int, tree: WriteTree, folder_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = folder_recipe(
        tree(zero=9, one=9),
        f"model.architecture={name}",
        f"data.image_size={size}",
        f"data.channels={channels}",
        "train.epochs=1",
        "train.batch_size=6",
    )
    dataset = dataset_of(recipe)
    with reproducible(1):
        fitted = fit(dataset, recipe, tmp_path, report=silent)
    assert math.isfinite(fitted.history[0]["train_loss"])
    assert all(bool(torch.isfinite(value).all()) for value in fitted.weights.values())


def test_a_last_batch_of_one_does_not_break_batch_norm(
    tree: WriteTree, folder_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = folder_recipe(tree(zero=10, one=9), "model.architecture=resnet9", "train.epochs=1", "train.batch_size=4")
    dataset = dataset_of(recipe)
    assert dataset.sizes()["train"] % 4 == 1
    with reproducible(1):
        assert fit(dataset, recipe, tmp_path, report=silent).history


def test_a_network_too_large_for_the_images_is_a_recipe_error(
    tree: WriteTree, folder_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = folder_recipe(tree(zero=9, one=9), "model.architecture=alexnet")
    with pytest.raises(RecipeError, match="does not take 1x8x8 images") as caught:
        fit(dataset_of(recipe), recipe, tmp_path, report=silent)
    assert "data.image_size" in caught.value.remedy


def test_pretrained_weights_that_do_not_exist(fit_digits: FitDigits) -> None:
    with pytest.raises(RecipeError, match="no pretrained weights for 'mlp'"):
        fit_digits("model.pretrained=true")


def test_pretrained_weights_that_cannot_be_fetched(
    tree: WriteTree, folder_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    wanted = ("model.architecture=squeezenet1_1", "model.pretrained=true", "data.image_size=40")
    recipe = folder_recipe(tree(zero=9, one=9), *wanted)
    with pytest.raises(RecipeError, match="pretrained weights of 'squeezenet1_1' cannot be fetched") as caught:
        fit(dataset_of(recipe), recipe, tmp_path, report=silent)
    assert "model.pretrained=false" in caught.value.remedy


def test_pretrained_weights_are_taken_where_the_shapes_match(
    tree: WriteTree, folder_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision looks into its cache first; the file put there stands for the download."""
    weights = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT
    given = torchvision.models.squeezenet1_1(weights=None).state_dict()
    buffer = io.BytesIO()
    torch.save(given, buffer)
    # The name carries the start of the file's own digest, which torch checks.
    monkeypatch.setattr(
        weights.value, "url", f"http://127.0.0.1:9/x-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
    )
    cache = tmp_path / "hub" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / weights.url.rpartition("/")[2]).write_bytes(buffer.getvalue())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    wanted = ("model.architecture=squeezenet1_1", "model.pretrained=true", "data.image_size=40", "data.channels=3")
    recipe = folder_recipe(tree(zero=9, one=9), *wanted)
    seen: list[Step] = []
    network = start_network(architecture(dataset_of(recipe), recipe), recipe.model, recipe.seed, report=seen.append)
    own = network.state_dict()
    taken = [key for key, value in given.items() if own[key].shape == value.shape and torch.equal(own[key], value)]
    # All but the last convolution, which has another number of classes.
    assert len(taken) == len(own) - 2
    assert f"{len(taken)} of {len(own)} tensors" in seen[0].note


def test_no_gpu_where_one_is_wanted(fit_digits: FitDigits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="torch sees no GPU"):
        fit_digits("train.device=cuda")


def test_settings_of_the_process_are_as_before() -> None:
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    with reproducible(1):
        torch.manual_seed(5)
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(state, torch.get_rng_state())
