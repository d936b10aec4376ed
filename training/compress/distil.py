"""Distillation: a student learns from the answers of a trained teacher, not from labels alone.

The loss is alpha T^2 KL(teacher_T || student_T) + (1 - alpha) cross entropy (Hinton et al., "Distilling the Knowledge
in a Neural Network", 2015), where _T is a softmax of logits divided by the temperature T, plus, for each hint, the
mean squared difference between a layer of the student, through a learned projection, and one of the teacher (Romero et
al., "FitNets: Hints for Thin Deep Nets", 2015; here trained together with the rest, not in a stage of its own).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handlerlib.errors import SpecError
from handlerlib.spec import WEIGHTS_FILE, Architecture, ModelSpec, Preprocess, closest
from training.config import Distil
from training.errors import RecipeError
from training.train import Loss

_STUDENT = "student."


@dataclass(frozen=True, slots=True)
class Teacher:
    """A trained network in evaluation mode, with what it takes and gives."""

    network: nn.Module
    spec: ModelSpec
    digest: str
    """SHA-256 of its weights: what a run's identity holds instead of its path."""

    def identity(self) -> dict[str, str]:
        """What provenance says of it."""
        return {"name": self.spec.name, "version": self.spec.version, "weights_sha256": self.digest}


class Learner(nn.Module):
    """A student with the projections of its hints, trained as one and then parted (`student_weights`)."""

    def __init__(self, student: nn.Module, projections: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.student = student
        self.projections = nn.ModuleList(projections)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.student(x_BCHW)
        return logits_BK


def load_teacher(folder: Path, labels: Sequence[str]) -> Teacher:
    """The teacher of an artifact or run folder. Raises RecipeError when it cannot teach these classes."""
    from training.export import load_network

    try:
        spec = ModelSpec.load(folder)
    except SpecError as error:
        raise RecipeError(
            f"distil.teacher {folder} is no artifact: {error}",
            remedy="give a folder such as artifacts/digits/1.0",
        ) from error
    if spec.labels != tuple(labels):
        raise RecipeError(
            f"distil.teacher {folder} knows the classes {', '.join(spec.labels[:5])}..., the data has"
            f" {', '.join(labels[:5])}...: a student can only learn the same classes in the same order",
            remedy="take a teacher that was trained on the same classes",
        )
    network = load_network(folder, spec).requires_grad_(False)
    return Teacher(network, spec, hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest())


def prepare(
    student: nn.Module, shape: Architecture, preprocess: Preprocess, teacher: Teacher, settings: Distil
) -> tuple[nn.Module, Loss]:
    """What `fit` trains (the student, or with hints a `Learner`), and the loss that it trains it with.

    Raises RecipeError when a hint names a layer that is not there or gives no single tensor of features.
    """
    mine = _Taps(student, [own for own, _ in settings.hints])
    theirs = _Taps(teacher.network, [their for _, their in settings.hints])
    adapt = _Adapter(preprocess, teacher.spec.preprocess)
    projections: list[nn.Module] = []
    if settings.hints:
        x_BCHW = torch.zeros(2, shape.channels, shape.height, shape.width)
        with torch.no_grad():
            student.eval()(x_BCHW)
            teacher.network.eval()(adapt(x_BCHW))
        projections = [_projection(a, b) for a, b in zip(mine.take(), theirs.take(), strict=True)]
    learner = Learner(student, projections) if settings.hints else student

    def loss(network: nn.Module, x_BCHW: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            taught_BK = teacher.network.to(x_BCHW.device).eval()(adapt(x_BCHW)).float()
        logits_BK = network(x_BCHW).float()
        total = blend(logits_BK, taught_BK, targets_B, settings.temperature, settings.alpha)
        if isinstance(network, Learner):
            pairs = zip(network.projections, mine.take(), theirs.take(), strict=True)
            total = total + settings.hint_weight * torch.stack([_hint(p, a, b) for p, a, b in pairs]).mean()
        return total, logits_BK

    return learner, loss


def blend(logits_BK: Tensor, taught_BK: Tensor, targets_B: Tensor, temperature: float, alpha: float) -> Tensor:
    """alpha T^2 KL(teacher_T || student_T) + (1 - alpha) cross entropy with the labels, the mean over the batch.

    T^2 keeps the soft part's gradient at the same scale whatever the temperature is (Hinton et al., section 2).
    """
    student = (logits_BK / temperature).log_softmax(dim=1)
    teacher = (taught_BK / temperature).log_softmax(dim=1)
    soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
    return alpha * soft + (1 - alpha) * F.cross_entropy(logits_BK, targets_B)


def student_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's part of what `fit` found for the network of `prepare`."""
    mine = {key.removeprefix(_STUDENT): value for key, value in weights.items() if key.startswith(_STUDENT)}
    return mine or dict(weights)


class _Adapter:
    """A batch as the student takes it -> as the teacher takes it: other statistics, another size."""

    def __init__(self, own: Preprocess, their: Preprocess) -> None:
        if own.channels != their.channels:
            raise RecipeError(
                f"distil.teacher takes images of {their.channels} channels, the student of {own.channels}",
                remedy="--set data.channels=" + str(their.channels),
            )
        self._size = (their.height, their.width)
        self._same = (own.mean, own.std) == (their.mean, their.std)
        self._statistics = [
            torch.tensor(values).view(-1, 1, 1) for values in (own.mean, own.std, their.mean, their.std)
        ]

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        if not self._same:
            own_mean, own_std, mean, std = (values.to(x_BCHW.device) for values in self._statistics)
            x_BCHW = (x_BCHW * own_std + own_mean - mean) / std
        if tuple(x_BCHW.shape[2:]) != self._size:
            x_BCHW = F.interpolate(x_BCHW, self._size, mode="bilinear", antialias=True)
        return x_BCHW


class _Taps:
    """The last outputs of the named layers of a network."""

    def __init__(self, network: nn.Module, paths: Sequence[str]) -> None:
        self._outputs: dict[int, Tensor] = {}
        layers = dict(network.named_modules())
        for index, path in enumerate(paths):
            if path not in layers:
                raise RecipeError(
                    f"distil.hints: there is no layer '{path}'{closest(path, layers)}",
                    remedy=f"layers at the top: {', '.join(name for name, _ in network.named_children())}",
                )
            layers[path].register_forward_hook(self._keeper(index))
        self._count = len(paths)

    def take(self) -> list[Tensor]:
        """In the order of the paths; each is forgotten here."""
        return [self._outputs.pop(index) for index in range(self._count)]

    def _keeper(self, index: int) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(_layer: nn.Module, _inputs: object, output: Tensor) -> None:
            self._outputs[index] = output

        return keep


def _projection(own: Tensor, their: Tensor) -> nn.Module:
    if own.ndim != their.ndim or own.ndim not in (2, 4):
        raise RecipeError(
            f"distil.hints: features of shape {tuple(own.shape[1:])} cannot be compared with {tuple(their.shape[1:])}",
            remedy="name two layers that both give feature maps, or both vectors",
        )
    if own.ndim == 2:
        return nn.Linear(own.shape[1], their.shape[1], bias=False)
    return nn.Conv2d(own.shape[1], their.shape[1], 1, bias=False)


def _hint(projection: nn.Module, own: Tensor, their: Tensor) -> Tensor:
    projected = projection(own).float()
    if projected.shape[2:] != their.shape[2:]:
        projected = F.adaptive_avg_pool2d(projected, (their.shape[2], their.shape[3]))
    return F.mse_loss(projected, their.float())
