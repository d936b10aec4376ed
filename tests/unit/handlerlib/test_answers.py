from __future__ import annotations

import heapq
import json

import pytest
import torch

from handlerlib import answers


@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
@pytest.mark.parametrize("count", [1, 5, 10, 1000])
@pytest.mark.parametrize("levels", [2, 7, 10**6])
def test_ranks_as_a_sort_by_probability_and_index(classes: int, count: int, levels: int) -> None:
    torch.manual_seed(classes + count)
    rows_BK = torch.randint(0, levels, (9, classes)).float() / levels  # few levels: many ties
    for row, (indices, probabilities) in zip(rows_BK.tolist(), answers.rank(rows_BK, count), strict=True):
        expected = heapq.nlargest(count, range(classes), key=row.__getitem__)
        assert indices == expected
        assert probabilities == [row[index] for index in expected]


def test_the_document_is_what_json_would_write() -> None:
    labels = ('say "cheese"', "naïve, 猫", "back\\slash\n")
    rows_BK = torch.tensor([[1e-9, 0.12345678901, 0.5], [1.0, 0.0, 0.0]])
    document = answers.Renderer('m"1', "1.0", labels).document(
        zip(answers.rank(rows_BK, 3), (3, 1), strict=True),
    )
    expected = {
        "model": 'm"1',
        "version": "1.0",
        "predictions": [
            [
                {"label": labels[i], "index": i, "probability": round(rows_BK[0].tolist()[i], 8)}
                for i in (2, 1, 0)
            ],
            [{"label": labels[0], "index": 0, "probability": 1.0}],
        ],
    }  # fmt: skip
    assert document == json.dumps(expected, ensure_ascii=False, separators=(",", ":")).encode()


def test_one_bad_number_marks_its_row_alone() -> None:
    rows_BK = torch.full((4, 3), 1 / 3)
    rows_BK[1, 2], rows_BK[2, 0] = float("nan"), float("inf")
    assert answers.finite(rows_BK) == [True, False, False, True]
