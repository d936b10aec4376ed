"""Int8 as OpenVINO computes it: which of its two forms is taken, and by what images."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from handlerlib import loading
from handlerlib.spec import ModelSpec
from support.artifacts import write_artifact
from support.engines import photos
from training.optimize import openvino_rungs


def test_the_form_that_strays_less_on_other_images_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = write_artifact(tmp_path)
    spec = ModelSpec.load(artifact)
    model = openvino_rungs.convert(loading.read_network(artifact, spec), spec)
    x_NCHW = photos(20, spec.preprocess.height, spec.preprocess.width)
    seen: dict[bool, tuple[int, float]] = {}
    held_out = openvino_rungs.pixels_of(x_NCHW)[12:]
    expected = openvino_rungs.answers(model, held_out)
    make = openvino_rungs.with_biases

    def watched(model: object, images: list[object], transformer: bool, *, correct_biases: bool) -> object:
        made = make(model, images, transformer, correct_biases=correct_biases)
        strays = openvino_rungs.divergence(expected, openvino_rungs.answers(made, held_out))
        seen[correct_biases] = len(images), strays
        return made

    monkeypatch.setattr(openvino_rungs, "with_biases", watched)
    taken = openvino_rungs.quantise(model, x_NCHW)
    # Three fifths set ranges.
    assert {images for images, _ in seen.values()} == {12}
    found = openvino_rungs.divergence(expected, openvino_rungs.answers(taken, held_out))
    assert found == pytest.approx(min(strays for _, strays in seen.values()), rel=1e-6)
    assert seen[True][1] != seen[False][1]
    assert 0 < found < 0.01


def test_how_far_answers_stray_by_hand() -> None:
    expected = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert openvino_rungs.divergence(expected, expected) == 0
    # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75), and nothing for the second image.
    found = openvino_rungs.divergence(expected, torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    assert found == pytest.approx((0.5 * 0.693147 - 0.5 * 0.405465) / 2, abs=1e-6)
    assert openvino_rungs.divergence(expected, torch.full((2, 2), float("nan"))) == float("inf")


def test_how_far_labels_stray_by_hand() -> None:
    """Each label is a coin of its own: (0.5, 1.0) against (0.25, 1.0) is 0.5 ln 2 + 0.5 ln (2/3)."""
    expected, found = torch.tensor([[0.5, 1.0]]), torch.tensor([[0.25, 1.0]])
    strays = openvino_rungs.divergence(expected, found, "multi-label")
    assert strays == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    assert openvino_rungs.divergence(1 - expected, 1 - found, "multi-label") == pytest.approx(strays, abs=1e-6)
    with pytest.raises(ValueError, match="values"):
        openvino_rungs.divergence(expected, found, "regression")


def test_one_image_sets_the_ranges_and_judges(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path)
    spec = ModelSpec.load(artifact)
    model = openvino_rungs.convert(loading.read_network(artifact, spec), spec)
    x_1CHW = photos(1, spec.preprocess.height, spec.preprocess.width)
    assert openvino_rungs.answers(openvino_rungs.quantise(model, x_1CHW), openvino_rungs.pixels_of(x_1CHW)).shape == (
        1,
        len(spec.labels),
    )
