"""Figures of a form."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from handlerlib.spec import Architecture
from training.compress import measure


def test_a_paired_difference_and_its_interval_by_hand() -> None:
    before = torch.tensor([True] * 90 + [False] * 10)
    after = torch.tensor([True] * 86 + [False] * 4 + [True] * 1 + [False] * 9)
    found = measure.compare(before, after)
    assert (found.before, found.after, found.images) == (90.0, 87.0, 100)
    assert found.loss == pytest.approx(3.0)
    middle, error = 3 / 102, math.sqrt(4.5 + 1.5 - 9 / 102) / 102
    assert found.low == pytest.approx(100 * (middle - 1.959964 * error))
    assert found.high == pytest.approx(100 * (middle + 1.959964 * error))


def test_equal_answers_still_leave_an_interval() -> None:
    right = torch.tensor([True] * 179)
    found = measure.compare(right, right)
    assert found.loss == 0
    assert found.low < 0 < found.high < 2


def test_work_and_weight_by_hand(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16, 5))
    shape = Architecture(name="tiny_cnn", channels=3, height=4, width=4, classes=5)
    network[0].weight.data[:4] = 0
    (tmp_path / "weights").write_bytes(b"\0" * 1000)
    found = measure.size(network.train(), shape, [tmp_path / "weights"])
    assert found.multiply_adds == 3 * 8 * 9 * 16 + 8 * 16 * 5
    assert found.parameters == 3 * 8 * 9 + 128 * 5 + 5
    assert found.nonzero == found.parameters - 4 * 27
    assert found.weights_bytes == 1000
    assert found.compressed_bytes < 50
    assert network.training
