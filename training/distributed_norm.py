"""Batch norm over the images of all processes (torch's own SyncBatchNorm trains on GPUs only).

With sums over the batch of every process, n values to a channel:

    m = sum x / n,  v = sum (x - m)^2 / n,  y = w (x - m) / sqrt(v + eps) + b          Ioffe & Szegedy, 2015
    dx = w / sqrt(v + eps) (dy - sum dy / n - x' sum (dy x') / n),  x' = (x - m) / sqrt(v + eps)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with every batch norm over all processes; names, weights and statistics stay."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return converted
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, _SharedNorm.like(child))
    return network


class _SharedNorm(_BatchNorm):
    """Trains on the batches of all processes as one; elsewhere the batch norm that it took the place of."""

    @classmethod
    def like(cls, other: _BatchNorm) -> _SharedNorm:
        made = cls(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)
        made.training = other.training
        made.weight, made.bias = other.weight, other.bias
        for name, buffer in other.named_buffers(recurse=False):
            made.register_buffer(name, buffer)
        return made

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            evaluated: Tensor = super().forward(input)
            return evaluated
        normal, mean, variance, count = _Normal.apply(input, self.eps)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            part = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean, part)
                self.running_var.lerp_(variance * (count / (count - 1)), part)
        if self.affine:
            normal = normal * _over(self.weight, input) + _over(self.bias, input)
        answer: Tensor = normal.to(input.dtype)
        return answer


class _Normal(torch.autograd.Function):
    """x -> x' in float32, with mean, variance and the number of values to a channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, float]:
        x = x.float()
        sums = torch.cat([x.sum(_around(x)), x.new_tensor([x.numel() / x.shape[1]])])
        distributed.all_reduce(sums)
        mean, count = sums[:-1] / sums[-1], float(sums[-1])
        centred = x - _over(mean, x)
        squares = centred.square().sum(_around(x))
        distributed.all_reduce(squares)
        variance = squares / count
        inverse = (variance + eps).rsqrt()
        normal = centred * _over(inverse, x)
        ctx.save_for_backward(normal, inverse)
        ctx.count = count
        ctx.mark_non_differentiable(mean, variance)
        return normal, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        normal, inverse = ctx.saved_tensors
        gradient = gradients[0]
        sums = torch.stack([gradient.sum(_around(gradient)), (gradient * normal).sum(_around(gradient))])
        distributed.all_reduce(sums)
        shift, slope = sums / ctx.count
        return (gradient - _over(shift, normal) - normal * _over(slope, normal)) * _over(inverse, normal), None


def _around(x: Tensor) -> list[int]:
    """Every dimension but the channels'."""
    return [0, *range(2, x.ndim)]


def _over(values_C: Tensor, x: Tensor) -> Tensor:
    return values_C.view(1, -1, *[1] * (x.ndim - 2))
