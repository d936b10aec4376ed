"""What training makes small, by the recipe's task.

multi-class   cross entropy                L = -sum_k q_k log p_k, p = softmax(z)
multi-label   binary cross entropy         L = -mean_k (w_k y_k log p_k + (1 - y_k) log(1 - p_k)), p = 1 / (1 + exp(-z))
regression    mean squared error           L = mean_k (z_k - y_k)^2, of standardised targets y
              mean absolute error          L = mean_k |z_k - y_k|

Each is the mean over the batch. Cross entropies are the negative logarithms of the likelihood (Goodfellow, Bengio and
Courville, "Deep Learning", 2016, 6.2.2); of the errors, the squared one is that of normal deviations and leads to the
mean, the absolute one that of Laplace's and leads to the median (C. Bishop, "Pattern Recognition and Machine Learning",
2006, 1.5.5).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handlerlib.spec import closest
from training.config import Recipe, Train
from training.data import Dataset
from training.errors import RecipeError

Loss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Network in training mode, `x_BCHW` as it takes it, targets `[B]` or `[B, K]` as `Dataset.targets_N` holds them -> mean
loss, logits `[B, K]`. It runs in the recipe's precision: what must be exact starts with `.float()`."""


def of_recipe(recipe: Recipe, dataset: Dataset, weights_K: Tensor | None, device: torch.device) -> Loss:
    """The loss of the recipe's task; `weights_K` are those of classes. Raises RecipeError for an unknown label."""
    if recipe.task == "regression":
        return absolute_error() if recipe.train.loss == "mean_absolute_error" else squared_error()
    if recipe.task == "multi-label":
        weights_K = positive_weights(recipe.train, dataset)
        return binary_cross_entropy(None if weights_K is None else weights_K.to(device))
    return cross_entropy(recipe.train, None if weights_K is None else weights_K.to(device))


def cross_entropy(train: Train, weights_K: Tensor | None) -> Loss:
    """-sum_k q_k log p_k, the mean over the batch, with q the label smoothed by s: (1 - s) on it, s / K on each class
    (Szegedy et al., 2016). With class weights w it is the mean weighted by them."""

    def measure(network: nn.Module, x_BCHW: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        logits_BK = network(x_BCHW).float()
        loss = F.cross_entropy(logits_BK, targets_B, weight=weights_K, label_smoothing=train.label_smoothing)
        return loss, logits_BK

    return measure


def binary_cross_entropy(weights_K: Tensor | None) -> Loss:
    """-(w_k y_k log p_k + (1 - y_k) log(1 - p_k)), the mean over labels and batch, from logits, where nothing overflows
    (torch's `binary_cross_entropy_with_logits`, whose `pos_weight` w is)."""

    def measure(network: nn.Module, x_BCHW: Tensor, targets_BK: Tensor) -> tuple[Tensor, Tensor]:
        logits_BK = network(x_BCHW).float()
        return F.binary_cross_entropy_with_logits(logits_BK, targets_BK, pos_weight=weights_K), logits_BK

    return measure


def squared_error() -> Loss:
    """(z_k - y_k)^2, the mean over targets and batch."""

    def measure(network: nn.Module, x_BCHW: Tensor, targets_BK: Tensor) -> tuple[Tensor, Tensor]:
        values_BK = network(x_BCHW).float()
        return F.mse_loss(values_BK, targets_BK), values_BK

    return measure


def absolute_error() -> Loss:
    """|z_k - y_k|, the mean over targets and batch."""

    def measure(network: nn.Module, x_BCHW: Tensor, targets_BK: Tensor) -> tuple[Tensor, Tensor]:
        values_BK = network(x_BCHW).float()
        return F.l1_loss(values_BK, targets_BK), values_BK

    return measure


def positive_weights(train: Train, dataset: Dataset) -> Tensor | None:
    """float32 `[K]`: what an image that has a label counts beside one that has not; None when the same.

    balanced: images without / images with the label in the training split, so that both sides count alike. Raises
    RecipeError for a label that is not there.
    """
    if train.class_weights == "none":
        return None
    if train.class_weights == "balanced":
        share_K = dataset.targets_N[list(dataset.rows["train"])].double().mean(dim=0)
        return ((1 - share_K) / share_K).float()
    return _named_weights(train.class_weights, dataset)


def class_weights(train: Train, dataset: Dataset) -> Tensor | None:
    """float32 `[K]`, or None when all classes count the same. Raises RecipeError for a class that is not there.

    balanced: images / (classes x images of the class) in the training split (King & Zeng, 2001).
    """
    if train.class_weights == "none":
        return None
    if train.class_weights == "balanced":
        counts = Counter(dataset.targets_N[list(dataset.rows["train"])].tolist())
        each = len(dataset.rows["train"]) / len(dataset.classes)
        return torch.tensor([each / counts[number] for number in range(len(dataset.classes))])
    return _named_weights(train.class_weights, dataset)


def _named_weights(given: Mapping[str, float], dataset: Dataset) -> Tensor:
    for label in given:
        if label not in dataset.classes:
            raise RecipeError(
                f"train.class_weights names the class '{label}'{closest(label, dataset.classes)}",
                remedy=f"the data has {', '.join(dataset.classes[:20])}",
            )
    return torch.tensor([given.get(label, 1.0) for label in dataset.classes])
