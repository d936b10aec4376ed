"""A disk without room is an OSError that names the file: before the work where possible, never the end by a signal."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from training import data, files


@pytest.fixture
def full() -> Iterator[None]:
    """No file may grow beyond 64 KiB: as a full disk, for this process alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_pixels_on_disk_have_their_room_before_they_are_mapped(tmp_path: Path) -> None:
    store = tmp_path / "pixels.bin"
    store.write_bytes(b"left over" * 1000)
    kept = data._allocate(100, (3, 64, 64), 0, store)
    assert kept.shape == (100, 3, 64, 64) and not kept[0].any()
    assert store.stat().st_size == kept.numel() <= store.stat().st_blocks * 512


@pytest.mark.usefixtures("full")
def test_pixels_without_room_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        data._allocate(100, (3, 64, 64), 0, tmp_path / "pixels.bin")
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "pixels.bin")


@pytest.mark.parametrize("numbers", [100_000, 16_500], ids=["in the middle", "at the end"])
@pytest.mark.usefixtures("full")
def test_a_checkpoint_without_room_is_an_error_that_names_the_file(numbers: int, tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        files.write_tensors(tmp_path / "checkpoint.pt", {"weights": torch.zeros(numbers)})
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "checkpoint.pt")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_cannot_be_pickled_keeps_its_error(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        files.write_tensors(tmp_path / "checkpoint.pt", {"work": lambda: None})
    assert not list(tmp_path.iterdir())
