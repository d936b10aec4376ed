"""What training makes small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handlerlib.spec import closest
from training.config import Train
from training.data import Dataset
from training.errors import RecipeError

Loss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Network in training mode, `x_BCHW` as it takes it, targets `[B]` -> mean loss, logits `[B, K]`. It runs in the
recipe's precision: what must be exact starts with `.float()`."""


def cross_entropy(train: Train, weights_K: Tensor | None) -> Loss:
    """-sum_k q_k log p_k, the mean over the batch, with q the label smoothed by s: (1 - s) on it, s / K on each class
    (Szegedy et al., 2016). With class weights w it is the mean weighted by them."""

    def measure(network: nn.Module, x_BCHW: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        logits_BK = network(x_BCHW).float()
        loss = F.cross_entropy(logits_BK, targets_B, weight=weights_K, label_smoothing=train.label_smoothing)
        return loss, logits_BK

    return measure


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
    for label in train.class_weights:
        if label not in dataset.classes:
            raise RecipeError(
                f"train.class_weights names the class '{label}'{closest(label, dataset.classes)}",
                remedy=f"the data has {', '.join(dataset.classes[:20])}",
            )
    return torch.tensor([train.class_weights.get(label, 1.0) for label in dataset.classes])
