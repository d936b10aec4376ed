"""Structured pruning of a text model: terms leave the vocabulary, and their rows leave the table.

What a term weighs is how far its row can move one class's logit against another's, times the training texts that hold
it: the sum of what its leaving can do to the training split. A text that loses terms is divided by the length of what is
left, as if they had never been known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from handlerlib.spec import Architecture, ModelSpec, TextPreprocess
from handlerlib.text_networks import EmbeddingBag

_LEAST_TERMS = 2


@dataclass(frozen=True, slots=True)
class Fewer:
    """A model with some of its terms."""

    weights: dict[str, Tensor]
    shape: Architecture
    text: TextPreprocess


def obstacle(spec: ModelSpec) -> str:
    """Why no term can leave; empty when some can."""
    if spec.text is None or spec.architecture.name != "embedding_bag":
        return f"no terms of {spec.architecture.name} can be taken out alone: it looks at terms in a row"
    if not spec.text.vocabulary:
        return "its terms are hashed: there is no vocabulary to take any out of; train with fewer buckets"
    return ""


def importance(network: nn.Module, texts: Iterable[Tensor]) -> Tensor:
    """Float `[rows]`; `texts` are the training split's numbers of terms, int32 `[terms]` each."""
    assert isinstance(network, EmbeddingBag)
    table = network.table.detach()
    logits = table @ network.head.weight.detach().T if isinstance(network.head, nn.Linear) else table
    spread = (logits.amax(1) - logits.amin(1)) * network.importance
    seen = torch.zeros(len(table))
    for numbers in texts:
        seen += torch.bincount(torch.unique(numbers).long(), minlength=len(table))
    return spread * seen


def without(network: nn.Module, spec: ModelSpec, scores: Tensor, share: float) -> Fewer:
    """Take the `share` of terms with the lowest scores out; row 0, for no term, stays. Ties stay in their order."""
    assert spec.text is not None and spec.architecture.terms is not None
    count = max(_LEAST_TERMS, round((1 - share) * len(spec.text.vocabulary)))
    kept = scores[1:].sort(descending=True, stable=True).indices[:count].sort().values
    rows = torch.cat([torch.zeros(1, dtype=torch.int64), kept + 1])
    weights = dict(network.state_dict())
    weights |= {name: weights[name][rows].clone() for name in ("table", "importance")}
    terms = dataclasses.replace(spec.architecture.terms, rows=len(rows))
    vocabulary = tuple(spec.text.vocabulary[index] for index in kept.tolist())
    return Fewer(
        weights,
        dataclasses.replace(spec.architecture, terms=terms),
        dataclasses.replace(spec.text, vocabulary=vocabulary),
    )
