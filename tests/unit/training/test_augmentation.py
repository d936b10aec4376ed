"""What augmentation does to a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from training.augment import Draws, alternating, augment
from training.config import Augment


def batch(size: int = 8, side: int = 16) -> Tensor:
    return torch.randn((size, 3, side, side), generator=Generator().manual_seed(1))


def run(x_BCHW: Tensor, seed: int = 0, **options: object) -> Tensor:
    return augment(x_BCHW.clone(), Augment(**options), Generator().manual_seed(seed))  # type: ignore[arg-type]


ALL: list[dict[str, object]] = [
    {"shift": 0.25},
    {"flip": True},
    {"rotation": 20.0},
    {"scale": 0.2},
    {"contrast": 0.3},
    {"brightness": 0.5},
    {"cutout": 0.5},
]


@pytest.mark.parametrize("options", ALL, ids=[next(iter(options)) for options in ALL])
def test_each_change_follows_its_seed_and_touches_images_differently(options: dict[str, object]) -> None:
    x_BCHW = batch(32)
    first, again, other = run(x_BCHW, 0, **options), run(x_BCHW, 0, **options), run(x_BCHW, 1, **options)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == x_BCHW.shape
    assert torch.isfinite(first).all()
    same_input = x_BCHW[:1].repeat(32, 1, 1, 1)
    assert len({image.numpy().tobytes() for image in run(same_input, 0, **options)}) > 1


def test_off_by_default() -> None:
    x_BCHW = batch()
    assert torch.equal(run(x_BCHW), x_BCHW)


def test_flip_mirrors_some_images_and_leaves_the_others() -> None:
    x_BCHW = batch(64)
    out = run(x_BCHW, flip=True)
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(out, x_BCHW, strict=True)])
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(out, x_BCHW, strict=True)])
    assert bool((kept ^ mirrored).all())
    assert 16 < int(mirrored.sum()) < 48


def test_alternating_mirrors_every_image_in_every_second_epoch() -> None:
    rows = torch.tensor([5, 0, 63, 17])
    epochs = [alternating(rows, 64, seed=3, epoch=epoch) for epoch in range(4)]
    assert all(torch.equal(epochs[epoch], ~epochs[epoch + 1]) for epoch in range(3))
    whole = alternating(torch.arange(64), 64, seed=3, epoch=0)
    assert torch.equal(whole[rows], epochs[0])
    assert 16 < int(whole.sum()) < 48
    assert not torch.equal(whole, alternating(torch.arange(64), 64, seed=4, epoch=0))


def test_a_batch_is_mirrored_as_told() -> None:
    x_BCHW = batch(4)
    mirrored = torch.tensor([True, False, False, True])
    draws = Draws(Generator().manual_seed(0), 4, slice(None), mirrored)
    out = augment(x_BCHW, Augment(flip="alternating"), draws)
    assert torch.equal(out[mirrored], x_BCHW[mirrored].flip(-1))
    assert torch.equal(out[~mirrored], x_BCHW[~mirrored])


def test_shift_moves_whole_pixels_and_repeats_the_edge() -> None:
    ramp = torch.arange(10.0).view(1, 1, 1, 10).expand(64, 1, 10, 10).contiguous()
    out = run(ramp, shift=0.2)
    moves = {tuple(image[0, 0].tolist()) for image in out}
    assert moves == {tuple(float(min(max(x + d, 0), 9)) for x in range(10)) for d in range(-2, 3)}


def test_cutout_blanks_a_square_of_the_wanted_size_at_most() -> None:
    out = run(torch.ones((64, 1, 16, 16)), cutout=0.5)
    blanked = (out == 0).sum(dim=(1, 2, 3))
    assert int(blanked.max()) <= 81
    assert int(blanked.min()) >= 16


def test_rotation_keeps_shapes_on_images_that_are_not_square() -> None:
    """A disc in the middle of a wide image stays a disc."""
    y, x = torch.meshgrid(torch.arange(20.0) - 9.5, torch.arange(60.0) - 29.5, indexing="ij")
    disc = ((x**2 + y**2) < 36).float().view(1, 1, 20, 60).repeat(16, 1, 1, 1)
    out = run(disc, rotation=90.0)
    assert float((out - disc).abs().mean()) < 0.01
