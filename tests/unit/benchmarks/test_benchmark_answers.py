"""Systems that compute something else are found out."""

import math

import pytest

from benchmarks import answers

pytestmark = pytest.mark.unit

EXPECTED = [{"cat": 0.7, "dog": 0.2, "frog": 0.1}, {"dog": 0.51, "cat": 0.48, "frog": 0.01}]


def verdict(*got, tolerance=0.01, allowed=0):
    return answers.compare(EXPECTED, list(got), tolerance, allowed)


def test_the_same_answers_are_equal():
    found = verdict(*EXPECTED)
    assert found.equal
    assert (found.worst, found.same_label) == (0.0, 2)


def test_a_difference_within_the_tolerance_is_equal():
    assert verdict({"cat": 0.705, "dog": 0.2, "frog": 0.095}, EXPECTED[1]).equal


def test_a_difference_beyond_it_is_not():
    found = verdict({"cat": 0.66, "dog": 0.24, "frog": 0.1}, EXPECTED[1])
    assert not found.equal
    assert found.worst == pytest.approx(0.04)


def test_another_first_label_is_not_equal_though_each_probability_is_near():
    expected = [{"a": 0.36, "b": 0.33, "c": 0.31}]
    found = answers.compare(expected, [{"a": 0.345, "b": 0.348, "c": 0.307}], 0.02)
    assert found.equal  # closer than twice the tolerance: a tie
    found = answers.compare(expected, [{"a": 0.30, "b": 0.39, "c": 0.31}], 0.01)
    assert (found.same_label, found.equal) == (0, False)


def test_a_label_that_only_one_side_lists_counts_by_what_it_must_be_below():
    expected = [{"a": 0.5, "b": 0.2}]
    assert answers.compare(expected, [{"a": 0.5, "c": 0.2}], 0.01).equal
    found = answers.compare(expected, [{"a": 0.5, "c": 0.4}], 0.01)
    assert found.worst == pytest.approx(0.2)
    assert not found.equal


def test_an_answer_that_is_no_number_or_empty_is_not_equal():
    assert not verdict({"cat": math.nan, "dog": 0.2, "frog": 0.1}, EXPECTED[1]).equal
    assert not verdict({}, EXPECTED[1]).equal


def test_refusals_are_equal_only_where_they_are_expected():
    assert not verdict(None, EXPECTED[1]).equal
    assert verdict(None, EXPECTED[1], allowed=1).equal
    assert not verdict(None, None, allowed=2).equal
