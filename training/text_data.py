"""Labelled texts -> disjoint splits -> numbers of terms; what `training.data` is for images.

Texts that read the same after normalisation stay on one side of every split. The vocabulary, where the recipe wants one,
is made of the training split alone.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor

from handlerlib.spec import TextPreprocess
from handlerlib.text import Reader
from training import data, truth
from training.config import Recipe, Text
from training.data import Dataset, Found, Notes, Survey
from training.errors import DataError
from training.progress import Report, Step
from training.sources import Entry, Skipped

_BLOCK = 1000
_UNSPACED = re.compile(
    "[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]{3,}"
    "|[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff]{6,}"
)
"""Han characters and kana, and Thai, Lao, Burmese and Khmer, in a row longer than most of their words."""
_BY_CHARACTERS = "--set 'text.word_ngrams=[]' --set 'text.char_ngrams=[1,2,3]'"


def examine(entry: Entry) -> Found | Skipped:
    """Digest and length of one text. Raises DataError when it is not in the recipe's encoding."""
    try:
        content = entry.read()
    except OSError as error:
        return Skipped(entry.name, f"cannot be read: {error.strerror or error}")
    return Found(entry, hashlib.sha256(content).hexdigest(), (len(content), 1))


def prepare(surveyed: Survey, recipe: Recipe, *, report: Report, keep: bool) -> Dataset:
    """As `data.prepare`. Raises DataError when texts are empty, or a class has too few of them."""
    reader = Reader(_preprocess(recipe.text, buckets=1))
    found, cleaned, empty = _clean(surveyed.found, reader, report)
    if empty and recipe.data.empty == "refuse":
        raise DataError(
            f"nothing is left of {len(empty)} text{'s' * (len(empty) != 1)} after normalisation: "
            + data.some(one.name for one in empty),
            remedy="remove them, keep more of texts in [text], or --set data.empty=leave_out",
        )
    data.check_classes(found, surveyed.classes, [*surveyed.skipped, *empty], recipe)
    grouped = data.groups(found, [hashlib.sha256(text.encode()).digest() for text in cleaned])
    rows, removed = data.divide(found, grouped, recipe)
    data.check_splits(found, rows, surveyed.classes, recipe)
    unspaced = not recipe.text.char_ngrams and _unspaced(cleaned)
    advice = f"most texts have no spaces between words: {_BY_CHARACTERS} reads them by characters"
    notes = Notes(
        unreadable=(*surveyed.skipped, *empty),
        duplicates=len(found) - len(grouped),
        removed=tuple(found[row].entry.name for row in removed),
        conflicts=tuple(data.conflicts(found, grouped)),
        things="texts",
        advice=(advice,) if unspaced else (),
    )
    how = _preprocess(recipe.text, buckets=recipe.text.buckets or 1)
    terms: tuple[Tensor, ...] = ()
    if keep:
        if not recipe.text.buckets:
            train = (reader.terms(cleaned[row]) for row in rows["train"])
            how = _preprocess(recipe.text, vocabulary=_vocabulary(train, recipe.text, unspaced))
        # The texts as they came, not as they were cleaned: the very steps of a worker.
        terms = tuple(_numbers(found, Reader(how)))
    labels = [one.entry.label for one in found]
    targets_N, scaling = truth.learned(labels, surveyed.classes, recipe.task, rows["train"])
    return Dataset(
        images=tuple(found),
        classes=surveyed.classes,
        preprocess=None,  # type: ignore[arg-type]  # as in the spec
        x_NCHW=torch.empty(0),
        targets_N=targets_N,
        rows=rows,
        notes=notes,
        text=how,
        terms=terms,
        scaling=scaling,
    )


def _preprocess(text: Text, *, buckets: int = 0, vocabulary: Sequence[str] = ()) -> TextPreprocess:
    words = sorted(ENGLISH_STOP_WORDS) if text.stop_words == "english" else text.stop_words
    return TextPreprocess(
        html=text.html,
        unicode=text.unicode,
        case=text.case,
        punctuation=text.punctuation,
        digits=text.digits,
        stop_words=() if words == "none" else tuple(words),
        word_ngrams=text.word_ngrams,
        char_ngrams=text.char_ngrams,
        repeats=text.repeats,
        buckets=buckets,
        vocabulary=tuple(vocabulary),
        most_terms=text.most_terms,
        most_characters=text.most_characters,
    )


def _clean(found: Sequence[Found], reader: Reader, report: Report) -> tuple[list[Found], list[str], list[Skipped]]:
    """Texts of which something is left, what is left of them, and the others."""
    kept: list[Found] = []
    cleaned: list[str] = []
    empty: list[Skipped] = []
    for number, one in enumerate(found, start=1):
        text = reader.clean(one.entry.read().decode())
        if text:
            kept.append(one)
            cleaned.append(text)
        else:
            empty.append(Skipped(one.entry.name, "empty after normalisation"))
        if number % _BLOCK == 0 or number == len(found):
            report(Step("decode", number, len(found), ""))
    return kept, cleaned, empty


def _numbers(found: Sequence[Found], reader: Reader) -> Iterator[Tensor]:
    for one in found:
        numbers = reader.numbers(one.entry.read().decode())
        yield torch.tensor(list(numbers or ()), dtype=torch.int32)


def _unspaced(cleaned: Iterable[str]) -> bool:
    """Whether most characters stand in a row without spaces in a script that is written without them."""
    rows = characters = 0
    for text in cleaned:
        rows += sum(map(len, _UNSPACED.findall(text)))
        characters += len(text) - text.count(" ")
    return 2 * rows > characters


def _vocabulary(texts: Iterable[Iterable[str]], text: Text, unspaced: bool) -> list[str]:
    """Terms by the number of texts that hold them, ties in the order of their characters; the list itself sorted."""
    counts: Counter[str] = Counter()
    for terms in texts:
        counts.update(set(terms))
    enough = [(-count, term) for term, count in counts.items() if count >= text.least_texts]
    if not enough:
        raise DataError(
            f"no term is in {text.least_texts} training texts: there is no vocabulary",
            remedy=f"{_BY_CHARACTERS}: there are no spaces between words"
            if unspaced
            else "--set text.least_texts=1, give more texts, or hash terms with text.buckets",
        )
    return sorted(term for _, term in sorted(enough)[: text.vocabulary_size])
