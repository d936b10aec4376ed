"""How gradients become weights: against the formulas, worked out by hand or in double precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handlerlib import imaging
from training import data, learner, optimisers
from training.config import Recipe, Train, load_recipe
from training.data import Dataset
from training.errors import Interrupted, RecipeError
from training.machine import slow_precision
from training.networks import architecture, start_network
from training.optimisers import Average
from training.progress import Report, Step, silent
from training.train import Fitted, fit, reproducible

BASE = (
    *("model.architecture=mlp", "model.dropout=0", "data.image_size=8", "data.max_images=200"),
    *("train.epochs=2", "train.batch_size=16", "train.device=cpu", "train.threads=1", "train.label_smoothing=0"),
    *("train.optimizer=sgd", "train.learning_rate=0.1", "train.weight_decay=0"),
    *("augment.shift=0", "augment.rotation=0", "augment.scale=0"),
)


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe("digits", [*BASE, *overrides])


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    recipe = recipe_of()
    return data.prepare(data.survey(recipe, threads=1, report=silent), recipe, threads=1, report=silent)


Run = Callable[..., Fitted]


@pytest.fixture
def run(dataset: Dataset, tmp_path: Path) -> Run:
    def train(*overrides: str, place: str = "a", report: Report = silent) -> Fitted:
        (tmp_path / place).mkdir(exist_ok=True)
        with reproducible(1):
            return fit(dataset, recipe_of(*overrides), tmp_path / place, report=report)

    return train


def the_whole_split(dataset: Dataset) -> tuple[Tensor, Tensor]:
    rows = torch.tensor(dataset.rows["train"])
    return imaging.normalise(dataset.pixels(rows), dataset.preprocess), dataset.targets_N[rows]


def difference(one: Fitted, other: Fitted) -> float:
    return max(float((one.weights[key] - other.weights[key]).abs().max()) for key in one.weights)


def settings(**values: object) -> Train:
    return Train.model_validate(values)


def test_full_batch_gradient_descent_is_one_step_along_the_mean_gradient(dataset: Dataset, run: Run) -> None:
    recipe = recipe_of("train.optimizer=gradient_descent", "train.schedule=constant", "train.epochs=1")
    network = start_network(architecture(dataset, recipe), recipe.model, recipe.seed, report=silent)
    x_BCHW, targets_B = the_whole_split(dataset)
    F.cross_entropy(network(x_BCHW), targets_B).backward()  # type: ignore[no-untyped-call]
    expected = {name: p.detach() - 0.1 * p.grad for name, p in network.named_parameters() if p.grad is not None}
    fitted = run("train.optimizer=gradient_descent", "train.schedule=constant", "train.epochs=1")
    for name, weights in expected.items():
        torch.testing.assert_close(fitted.weights[name], weights, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_equal_one_large_batch(run: Run) -> None:
    """The mlp has no batch norm, whose statistics would be those of the small batches."""
    large = run("train.batch_size=48", place="large")
    small = run("train.batch_size=16", "train.accumulate=3", place="small")
    assert difference(large, small) < 1e-5
    assert difference(large, run("train.batch_size=16", place="other")) > 1e-3


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (1, 5)])
def test_orthogonalised_keeps_the_directions_and_evens_their_strengths(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    between = left.T @ optimisers.orthogonalised(matrix) @ right.T
    torch.testing.assert_close(between, between.diagonal().diag(), rtol=0, atol=1e-5)
    assert float(between.diagonal().min()) > 0.6
    assert float(between.diagonal().max()) < 1.3
    torch.testing.assert_close(optimisers.orthogonalised(7 * matrix), optimisers.orthogonalised(matrix))


def small_network() -> nn.Sequential:
    """A hidden convolution, a norm and a head, with gradients."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    return network


def test_muon_turns_hidden_weights_and_leaves_the_rest_to_sgd() -> None:
    """Two steps, written out with v for the momentum."""
    network = small_network()
    train = settings(optimizer="muon", learning_rate=0.1, momentum=0.5, weight_decay=0, rates={"head": 4})
    optimizer = optimisers.optimizer(network, train)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group[optimisers.FACTOR]
    expected = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    speeds = {name: torch.zeros_like(value) for name, value in expected.items()}
    for _ in range(2):
        optimizer.step()
        for name, gradient in gradients.items():
            speeds[name] = 0.5 * speeds[name] + gradient
            change = gradient + 0.5 * speeds[name]
            if name == "0.weight":
                expected[name] *= 2 / expected[name].norm()
                change = optimisers.orthogonalised(change.flatten(1)).view_as(change)
            expected[name] = expected[name] - (0.4 if name == "3.weight" else 0.1) * change
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name])


def one_update(network: nn.Module, **values: object) -> dict[str, Tensor]:
    """What one update of SGD without momentum takes off each weight."""
    train = settings(optimizer="sgd", learning_rate=0.1, momentum=0, **values)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = optimisers.optimizer(network, train)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group[optimisers.FACTOR]
    optimizer.step()
    return {name: before[name] - parameter.detach() for name, parameter in network.named_parameters()}


def test_rates_scale_the_step_of_each_kind_of_weight() -> None:
    network = small_network()
    taken = one_update(network, weight_decay=0, rates={"head": 2, "bias": 30, "norm": 0})
    factors = {"0.weight": 1, "0.bias": 30, "1.weight": 0, "1.bias": 30, "3.weight": 2, "3.bias": 30}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(taken[name], 0.1 * factors[name] * parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("biases", [False, True])
def test_rates_leave_decay_alone_and_biases_decay_when_asked(biases: bool) -> None:
    network = small_network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    taken = one_update(network, weight_decay=0.5, decay_biases=biases, rates={"head": 2, "bias": 30, "norm": 0})
    amounts = {name: float(value.mean()) for name, value in taken.items()}
    bias = 0.05 if biases else 0.0
    expected = {"0.weight": 0.05, "0.bias": bias, "1.weight": 0.0, "1.bias": bias, "3.weight": 0.05, "3.bias": bias}
    assert amounts == pytest.approx(expected, abs=1e-6)


def test_the_learner_applies_the_factors_to_the_schedules_rate(dataset: Dataset) -> None:
    recipe = recipe_of("train.rates.bias=8", "train.rates.head=3")
    pupil = learner.start(dataset, recipe, silent)
    pupil.update(0.02)
    assert sorted(group["lr"] for group in pupil.optimizer.param_groups) == pytest.approx([0.02, 0.06, 0.16])


def test_a_rate_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"train\.rates.*'head', 'bias' or 'norm'"):
        recipe_of("train.rates.norms=0")


def test_l1_and_l2_add_their_gradients_to_weights_but_not_to_biases() -> None:
    network = nn.Linear(2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[2.0, -3.0]]))
    network.weight.grad, network.bias.grad = torch.tensor([[1.0, 1.0]]), torch.tensor([1.0])
    optimisers.penalise(network, settings(l1=0.1, l2=0.01))
    torch.testing.assert_close(network.weight.grad, torch.tensor([[1 + 0.1 + 0.02, 1 - 0.1 - 0.03]]))
    assert network.bias.grad.tolist() == [1.0]


def test_l2_is_weight_decay_for_sgd_and_not_for_adamw(run: Run) -> None:
    def gap(optimizer: str, rate: str) -> float:
        common = (f"train.optimizer={optimizer}", f"train.learning_rate={rate}")
        decayed = run(*common, "train.weight_decay=0.1", place=f"{optimizer}-decay")
        return difference(decayed, run(*common, "train.l2=0.1", place=f"{optimizer}-l2"))

    assert gap("sgd", "0.1") < 1e-6
    assert gap("adamw", "0.001") > 1e-4


def test_l1_makes_most_weights_nearly_zero_and_still_learns(run: Run) -> None:
    def small(fitted: Fitted) -> float:
        return float((fitted.weights["2.weight"].abs() < 1e-3).float().mean())

    common = ("model.architecture=tiny_cnn", "train.epochs=12", "train.learning_rate=0.05")
    penalised = run(*common, "train.l1=3e-3", place="l1")
    assert small(penalised) > 0.7
    assert small(run(*common, place="none")) < 0.1
    assert penalised.history[-1]["validation_accuracy"] > 0.7


def test_clipping_limits_the_length_of_the_whole_gradient() -> None:
    network = nn.Linear(3, 1)
    network.weight.grad, network.bias.grad = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([4.0])
    optimisers.clip(network.parameters(), 0.0)
    assert network.bias.grad.tolist() == [4.0]
    optimisers.clip(network.parameters(), 1.0)
    torch.testing.assert_close(network.weight.grad, torch.tensor([[0.6, 0.0, 0.0]]))
    torch.testing.assert_close(network.bias.grad, torch.tensor([0.8]))


def test_clipping_saves_a_rate_that_would_fail(run: Run) -> None:
    wild = ("train.learning_rate=3", "train.schedule=constant", "train.epochs=3", "train.momentum=0")
    assert run(*wild, "train.clip=0.1").history[-1]["validation_accuracy"] > 0.3


def test_the_average_is_that_of_all_weights_so_far_with_its_decay() -> None:
    network = nn.BatchNorm1d(2)
    average = Average(network, 0.5)
    expected = network.weight.detach().clone()
    for update, value in enumerate((2.0, 4.0, 6.0, 8.0, 10.0)):
        with torch.no_grad():
            network.weight.fill_(value)
            network.num_batches_tracked.fill_(update)
        average.update(network)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.network.weight.detach(), expected)
    assert int(average.network.num_batches_tracked) == 4


def test_with_an_average_its_weights_are_judged_and_kept(dataset: Dataset, run: Run, tmp_path: Path) -> None:
    fitted = run("train.ema=0.9", "train.epochs=1")
    content = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["learner"]
    assert all(torch.equal(fitted.weights[key], value) for key, value in content["average"]["network"].items())
    assert not torch.equal(fitted.weights["1.weight"], content["network"]["1.weight"])
    recipe = recipe_of()
    network = start_network(architecture(dataset, recipe), recipe.model, recipe.seed, report=silent).eval()
    network.load_state_dict(fitted.weights)
    rows = torch.tensor(dataset.rows["validation"])
    with torch.no_grad():
        logits_BK = network(imaging.normalise(dataset.pixels(rows), dataset.preprocess))
    right = float((logits_BK.argmax(dim=1) == dataset.targets_N[rows]).double().mean())
    assert fitted.history[0]["validation_accuracy"] == pytest.approx(right)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.accumulate=3", "train.optimizer=adam", "train.learning_rate=0.001"),
        ("train.optimizer=gradient_descent", "train.learning_rate=0.5"),
        ("train.ema=0.9", "train.clip=1", "train.l1=1e-4"),
        ("train.optimizer=rmsprop", "train.learning_rate=0.001", "train.schedule=plateau"),
        ("train.optimizer=adagrad", "train.learning_rate=0.01", "train.schedule=step", "train.warmup=0.5"),
        ("train.precision=bf16", "train.channels_last=true", "model.architecture=tiny_cnn"),
        ("train.optimizer=muon", "train.rates={bias=3, norm=0}", "train.momentum=0.6", "augment.flip=alternating"),
    ],
    ids=["accumulated", "full-batch", "average", "rmsprop", "adagrad", "bf16", "muon"],
)
def test_stopped_anywhere_and_resumed_gives_the_same_bits(overrides: tuple[str, ...], run: Run) -> None:
    whole = run(*overrides, place="whole")
    left = [2, 7, 11]

    def stop(step: Step) -> None:
        if step.total and left and step.done == left[0]:
            left.pop(0)
            raise KeyboardInterrupt

    while left:
        with pytest.raises(Interrupted):
            run(*overrides, place="parts", report=stop)
    resumed = run(*overrides, place="parts", report=stop)
    assert all(torch.equal(whole.weights[key], resumed.weights[key]) for key in whole.weights)
    timeless = [[{k: v for k, v in line.items() if k != "seconds"} for line in one.history] for one in (whole, resumed)]
    assert timeless[0] == timeless[1]


def test_low_precision_keeps_full_weights_and_nearly_the_same_course(run: Run) -> None:
    common = ("model.architecture=tiny_cnn", "train.epochs=4", "train.learning_rate=0.05")
    full = run(*common, place="fp32")
    low = run(*common, "train.precision=bf16", "train.channels_last=true", place="bf16")
    assert all(value.dtype == torch.float32 for value in low.weights.values())
    assert low.history[-1]["train_loss"] == pytest.approx(full.history[-1]["train_loss"], rel=0.1)
    assert low.history[-1]["train_loss"] != full.history[-1]["train_loss"]


def test_fp16_is_refused_without_a_gpu(run: Run) -> None:
    with pytest.raises(RecipeError, match=r"train\.precision fp16 needs a GPU") as caught:
        run("train.precision=fp16")
    assert "bf16" in caught.value.remedy


@pytest.mark.parametrize(
    ("capabilities", "slow"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, False),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_a_cpu_without_bf16_instructions_is_named(capabilities: dict[str, object], slow: bool) -> None:
    note = slow_precision(settings(precision="bf16"), torch.device("cpu"), capabilities)
    assert (note is not None) is slow
    assert slow_precision(settings(), torch.device("cpu"), capabilities) is None


def test_gradient_descent_does_not_accumulate_further() -> None:
    with pytest.raises(RecipeError, match="leave accumulate out"):
        recipe_of("train.optimizer=gradient_descent", "train.accumulate=2")


# --------------------------------------------------------------------------------------------------------------- losses


def test_class_weights_scale_each_class_in_the_loss(dataset: Dataset) -> None:
    pupil = learner.start(dataset, recipe_of("train.class_weights.3=5", "train.class_weights.7=0.5"), silent)
    x_BCHW, targets_B = the_whole_split(dataset)
    loss, logits_BK = pupil.loss(pupil.network, x_BCHW, targets_B)
    weights_B = torch.ones(10).index_fill(0, torch.tensor([3]), 5.0).index_fill(0, torch.tensor([7]), 0.5)[targets_B]
    each_B = -logits_BK.double().log_softmax(dim=1)[torch.arange(len(targets_B)), targets_B]
    assert float(loss.detach()) == pytest.approx(
        float(((weights_B * each_B).sum() / weights_B.sum()).detach()), rel=1e-5
    )


def test_balanced_weights_give_every_class_the_same_say(tmp_path: Path, dataset: Dataset) -> None:
    rows = tuple(row for row in dataset.rows["train"] if int(dataset.targets_N[row]) or row % 3 == 0)
    uneven = Dataset(
        images=dataset.images,
        classes=dataset.classes,
        preprocess=dataset.preprocess,
        x_NCHW=dataset.x_NCHW,
        targets_N=dataset.targets_N,
        rows={**dataset.rows, "train": rows},
    )
    from training.losses import class_weights

    weights_K = class_weights(recipe_of("train.class_weights=balanced").train, uneven)
    assert weights_K is not None
    counts_K = torch.bincount(dataset.targets_N[list(rows)], minlength=10)
    assert counts_K[0] < counts_K[1:].min()
    torch.testing.assert_close(weights_K * counts_K, torch.full((10,), len(rows) / 10))


def test_a_weight_for_a_class_that_is_not_there(run: Run) -> None:
    with pytest.raises(RecipeError, match=r"train\.class_weights names the class 'zero'") as caught:
        run("train.class_weights.zero=2")
    assert "0, 1, 2" in caught.value.remedy
