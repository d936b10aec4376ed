"""Networks that read the numbers of a text's terms.

They take int32 `[B, terms]`, filled up with 0 (`handlerlib.text.stack`), and return logits `[B, classes]`. An input with
more axes or of another type, such as an empty image of the architecture's size, is read as such a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handlerlib.errors import SpecError
from handlerlib.spec import Architecture, TermTable


class EmbeddingBag(nn.Module):
    """A weighted sum of the terms' rows: logits themselves, or through one linear layer (as fastText, Joulin et al. 2016,
    "Bag of Tricks for Efficient Text Classification"). Dropout drops terms (as Wager, Wang and Liang 2013, "Dropout
    Training as Adaptive Regularization", who classify texts with it)."""

    importance: Tensor
    """float32 `[rows]`: how much a term counts, 0 for row 0. Set before training, not learned."""

    def __init__(self, terms: TermTable, classes: int) -> None:
        super().__init__()
        self.pooling = terms.pooling
        self.table = nn.Parameter(torch.zeros(terms.rows, terms.width or classes))
        importance = torch.ones(terms.rows)
        importance[0] = 0
        self.register_buffer("importance", importance)
        self.dropout = nn.Dropout(0.0)
        if terms.width:
            # As fastText starts: small enough that the sum of many stays near 0.
            nn.init.uniform_(self.table, -1 / terms.width, 1 / terms.width)
            self.head: nn.Module = nn.Linear(terms.width, classes)
        else:
            self.head = _Bias(classes)

    def forward(self, x: Tensor) -> Tensor:
        x_BL = _terms(x)
        share_BL = self.dropout(self.shares(x_BL))
        summed_BD = F.embedding_bag(x_BL, self.table, mode="sum", per_sample_weights=share_BL)
        logits_BK: Tensor = self.head(summed_BD)
        return logits_BK

    def shares(self, x_BL: Tensor) -> Tensor:
        """The weight of each term in its text, float32 `[B, terms]`."""
        share_BL = F.embedding(x_BL, self.importance.unsqueeze(1)).squeeze(2)
        if self.pooling == "mean":
            return share_BL / share_BL.sum(dim=1, keepdim=True).clamp_min(1e-12)
        return F.normalize(share_BL, dim=1) if self.pooling == "length" else share_BL


class TextCnn(nn.Module):
    """Convolutions over terms in a row, the strongest answer of each pattern, dropout and one linear layer (Kim 2014,
    "Convolutional Neural Networks for Sentence Classification")."""

    def __init__(self, terms: TermTable, classes: int) -> None:
        super().__init__()
        self.lengths = terms.lengths
        self.table = nn.Embedding(terms.rows, terms.width, padding_idx=0)
        with torch.no_grad():
            # Small enough that a term's few updates outweigh the noise it starts with.
            self.table.weight.mul_(0.1)
        self.patterns = nn.ModuleList(
            nn.Conv1d(terms.width, terms.filters, length, padding=length - 1) for length in terms.lengths
        )
        self.head = nn.Sequential(nn.Dropout(0.0), nn.Linear(terms.filters * len(terms.lengths), classes))

    def forward(self, x: Tensor) -> Tensor:
        x_BL = _terms(x)
        # The strongest answer over what lies beyond a text would otherwise depend on the longest text of the batch: each
        # place counts that sees a term, or, where there is none, the first.
        seen_B1L = (x_BL != 0).unsqueeze(1).to(self.table.weight.dtype)
        x_BDL = self.table(x_BL).transpose(1, 2)
        strongest = []
        for length, layer in zip(self.lengths, self.patterns, strict=True):
            sees_B1P = F.max_pool1d(F.pad(seen_B1L, (length - 1, length - 1)), length, stride=1) > 0
            sees_B1P[..., 0] = True
            answers_BFP = layer(x_BDL).relu()
            strongest.append((answers_BFP * sees_B1P).amax(dim=2))
        logits_BK: Tensor = self.head(torch.cat(strongest, dim=1))
        return logits_BK


class _Bias(nn.Module):
    """x + bias."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, x_BK: Tensor) -> Tensor:
        return x_BK + self.bias


def embedding_bag(shape: Architecture) -> nn.Module:
    return EmbeddingBag(_table(shape), shape.classes)


def text_cnn(shape: Architecture) -> nn.Module:
    table = _table(shape)
    if table.width < 1:
        raise SpecError("architecture 'text_cnn' needs architecture.terms.width of at least 1")
    return TextCnn(table, shape.classes)


def _table(shape: Architecture) -> TermTable:
    if shape.terms is None:
        raise SpecError(f"architecture '{shape.name}' is for texts: architecture.terms is missing")
    return shape.terms


def _terms(x: Tensor) -> Tensor:
    x_BL = x.reshape(len(x), -1)
    return x_BL if x_BL.dtype in (torch.int32, torch.int64) else x_BL.int()
