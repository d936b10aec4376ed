"""Whatever a text holds: it is read, cleaning what is clean changes nothing, and everyone reads it alike."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from handlerlib import inputs, payload
from handlerlib.errors import RequestError
from handlerlib.spec import Limits, TextPreprocess
from handlerlib.text import FIRST_TERM, Reader
from handlerlib.text_payload import TEXT

RULES = st.builds(
    TextPreprocess,
    html=st.booleans(),
    unicode=st.sampled_from(("NFKC", "NFC", "none")),
    case=st.sampled_from(("fold", "lower", "keep")),
    punctuation=st.sampled_from(("space", "remove", "keep")),
    digits=st.sampled_from(("keep", "zero", "remove")),
    stop_words=st.sampled_from(((), ("a", "the", "ß"))),
    word_ngrams=st.sampled_from(((1,), (1, 2), (2, 4))),
    char_ngrams=st.sampled_from(((), (1, 3))),
    repeats=st.sampled_from(("once", "all")),
    buckets=st.integers(1, 1 << 28),
)
MARKUP = st.lists(
    st.sampled_from(
        [
            "<",
            ">",
            "&",
            "#",
            ";",
            "amp",
            "lt",
            "&lt;",
            "#39;",
            "<b>",
            "<script>",
            "</script>",
            "<!--",
            "-->",
            "x",
            "1",
            " ",
        ]
    ),
    max_size=30,
).map("".join)
TEXTS = st.one_of(st.text(), st.text(st.characters()), MARKUP, st.text("ßΣςſKİıﬁｱﾞ゙́ͅ각'’़क"))
LIMITS = Limits(max_bytes=200)


@given(TEXTS, RULES)
def test_any_text_is_cleaned_and_cleaning_again_changes_nothing(text: str, rules: TextPreprocess) -> None:
    reader = Reader(rules)
    once = reader.clean(text)
    assert reader.clean(once) == once
    once.encode()  # no half of a surrogate pair is left


@given(TEXTS, RULES)
def test_numbers_are_those_of_the_terms(text: str, rules: TextPreprocess) -> None:
    reader = Reader(rules)
    found = reader.numbers(text)
    assert (found is None) == (not reader.words(text))
    if found is not None:
        assert all(FIRST_TERM <= number <= rules.buckets for number in found)
        terms = list(reader.terms(text))
        assert len(found) == min(len(terms), rules.most_terms) if rules.repeats == "all" else len(found) <= len(terms)


@given(TEXTS, RULES)
def test_two_readers_agree_and_a_vocabulary_of_all_terms_loses_none(text: str, rules: TextPreprocess) -> None:
    assert Reader(rules).numbers(text) == Reader(rules).numbers(text)
    terms = tuple(dict.fromkeys(Reader(rules).terms(text)))
    if terms:
        known = {field: getattr(rules, field) for field in ("html", "unicode", "case", "punctuation", "digits")}
        reader = Reader(
            TextPreprocess(
                **known,
                stop_words=rules.stop_words,
                word_ngrams=rules.word_ngrams,
                char_ngrams=rules.char_ngrams,
                vocabulary=terms,
            )
        )
        assert list(reader.numbers(text) or ()) == list(range(1, len(terms) + 1))[: rules.most_terms]


@given(st.binary(max_size=300) | TEXTS.map(lambda text: text.encode("utf-8", "replace")), st.text(max_size=40))
def test_a_request_is_read_or_refused_and_nothing_else(body: bytes, charset: str) -> None:
    reader = Reader(TextPreprocess(buckets=100))
    try:
        request = payload.parse({"body": body}, {"content-type": f"text/plain; charset={charset}"}, LIMITS, TEXT)
        for one in request.instances:
            inputs.Texts(reader, LIMITS).load(one)
    except RequestError as error:
        assert 400 <= error.status < 500


@given(
    st.recursive(st.none() | st.integers() | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_any_json_is_read_or_refused(instance: object) -> None:
    try:
        payload.parse({"body": {"instances": [instance]}}, {"content-type": "application/json"}, LIMITS, TEXT)
    except RequestError as error:
        assert 400 <= error.status < 500
