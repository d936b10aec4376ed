"""The bytes of a text -> the numbers of its terms. Training, evaluation, golden tests and the worker all come through here.

    bytes -> str -> markup removed -> Unicode, case, marks, digits -> words -> n-grams -> one number per term

A term is an n-gram of words or of characters. Its number is its line in the vocabulary, or CRC-32 (ISO 3309, as zlib has
it) of its UTF-8 bytes modulo the number of buckets, in both cases plus 1: number 0 fills up short texts in a batch. The
words of a term are joined by one space; an n-gram of characters has a space before it, so that no term is of both kinds.
Every step takes time in proportion to the text's length. Standard library only, but for the tensors at the end.
"""

from __future__ import annotations

import codecs
import encodings.aliases
import functools
import html
import pkgutil
import re
import unicodedata
from array import array
from collections.abc import Sequence
from itertools import pairwise
from zlib import crc32

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from handlerlib.errors import PayloadTooLarge, UnprocessableInput, UnsupportedMedia
from handlerlib.spec import Limits, TextPreprocess

PADDING = 0
"""Number of no term."""
FIRST_TERM = 1
_TAG = re.compile(r"<[A-Za-z/!?][^<>]*>")
_HIDDEN_OPEN = re.compile(r"<(?:(script|style)\b[^<>]*>|(!--))", re.IGNORECASE)
_HIDDEN_CLOSE = {
    "script": re.compile(r"</script\s*>", re.IGNORECASE),
    "style": re.compile(r"</style\s*>", re.IGNORECASE),
    "!--": re.compile(r"-->"),
}
# Old corpora have lost the ampersand of many: `Fool #39;s gold`.
_BARE_ENTITY = re.compile(r"(?<!&)#(\d{1,7}|[xX][0-9a-fA-F]{1,6});")
_MARKUP = ("<", "&", "#")
_LEFT_OVER = str.maketrans("<>&", "   ")
_MOST_ROUNDS = 8
_MOST_MARKS = 30
# Combining marks are no word characters to `re`.
_MARKS_IN_A_ROW = re.compile(rf"[^\w\s]{{{_MOST_MARKS + 1},}}")
_NO_CHARSETS = frozenset(
    ["idna", "mbcs", "oem", "punycode", "raw_unicode_escape", "undefined", "unicode_escape", "utf_7"]
)
"""Codecs of Python that no client means, some of which take long for what they do."""


class Reader:
    """Reads texts for one model. May be used by several threads at once."""

    def __init__(self, how: TextPreprocess) -> None:
        self.how = how
        self._characters = _Characters(how)
        stop_words = (self._folded(word).split() for word in how.stop_words)
        # A stop word that the rules above take apart would take its parts along: `don't` -> `don`, `t`.
        self._stop_words = frozenset(words[0] for words in stop_words if len(words) == 1)
        self._numbers = {term: number for number, term in enumerate(how.vocabulary, FIRST_TERM)}

    def load(self, data: bytes | bytearray, limits: Limits) -> Tensor:
        """UTF-8 bytes -> int32 `[terms]`, at most `how.most_terms`; empty when no term is in the vocabulary.

        Raises PayloadTooLarge (413), UnsupportedMedia (415) for bytes that are no UTF-8 and UnprocessableInput (422)
        when nothing is left to read.
        """
        if len(data) > limits.max_bytes:
            raise PayloadTooLarge(f"the text has {len(data)} bytes, at most {limits.max_bytes} are accepted")
        found = self.numbers(decode(data))
        if found is None:
            raise UnprocessableInput("nothing is left of the text after its markup and marks are removed")
        return torch.frombuffer(found, dtype=torch.int32) if found else torch.empty(0, dtype=torch.int32)

    def clean(self, text: str) -> str:
        """The words that terms are made of, one space between them. Cleaning what is clean changes nothing."""
        return " ".join(self.words(text))

    def words(self, text: str) -> list[str]:
        """As `clean`, one by one. Takes any str, lone surrogates included."""
        text = text[: self.how.most_characters]
        if self.how.html and any(mark in text for mark in _MARKUP):
            text = _without_markup(text)
        words = self._folded(text).split()
        return [word for word in words if word not in self._stop_words] if self._stop_words else words

    def terms(self, text: str) -> list[str]:
        """Every term of the text, n-grams of words first, shorter ones before longer ones."""
        return self._terms(self.words(text))

    def numbers(self, text: str) -> array[int] | None:
        """The terms' numbers as int32, at most `how.most_terms` of them; None when the text has no word."""
        words = self.words(text)
        if not words:
            return None
        if self.how.vocabulary:
            # No number of a term is 0, so the filter leaves out the unknown ones alone.
            found = list(filter(None, map(self._numbers.get, self._terms(words))))
        else:
            found = self._hashed(words)
        if self.how.repeats == "once":
            found = list(dict.fromkeys(found))
        return array("i", found[: self.how.most_terms])

    def _terms(self, words: Sequence[str]) -> list[str]:
        found: list[str] = []
        for length in self.how.word_ngrams:
            if length == 1:
                found += words
            elif length == 2:
                found += [f"{first} {second}" for first, second in pairwise(words)]
            else:
                found += [" ".join(words[at : at + length]) for at in range(len(words) - length + 1)]
        for length in self.how.char_ngrams:
            for word in words:
                found += [f" {word[at : at + length]}" for at in range(len(word) - length + 1)]
        return found

    def _hashed(self, words: Sequence[str]) -> list[int]:
        buckets, found = self.how.buckets, []
        if self.how.word_ngrams:
            encoded = [word.encode() for word in words]
            spaced = [b" " + word for word in encoded]
            # CRC-32 of a text goes on from that of its beginning, so each n-gram costs its last word only.
            sums = [crc32(word) for word in encoded]
            for length in range(1, self.how.word_ngrams[-1] + 1):
                if length > 1:
                    sums = [crc32(word, before) for before, word in zip(sums, spaced[length - 1 :], strict=False)]
                if length in self.how.word_ngrams:
                    found += [value % buckets + FIRST_TERM for value in sums]
        if self.how.char_ngrams:
            grams = (
                f" {word[at : at + length]}".encode()
                for length in self.how.char_ngrams
                for word in words
                for at in range(len(word) - length + 1)
            )
            found += [crc32(gram) % buckets + FIRST_TERM for gram in grams]
        return found

    def _folded(self, text: str) -> str:
        """Normal form, case, and what stands for marks, digits and spaces."""
        how = self.how
        if text.isascii():
            if how.case != "keep":
                text = text.lower()
            return text.translate(self._characters)
        form = how.unicode
        if _MARKS_IN_A_ROW.search(text):
            text = _MARKS_IN_A_ROW.sub(_fewer_marks, text)
        # A letter's case can change its normal form, and a removed mark can bring two characters together: until nothing
        # changes, which is once or twice for nearly every text.
        for _ in range(_MOST_ROUNDS):
            before = text
            if form != "none":
                # One character may become eighteen.
                text = unicodedata.normalize(form, text)[: max(len(text), how.most_characters)]
            if how.case != "keep":
                text = text.casefold() if how.case == "fold" else text.lower()
            text = " ".join(text.translate(self._characters).split())
            if text == before:
                break
        return text


def decode(data: bytes | bytearray, charset: str = "utf-8") -> str:
    """Raises UnsupportedMedia (415) for bytes that are not of `charset`, or for one that is not known."""
    try:
        text = data.decode(charset if charset == "utf-8" else _codec(charset))
    except LookupError:
        raise UnsupportedMedia(f"unknown charset {charset[:40]!r}: send UTF-8") from None
    except (UnicodeError, ValueError):
        raise UnsupportedMedia(
            f"the bytes are no {charset[:40]!r}: send UTF-8, or name the charset in Content-Type"
        ) from None
    return text.removeprefix("\ufeff")


def _codec(charset: str) -> str:
    """Python's name of it. Raises LookupError. Python keeps every name that it is asked for, for ever, in whatever spelling
    and the unknown ones too, so that it is asked for few."""
    name = encodings.normalize_encoding(charset).lower()
    if name not in _known_codecs():
        name = name.replace(".", "_")
    if name not in _known_codecs() or codecs.lookup(name).name.replace("-", "_") in _NO_CHARSETS:
        raise LookupError(charset)
    return name


@functools.cache
def _known_codecs() -> frozenset[str]:
    modules = (module.name for module in pkgutil.iter_modules(encodings.__path__))
    return frozenset([*encodings.aliases.aliases, *modules])


def stack(items: Sequence[Tensor]) -> Tensor:
    """int32 `[terms]` each -> int32 `[B, most terms of any, at least 1]`, filled up with 0."""
    batch = pad_sequence(list(items), batch_first=True)
    return batch if batch.shape[1] else torch.zeros(len(items), 1, dtype=torch.int32)


def _fewer_marks(run: re.Match[str]) -> str:
    """At most as many combining marks in a row as the Stream-Safe Text Format has (Unicode Standard Annex #15, section
    13): to order them, normalising takes a time that grows with the square of their number."""
    kept: list[str] = []
    marks = 0
    for character in run[0]:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks <= _MOST_MARKS:
            kept.append(character)
    return "".join(kept)


def _without_markup(text: str) -> str:
    """Without tags, comments, scripts and styles, entities decoded. What then still looks like markup becomes spaces, so
    that cleaning twice is cleaning once."""
    if "<" in text:
        text = _TAG.sub(" ", _without_hidden(text))
    if "#" in text:
        text = _BARE_ENTITY.sub(r"&#\1;", text)
    if "&" in text:
        text = html.unescape(text)
        if "<" in text:  # markup that was itself escaped
            text = _TAG.sub(" ", _without_hidden(text))
    if "#" in text:
        text = _BARE_ENTITY.sub(" ", text)
    return text.translate(_LEFT_OVER)


def _without_hidden(text: str) -> str:
    """Without what a browser does not show. Something that is opened and never closed stays, for the tags' own rule."""
    kept: list[str] = []
    never_closed: set[str] = set()
    start = position = 0
    while found := _HIDDEN_OPEN.search(text, position):
        kind = (found[1] or found[2]).lower()
        # Looked for once only: a text of nothing but openings would otherwise take a time that grows with its square.
        closed = None if kind in never_closed else _HIDDEN_CLOSE[kind].search(text, found.end())
        if closed is None:
            never_closed.add(kind)
            position = found.end()
            continue
        kept += [text[start : found.start()], " "]
        start = position = closed.end()
    return "".join([*kept, text[start:]]) if kept else text


class _Characters(dict[int, str | None]):
    """A table for `str.translate`, filled when a character is first seen: what stands for it, by its general category."""

    def __init__(self, how: TextPreprocess) -> None:
        super().__init__()
        self._how = how

    def __missing__(self, code: int) -> str | None:
        self[code] = found = self._stands_for(chr(code))
        return found

    def _stands_for(self, character: str) -> str | None:
        """None where nothing does."""
        category = unicodedata.category(character)
        if category == "Cf":  # joiners, soft hyphens, direction marks: seen by nobody
            return None
        if category[0] in "ZC":
            return " "
        if category == "Nd" and self._how.digits != "keep":
            return "0" if self._how.digits == "zero" else " "
        if category[0] in "PS" and self._how.punctuation != "remove":
            return " " if self._how.punctuation == "space" else f" {character} "
        return None if category[0] in "PS" else character
