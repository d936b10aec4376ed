"""What every measured program computes: an encoded photo in, the five most probable labels out, in two ways.

`Documented` is what tutorials do: Pillow, torchvision's transforms, float32, eager. `Optimised` is Marina's own code: its
handler's decode, its batch, its engine. Peers with "Marina's model inside" call this very class.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

import handlerlib.lean  # noqa: F401 - before anything that imports torchvision itself, as in the worker
from benchmarks.errors import BenchmarkError
from handlerlib import answers, architectures, loading
from handlerlib.answers import Ranked
from handlerlib.engines import use_threads
from handlerlib.loading import LoadedModel
from handlerlib.spec import WEIGHTS_FILE, ModelSpec, Preprocess
from image_classifier import ImageClassifier

TOP = 5
Answer = dict[str, float]
"""Label -> probability, of the TOP most probable ones."""


class Classifier(Protocol):
    """Decode apart from inference, because servers batch between the two."""

    def decode(self, data: bytes) -> Tensor:
        """Encoded photo -> one input of the network."""

    def classify(self, items: Sequence[Tensor]) -> list[Answer]:
        """Inputs -> one answer each, in order."""


class Documented:
    """As tutorials have it, with torch's own default number of threads."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        spec = ModelSpec.load(folder)
        self.labels = spec.labels
        self.transform = transform_of(spec.preprocess)
        self.network = architectures.build(spec.architecture)
        self.network.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))
        self.network.eval().to(device)
        self.device = device

    def decode(self, data: bytes) -> Tensor:
        """Encoded photo -> float32 `[3, H, W]`. Grey photos become RGB, without which the network refuses them."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return self.transform(image)

    def classify(self, items: Sequence[Tensor]) -> list[Answer]:
        """float32 `[3, H, W]` each -> answers."""
        with torch.no_grad():
            logits = self.network(torch.stack(list(items)).to(self.device))
        found = torch.topk(torch.nn.functional.softmax(logits, dim=1), min(TOP, len(self.labels)), dim=1)
        return [
            {self.labels[index]: probability for index, probability in zip(indices, row, strict=True)}
            for indices, row in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]


class Optimised:
    """Marina's decode, batch, engine and ranking, as its worker calls them, on `threads` threads (0: torch's number)."""

    def __init__(self, model: LoadedModel, threads: int = 0) -> None:
        self.threads = threads or torch.get_num_threads()
        self.handler = ImageClassifier()
        self.handler.model = model
        self.spec = model.spec
        self.renderer = answers.Renderer(self.spec.name, self.spec.version, self.spec.labels)

    @classmethod
    def load(cls, folder: Path, threads: int = 0, device: str = "cpu") -> Self:
        """From an artifact. Raises BenchmarkError when the artifact's engine is not the one that would answer."""
        model = loading.load(folder, torch.device(device))
        if model.serving.fallback is not None:
            raise BenchmarkError(
                f"the engine {model.serving.packed} does not answer here: {model.serving.detail}",
                remedy="compare engines on the machine that they were built for",
            )
        return cls(model, threads)

    def decode(self, data: bytes) -> Tensor:
        """Encoded photo -> uint8 `[3, H, W]`, on one thread, as in the worker."""
        use_threads(1)
        return self.handler.decode(data)

    def classify(self, items: Sequence[Tensor]) -> list[Answer]:
        """uint8 `[3, H, W]` each -> answers."""
        labels = self.spec.labels
        return [
            {labels[index]: probability for index, probability in zip(*ranked, strict=True)}
            for ranked in self._ranked(items)
        ]

    def answer(self, items: Sequence[Tensor]) -> list[bytes]:
        """uint8 `[3, H, W]` each -> the bodies of Marina's answers, for the limit without a server."""
        return [self.renderer.document([(ranked, TOP)]) for ranked in self._ranked(items)]

    def warm_up(self, sizes: Sequence[int]) -> None:
        """One pass of every batch size that will come."""
        shape = self.spec.architecture
        for size in sizes:
            self.classify([torch.zeros(shape.channels, shape.height, shape.width, dtype=torch.uint8)] * size)

    def _ranked(self, items: Sequence[Tensor]) -> list[Ranked]:
        return answers.rank(self.handler.model.probabilities(self.handler.to_batch(items), self.threads), TOP)


def transform_of(preprocess: Preprocess) -> Callable[[Image.Image], Tensor]:
    """The spec's preprocessing in torchvision's terms, which only the documented form pays for."""
    from torchvision import transforms

    size = (preprocess.height, preprocess.width)
    if preprocess.resize == "stretch":
        fit = [transforms.Resize(size)]
    else:
        fit = [transforms.Resize(round(min(size) / preprocess.crop_fraction)), transforms.CenterCrop(size)]
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(
        [*fit, transforms.ToTensor(), transforms.Normalize(list(preprocess.mean), list(preprocess.std))]
    )
    return composed
