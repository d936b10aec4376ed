"""Texts to numbers: the rules that `model_spec.json` names, and numbers that must never change."""

from __future__ import annotations

import dataclasses
import encodings

import pytest
import torch

from handlerlib.errors import PayloadTooLarge, UnprocessableInput, UnsupportedMedia
from handlerlib.spec import Limits, SpecError, TextPreprocess
from handlerlib.text import Reader, decode, stack

LIMITS = Limits(max_bytes=1000)
PLAIN = TextPreprocess(buckets=1 << 20)


def clean(text: str, **rules: object) -> str:
    return Reader(TextPreprocess(buckets=8, **rules)).clean(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<p class='x'>Two<br/>words</p>", "two words"),
        ("AT&amp;T &lt;b&gt;rises&lt;/b&gt; &eacute;t&eacute;", "at t rises été"),
        ("Fool #39;s gold costs  #36;10", "fool s gold costs 10"),
        ("a<!-- hidden <b> -->b<script>if (x<y) z</script>c<style>p{}</style>d", "a b c d"),
        ("3 < 4 and 5 > 2", "3 4 and 5 2"),
        ("never <script> closed", "never closed"),
        ("don't stop", "don t stop"),
        ("１２ ﬁne Straße", "12 fine strasse"),
        ("İstanbul", "i̇stanbul"),
        ("zero\u200bwidth so\u00adft", "zerowidth soft"),
        ("tab\tline\r\nnul\x00end", "tab line nul end"),
        ("half \ud800 pair", "half pair"),
        ("हिन्दी में", "हिन्दी में"),
        ("我爱北京，天安门。", "我爱北京 天安门"),
        ("!!! ... 。", ""),
    ],
)
def test_what_is_left_of_a_text(text: str, expected: str) -> None:
    assert clean(text) == expected


@pytest.mark.parametrize(
    ("rules", "text", "expected"),
    [
        ({"html": False}, "<b>x</b> &amp;", "b x b amp"),
        ({"case": "keep"}, "Big Ben", "Big Ben"),
        ({"case": "lower"}, "Straße", "straße"),
        ({"punctuation": "remove"}, "don't U.S.A.", "dont usa"),
        ({"punctuation": "keep"}, "Well, no!", "well , no !"),
        ({"digits": "zero"}, "12 ٣ apples", "00 0 apples"),
        ({"digits": "remove"}, "a1b2 33", "a b"),
        ({"unicode": "none"}, "ﬁ", "fi"),
        ({"unicode": "NFC", "case": "keep"}, "ﬁe\u0301", "ﬁé"),
        ({"stop_words": ("the", "don't")}, "The end, don't", "end don t"),
    ],
)
def test_each_rule(rules: dict[str, object], text: str, expected: str) -> None:
    assert clean(text, **rules) == expected


def test_terms_are_n_grams_of_words_and_of_characters() -> None:
    reader = Reader(TextPreprocess(word_ngrams=(1, 2, 3), char_ngrams=(2,), buckets=8))
    assert list(reader.terms("One two, three")) == [
        "one", "two", "three", "one two", "two three", "one two three",
        " on", " ne", " tw", " wo", " th", " hr", " re", " ee",
    ]  # fmt: skip


def test_chinese_needs_no_spaces() -> None:
    reader = Reader(TextPreprocess(word_ngrams=(), char_ngrams=(1, 2), buckets=8))
    assert list(reader.terms("我爱北京。")) == [" 我", " 爱", " 北", " 京", " 我爱", " 爱北", " 北京"]


def test_the_hash_never_changes() -> None:
    # A trained table is only worth something with the numbers that it was trained with.
    assert list(Reader(PLAIN).numbers("Hello world") or ()) == HELLO_WORLD
    characters = TextPreprocess(word_ngrams=(), char_ngrams=(1, 2), buckets=1000)
    assert list(Reader(characters).numbers("北京") or ()) == BEIJING


# CRC-32 of "hello" is 907060870, of "world" 980881731, of "hello world" 222957957.
HELLO_WORLD = [42631, 463172, 659846]
BEIJING = [538, 40, 273]


def test_a_hashed_n_gram_is_the_hash_of_its_words_joined_by_a_space() -> None:
    from zlib import crc32

    how = TextPreprocess(word_ngrams=(1, 2, 3, 4), char_ngrams=(3,), buckets=10_007, repeats="all")
    reader, text = Reader(how), "a few more words than four in a row"
    assert list(reader.numbers(text) or ()) == [crc32(term.encode()) % 10_007 + 1 for term in reader.terms(text)]


def test_a_vocabulary_numbers_its_terms_and_leaves_out_others() -> None:
    reader = Reader(TextPreprocess(vocabulary=("alpha", "alpha beta", "gamma")))
    assert list(reader.numbers("Alpha beta gamma alpha") or ()) == [1, 3, 2]
    unknown = reader.numbers("delta")
    assert unknown is not None and len(unknown) == 0
    assert reader.load(b"delta", LIMITS).shape == (0,)


def test_repeats() -> None:
    once = Reader(TextPreprocess(vocabulary=("x", "y"), word_ngrams=(1,)))
    every = Reader(TextPreprocess(vocabulary=("x", "y"), word_ngrams=(1,), repeats="all", most_terms=3))
    assert list(once.numbers("y x y") or ()) == [2, 1]
    assert list(every.numbers("y x y x") or ()) == [2, 1, 2]


def test_errors_of_one_text() -> None:
    reader = Reader(PLAIN)
    with pytest.raises(PayloadTooLarge):
        reader.load(b"x" * 1001, LIMITS)
    with pytest.raises(UnsupportedMedia, match="no 'utf-8'"):
        reader.load(b"caf\xe9", LIMITS)
    for nothing in (b" \n", b"<br>", "。！".encode()):
        with pytest.raises(UnprocessableInput, match="nothing is left"):
            reader.load(nothing, LIMITS)


def test_charsets() -> None:
    assert decode(b"caf\xe9", "latin-1") == "café"
    assert decode("北京".encode("gb18030"), "gb18030") == "北京"
    assert decode(b"\xef\xbb\xbfx") == "x"
    for name in ("klingon", "idna", "punycode", "unicode_escape", "hex", "x" * 5000, "a\x00b"):
        with pytest.raises(UnsupportedMedia, match="charset"):
            decode(b"x", name)


def test_every_charset_of_python_is_known_by_each_of_its_spellings() -> None:
    for name in (
        "utf-8-sig",
        "UTF_16",
        "koi8-u",
        "cp874",
        "Shift_JIS",
        "windows-1252",
        "iso8859.1",
        "ANSI_X3.4-1986",
        "latin 1",
        "l1",
    ):
        assert decode("abc".encode(name), name) == "abc", name


def test_no_charset_that_a_client_makes_up_is_kept() -> None:
    kept = encodings._cache  # type: ignore[attr-defined]
    decode(b"x", "latin-1")
    before = len(kept)
    for number in range(100):
        with pytest.raises(UnsupportedMedia):
            decode(b"x", f"x{number}" + "a" * 4000)
        assert decode(b"x", "latin" + "-" * (number + 1) + "1") == "x"
    assert len(kept) == before


def test_stack_fills_up_with_zeros() -> None:
    items = [torch.tensor(row, dtype=torch.int32) for row in ([3, 1], [], [2])]
    assert stack(items).tolist() == [[3, 1], [0, 0], [2, 0]]
    assert stack(items[1:2]).tolist() == [[0]]
    assert stack(items).dtype == torch.int32


@pytest.mark.parametrize("piece", ["<", "&", "<script>", "<!--", "&amp;", "<a", "#1;", "</", "&#", "\u0345\u0301"])
def test_no_text_takes_longer_than_its_length_warrants(piece: str) -> None:
    """A step whose time grows with the square of the length would not end before the test's own limit."""
    reader = Reader(dataclasses.replace(PLAIN, most_characters=600_000))
    reader.words(piece * (600_000 // len(piece)))


def test_a_text_is_looked_at_as_far_as_its_rules_say() -> None:
    reader = Reader(dataclasses.replace(PLAIN, most_characters=5, most_terms=2))
    assert reader.clean("one two three") == "one t"
    assert len(reader.numbers("a b c") or ()) == 2


def test_its_normal_form_makes_no_text_longer_than_they_say() -> None:
    reader = Reader(dataclasses.replace(PLAIN, most_characters=1000))
    assert 900 < len(reader.clean("\ufdfa" * 1000)) <= 1000
    assert reader.clean("\ufdfa") == "صلى الله عليه وسلم"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"buckets": 8, "vocabulary": ("a",)}, "text.buckets"),
        ({}, "text.buckets"),
        ({"buckets": 8, "word_ngrams": (2, 1)}, "text.word_ngrams must be ascending"),
        ({"buckets": 8, "word_ngrams": ()}, "one length at least"),
        ({"vocabulary": ("a", "a")}, "text.vocabulary must be distinct"),
    ],
)
def test_wrong_rules_are_named(rules: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        TextPreprocess(**rules)  # type: ignore[arg-type]
