"""Weights of fewer bits in their file, read as float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from handlerlib import loading, stored
from handlerlib.errors import SpecError
from handlerlib.spec import ModelSpec
from support.artifacts import write_artifact
from training.compress import storage
from training.compress.storage import Bits


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "table": torch.randn(1025, 3) * torch.tensor([1.0, 0.01, 100.0]),
        "wide.weight": torch.randn(7, 5, 3, 3) * torch.logspace(-3, 2, 7).view(7, 1, 1, 1),
        "wide.bias": torch.randn(7),
        "importance": torch.rand(2000) * 9,
        "batches": torch.tensor(3),
    }


def test_integers_of_four_bits_lie_as_the_format_says() -> None:
    # By hand: 8 + (-7, 7) -> 1 and 15, the first in the lower half; then 8 + 3, and 8 to fill up.
    file = {
        "table": torch.tensor([0xF1, 0x8B], dtype=torch.uint8),
        "table:scale": torch.tensor([[0.5]], dtype=torch.float16),
        "table:shape": torch.tensor([3, 1]),
    }
    assert stored.widen(file)["table"].tolist() == [[-3.5], [3.5], [1.5]]
    value = torch.tensor([[-3.5], [3.5], [1.5]])
    written = storage.narrow({"table": value}, 4)
    assert written["table"].tolist() == [0xF1, 0x8B]
    assert torch.equal(stored.widen(written)["table"], value)


@pytest.mark.parametrize(("bits", "share"), [(16, 0.55), (8, 0.36), (4, 0.28)])
def test_what_comes_back_is_off_by_half_a_step_at_most(tmp_path: Path, bits: Bits, share: float) -> None:
    whole = weights()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(storage.dump(whole, bits))
    assert path.stat().st_size < share * len(safetensors.torch.save(whole)) + 600
    back = stored.widen(safetensors.torch.load_file(path))
    assert {name: (value.shape, value.dtype) for name, value in back.items()} == {
        name: (value.shape, value.dtype) for name, value in whole.items()
    }
    # Short vectors and integers are left alone.
    assert torch.equal(back["wide.bias"], whole["wide.bias"])
    assert torch.equal(back["batches"], whole["batches"])
    steps = 2 ** (bits - 1) - 1
    # One scale per column of the narrow table, one per output of the wide kernel.
    for value, found in ((whole["table"].T, back["table"].T), (whole["wide.weight"], back["wide.weight"])):
        for one, other in zip(value, found, strict=True):
            assert float((one - other).abs().max()) <= 0.51 * float(one.abs().max()) / steps + 1e-3 * float(
                one.abs().max()
            )


def test_numbers_beyond_the_range_of_float16_stay_float32() -> None:
    file = storage.narrow({"table": torch.full((40, 40), 1e6)}, 16)
    assert file["table"].dtype == torch.float32
    file = storage.narrow({"table": torch.full((40, 40), 1e9)}, 8)
    assert torch.allclose(stored.widen(file)["table"], torch.full((40, 40), 1e9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": None}, "hold 'table:scale' but no 'table'"),
        ({"table:scale": None}, r"the scale of the weights 'table' \(3, 2\) does not fit: none"),
        ({"table:scale": torch.ones(2, 1)}, r"does not fit: torch.float32 \(2, 1\)"),
        ({"table:scale": torch.ones(3, 1, dtype=torch.int64)}, "does not fit: torch.int64"),
        ({"table:shape": None}, "have a scale and are torch.uint8, not int8"),
        ({"table:shape": torch.tensor([3.0, 2.0])}, "do not hold the 4-bit integers"),
        ({"table:shape": torch.tensor([0, 2**62, 2**62])}, "do not hold the 4-bit integers"),
        ({"table:shape": torch.full((1_000_000,), 2**62)}, "do not hold the 4-bit integers"),
        ({"table:shape": torch.tensor([9, 9])}, r"do not hold the 4-bit integers of a tensor \(9, 9\)"),
    ],
)
def test_a_damaged_file_is_named(change: dict[str, torch.Tensor | None], message: str) -> None:
    file = {**storage.narrow({"table": torch.randn(3, 2)}, 4), **change}
    with pytest.raises(SpecError, match=message) as caught:
        stored.widen({name: value for name, value in file.items() if value is not None})
    assert caught.value.remedy


def test_an_image_model_of_half_the_bytes_answers_as_its_widened_weights(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path)
    spec = ModelSpec.load(artifact)
    whole = loading.read_network(artifact, spec)
    path = artifact / "weights.safetensors"
    size = path.stat().st_size
    # Not in place: the weights that were read are still mapped from the file.
    (tmp_path / "half").write_bytes(storage.dump(whole.state_dict(), 16))
    (tmp_path / "half").replace(path)
    assert path.stat().st_size < 0.7 * size
    shape = spec.architecture
    x_BCHW = torch.rand(4, shape.channels, shape.height, shape.width)
    half = loading.read_network(artifact, spec)
    assert {value.dtype for value in half.parameters()} == {torch.float32}
    assert 0 < float((half(x_BCHW) - whole(x_BCHW)).abs().max()) < 0.01
