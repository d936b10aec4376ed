"""What a network's outputs mean, by the spec's task: the last step from logits to what a model answers.

multi-class   p_k = exp(z_k) / sum_j exp(z_j), softmax: one of the classes is right
multi-label   p_k = 1 / (1 + exp(-z_k)), the logistic function: each label is there or not, whatever the others are
regression    y_k = mean_k + scale_k z_k: the network gives standardised values, mean and scale are the training split's
              (LeCun, Bottou, Orr and Müller, "Efficient BackProp", 1998, 4.3: why inputs and targets are standardised)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from handlerlib.spec import ModelSpec, Scaling, Task

Finish = Callable[[Tensor], Tensor]
"""Logits, float32 `[B, outputs]` on any device -> what the model answers, float32 `[B, outputs]`."""


def softmax(logits_BK: Tensor) -> Tensor:
    """Probabilities of classes, rows that sum to 1."""
    return logits_BK.softmax(dim=1)


def finish(spec: ModelSpec) -> Finish:
    """The spec's last step."""
    return of_task(spec.task, spec.scaling)


def of_task(task: Task, scaling: Sequence[Scaling] = ()) -> Finish:
    """The same for a model that has no spec yet; `scaling` is a regression's."""
    if task == "multi-class":
        return softmax
    if task == "multi-label":
        return torch.sigmoid
    mean_K = torch.tensor([one.mean for one in scaling])
    scale_K = torch.tensor([one.scale for one in scaling])
    return lambda z_BK: mean_K.to(z_BK.device) + scale_K.to(z_BK.device) * z_BK
