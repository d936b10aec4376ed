from __future__ import annotations

import math

import pytest
import torch

from handlerlib import architectures
from handlerlib.errors import SpecError
from handlerlib.spec import Architecture, TermTable
from handlerlib.text_networks import EmbeddingBag
from training import text_start


def shape(name: str, table: TermTable | None, classes: int = 3) -> Architecture:
    return Architecture(name=name, channels=1, height=1, width=50, classes=classes, terms=table)


SHAPES = [
    shape("embedding_bag", TermTable(rows=20)),
    shape("embedding_bag", TermTable(rows=20, pooling="length")),
    shape("embedding_bag", TermTable(rows=20, width=8)),
    shape("text_cnn", TermTable(rows=20, width=8, filters=4, lengths=(1, 2, 3))),
]


@pytest.mark.parametrize("form", SHAPES)
def test_neither_padding_nor_the_batch_around_it_changes_an_answer(form: Architecture) -> None:
    torch.manual_seed(0)
    network = architectures.build(form).eval()
    if isinstance(network, EmbeddingBag):
        torch.nn.init.normal_(network.table)  # also the row of no term, which must not count
    alone = network(torch.tensor([[3, 7, 3]], dtype=torch.int32))
    padded = network(torch.tensor([[3, 7, 3, 0, 0, 0], [1, 2, 3, 4, 5, 6], [0] * 6], dtype=torch.int32))
    assert torch.allclose(alone[0], padded[0], atol=1e-6)
    assert padded.shape == (3, 3)
    assert bool(padded.isfinite().all())
    nothing = network(torch.tensor([[0]], dtype=torch.int32))
    assert torch.allclose(nothing[0], padded[2], atol=1e-6)


@pytest.mark.parametrize("form", SHAPES)
def test_an_empty_image_of_the_architectures_size_is_a_batch_too(form: Architecture) -> None:
    network = architectures.build(form).eval()
    assert network(torch.zeros(2, 1, 1, 50)).shape == (2, 3)
    assert network(torch.zeros(2, 1, 1, 50, dtype=torch.uint8)).shape == (2, 3)


def test_a_text_network_without_a_table_is_refused() -> None:
    with pytest.raises(SpecError, match=r"architecture\.terms is missing"):
        architectures.build(shape("embedding_bag", None))
    with pytest.raises(SpecError, match=r"terms\.width of at least 1"):
        architectures.build(shape("text_cnn", TermTable(rows=5)))


def test_the_pooling_is_what_it_says() -> None:
    terms = torch.tensor([[1, 2, 2, 0]])
    expected = {"sum": [1.0, 2.0, 2.0, 0.0], "mean": [0.2, 0.4, 0.4, 0.0], "length": [1 / 3, 2 / 3, 2 / 3, 0.0]}
    for pooling, shares in expected.items():
        network = EmbeddingBag(TermTable(rows=3, pooling=pooling), 2)  # type: ignore[arg-type]
        network.importance.copy_(torch.tensor([0.0, 1.0, 2.0]))
        assert network.shares(terms)[0].tolist() == pytest.approx(shares)


def test_the_weights_of_terms_are_scikit_learns() -> None:
    texts = [torch.tensor(terms) for terms in ([1, 2, 2], [1, 3], [1, 2])]
    found = text_start.inverse_frequency(texts, 5)
    expected = [0.0, *(math.log(4 / (1 + count)) + 1 for count in (3, 2, 1, 0))]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_start_answers_as_scikit_learns_naive_bayes() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.naive_bayes import MultinomialNB

    texts = ["the cat sat", "a cat and a dog", "the dog sat", "stocks fell", "stocks and bonds", "bonds rose"]
    targets = torch.tensor([0, 0, 0, 1, 1, 1])
    # No text holds a word twice: how often it comes is weighed otherwise here.
    texts[1] = "cat and dog"
    vectorizer = TfidfVectorizer(token_pattern=r"\w+")
    features = vectorizer.fit_transform(texts)
    judge = MultinomialNB(alpha=0.3).fit(features, targets.numpy())
    terms = [torch.tensor([1 + vectorizer.vocabulary_[word] for word in text.split()]) for text in texts]
    network = EmbeddingBag(TermTable(rows=1 + len(vectorizer.vocabulary_), pooling="length"), 2)
    with torch.no_grad():
        network.importance.copy_(text_start.inverse_frequency(terms, 1 + len(vectorizer.vocabulary_)))
        text_start.naive_bayes(network, terms, targets, 0.3)
        for text, row in zip(texts, terms, strict=True):
            got = network(row.unsqueeze(0)).softmax(dim=1)[0].tolist()
            assert got == pytest.approx(judge.predict_proba(vectorizer.transform([text]))[0].tolist(), abs=1e-5)
