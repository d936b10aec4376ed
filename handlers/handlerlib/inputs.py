"""The steps from a request's bytes to a network's input, for whichever kind of input a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from handlerlib import text
from handlerlib.spec import Limits, ModelSpec, Preprocess


class Inputs(Protocol):
    """What training's evaluation and export do with samples, as a worker does it with requests."""

    def load(self, data: bytes | bytearray) -> Tensor:
        """One encoded input. Raises RequestError when it is at fault."""

    def stack(self, items: Sequence[Tensor]) -> Tensor:
        """Loaded inputs as one batch."""

    def network(self, batch: Tensor, device: torch.device) -> Tensor:
        """What the network takes, on `device`."""


def of(spec: ModelSpec) -> Inputs:
    """The spec's kind of input. Build it once for many inputs: of a text, it holds the vocabulary."""
    return Images(spec.preprocess, spec.limits) if spec.text is None else Texts(text.Reader(spec.text), spec.limits)


@dataclass(frozen=True, slots=True)
class Images:
    """Pixels, uint8 `[B, C, H, W]`."""

    preprocess: Preprocess
    limits: Limits

    def load(self, data: bytes | bytearray) -> Tensor:
        from handlerlib import imaging  # a worker for texts has no need of Pillow and torchvision

        return imaging.load(data, self.preprocess, self.limits)

    def stack(self, items: Sequence[Tensor]) -> Tensor:
        from handlerlib import imaging

        return imaging.stack(items)

    def network(self, batch: Tensor, device: torch.device) -> Tensor:
        from handlerlib import imaging

        return imaging.normalise(batch.to(device), self.preprocess)


@dataclass(frozen=True, slots=True)
class Texts:
    """Numbers of terms, int32 `[B, terms]`."""

    reader: text.Reader
    limits: Limits

    def load(self, data: bytes | bytearray) -> Tensor:
        return self.reader.load(data, self.limits)

    def stack(self, items: Sequence[Tensor]) -> Tensor:
        return text.stack(items)

    def network(self, batch: Tensor, device: torch.device) -> Tensor:
        return batch.to(device)
