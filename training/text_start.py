"""A text network before its first step: what the training texts say about each term."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from handlerlib.spec import Architecture, TermTable, TextPreprocess
from handlerlib.text_networks import EmbeddingBag, TextCnn
from training.config import Model
from training.data import Dataset
from training.errors import RecipeError


def architecture(dataset: Dataset, text: TextPreprocess, model: Model) -> Architecture:
    """The recipe's network for this data's terms and classes."""
    return Architecture(
        name=model.architecture,
        channels=1,
        height=1,
        width=text.most_terms,
        classes=len(dataset.classes),
        dropout=model.dropout,
        terms=TermTable(
            rows=text.rows, width=model.width, pooling=model.pooling, filters=model.filters, lengths=model.lengths
        ),
    )


@torch.no_grad()
def prepare(network: nn.Module, dataset: Dataset, model: Model) -> None:
    """Set the weights of terms and, where the recipe wants it, the naive Bayes start. Raises RecipeError."""
    texts = [dataset.terms[row].long() for row in dataset.rows["train"]]
    if isinstance(network, EmbeddingBag) and model.idf:
        network.importance.copy_(inverse_frequency(texts, len(network.importance)))
    if not model.naive_bayes:
        return
    targets_N = dataset.targets_N[list(dataset.rows["train"])]
    if isinstance(network, EmbeddingBag):
        naive_bayes(network, texts, targets_N, model.naive_bayes)
    elif isinstance(network, TextCnn):
        classes = len(dataset.classes)
        if model.width < classes:
            raise RecipeError(
                f"model.naive_bayes gives each term a number per class, {classes}, and model.width is {model.width}",
                remedy=f"--set model.width={max(64, classes)}, or --set model.naive_bayes=0",
            )
        rows = len(network.table.weight)
        sums_KV = torch.zeros(classes, rows, dtype=torch.float64)
        for terms, target in zip(texts, targets_N.tolist(), strict=True):
            sums_KV[target][torch.unique(terms)] += 1
        network.table.weight[:, :classes] = log_ratios(sums_KV, model.naive_bayes).T.float()


def inverse_frequency(texts: list[Tensor], rows: int) -> Tensor:
    """float32 `[rows]`: ln((1 + texts) / (1 + texts with the term)) + 1, and 0 for no term.

    Sparck Jones (1972), in the smoothed form of scikit-learn's TfidfTransformer.
    """
    counts = torch.bincount(torch.cat([torch.unique(terms) for terms in texts]), minlength=rows)
    weights = (1 + math.log(1 + len(texts)) - torch.log1p(counts.double())).float()
    weights[0] = 0
    return weights


def naive_bayes(network: EmbeddingBag, texts: list[Tensor], targets_N: Tensor, smoothing: float) -> None:
    """Make a linear network the multinomial naive Bayes classifier of its training texts.

    Row t of class k becomes what `log_ratios` says of the weights f that the network gives a text's terms, summed over the
    texts of k, and the bias becomes log p(k) (Manning, Raghavan and Schuetze 2008, chapter 13; as a start for a
    discriminative model: Wang and Manning 2012, "Baselines and Bigrams").
    """
    classes = network.table.shape[1]
    sums_KV = torch.zeros(classes, len(network.table), dtype=torch.float64)
    for terms, target in zip(texts, targets_N.tolist(), strict=True):
        sums_KV[target].index_add_(0, terms, network.shares(terms.unsqueeze(0))[0].double())
    network.table.copy_(log_ratios(sums_KV, smoothing).T)
    priors_K = torch.bincount(targets_N, minlength=classes).double() / len(targets_N)
    network.head.bias.copy_(priors_K.log())  # type: ignore[operator]


def log_ratios(sums_KV: Tensor, smoothing: float) -> Tensor:
    """float64 `[classes, terms]`: log p(t | k) - mean_j log p(t | j).

    p(t | k) = (smoothing + sums_kt) / (the same summed over the terms that occur). Taking the mean away, which changes no
    answer, leaves terms that no training text has without a say: 0.
    """
    occurs_V = sums_KV.sum(dim=0) > 0
    smooth_KV = torch.where(occurs_V, sums_KV + smoothing, 1.0)
    log_KV = (smooth_KV / (smooth_KV * occurs_V).sum(dim=1, keepdim=True)).log()
    return torch.where(occurs_V, log_KV - log_KV.mean(dim=0), 0.0)
