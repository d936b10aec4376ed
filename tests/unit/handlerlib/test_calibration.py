"""Temperature: applied to probabilities it is softmax(z / T), and a spec holds it only when it does something."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from handlerlib import imaging, loading
from handlerlib.calibration import soften
from handlerlib.errors import SpecError
from handlerlib.spec import TEMPERATURES, ModelSpec
from support import images
from support.artifacts import write_artifact


@pytest.mark.parametrize("temperature", [*TEMPERATURES, 0.7, 1.7])
def test_softened_probabilities_are_the_softmax_of_divided_logits(temperature: float) -> None:
    logits = 12 * torch.randn(500, 10, generator=torch.Generator().manual_seed(1))
    found = soften(logits.softmax(dim=1), temperature)
    torch.testing.assert_close(found, (logits.double() / temperature).softmax(dim=1).float(), atol=1e-6, rtol=0)
    assert torch.equal(found.argmax(dim=1), logits.argmax(dim=1))


def test_temperature_one_changes_no_bit() -> None:
    given = torch.rand(3, 4)
    assert soften(given, 1.0) is given


def test_probabilities_that_float32_cannot_hold_stay_zero() -> None:
    """A logit 200 below the first: 0 in float32, 4e-18 at the highest temperature."""
    found = soften(torch.tensor([[0.0, -200.0]]).softmax(dim=1), TEMPERATURES[1])
    assert found.tolist() == [[1.0, 0.0]]


def test_the_key_is_in_the_file_only_when_it_does_something(tmp_path: Path) -> None:
    spec = ModelSpec.load(write_artifact(tmp_path))
    assert "temperature" not in json.loads(spec.to_json())
    warm = dataclasses.replace(spec, temperature=1.7)
    assert json.loads(warm.to_json())["temperature"] == 1.7
    assert ModelSpec.from_json(warm.to_json()) == warm


@pytest.mark.parametrize("wrong", [0.0, -1.0, 0.19, 5.1, "warm", True])
def test_other_temperatures_are_refused(wrong: object, tmp_path: Path) -> None:
    fields = json.loads(ModelSpec.load(write_artifact(tmp_path)).to_json()) | {"temperature": wrong}
    with pytest.raises(SpecError, match="temperature must be"):
        ModelSpec.from_json(json.dumps(fields))


def test_a_loaded_model_answers_at_its_temperature(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path)
    plain = loading.load(folder, torch.device("cpu"))
    spec = dataclasses.replace(plain.spec, temperature=2.5)
    (folder / "model_spec.json").write_text(spec.to_json())
    warm = loading.load(folder, torch.device("cpu"))
    x_BCHW = imaging.batch([images.photo(seed) for seed in range(8)], spec.preprocess, spec.limits)
    torch.testing.assert_close(warm.probabilities(x_BCHW), soften(plain.probabilities(x_BCHW), 2.5))
    assert not torch.allclose(warm.probabilities(x_BCHW), plain.probabilities(x_BCHW), atol=1e-3)
