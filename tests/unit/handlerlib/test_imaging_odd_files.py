"""Images that are small files and much work, and good ones with odd blocks beside their pixels."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from handlerlib import imaging
from handlerlib.errors import PayloadTooLarge, UnprocessableInput
from handlerlib.spec import Limits, Preprocess
from support import images

RGB = Preprocess(channels=3, height=16, width=16, mean=(0.5,) * 3, std=(0.5,) * 3)
GREY = Preprocess(channels=1, height=16, width=16, mean=(0.5,), std=(0.5,))
COVER = Preprocess(channels=3, height=224, width=224, mean=(0.5,) * 3, std=(0.5,) * 3, resize="cover")
LIMITS = Limits()


@pytest.mark.parametrize("size", [(8000, 1), (1, 8000)], ids=str)
def test_an_image_that_would_become_huge_is_refused(size: tuple[int, int]) -> None:
    data = images.encode(Image.new("RGB", size))
    assert len(data) < 200
    with pytest.raises(UnprocessableInput, match=f"{size[0]}x{size[1]} pixels is too narrow for this model"):
        imaging.load(data, COVER, LIMITS)
    assert imaging.load(data, RGB, LIMITS).shape == (3, 16, 16), "stretched, it never becomes large"


@pytest.mark.parametrize("size", [(300, 1), (1, 300)], ids=str)
def test_a_narrow_image_is_still_covered(size: tuple[int, int]) -> None:
    strict = dataclasses.replace(LIMITS, max_pixels=300)
    assert imaging.load(images.encode(Image.new("RGB", size)), COVER, strict).shape == (3, 224, 224)


def with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there `count` times more."""
    data = images.encode(images.pixels(1, 32, 32), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    with pytest.raises(UnprocessableInput, match="JPEG image has 2010 scans, at most 100 are accepted"):
        imaging.load(with_scans(2000), RGB, LIMITS)
    filled = with_scans(2000).replace(
        b"\xff\xc2", b"\xff\xff\xc2", 1
    )  # a marker may have any number of these before it
    with pytest.raises(UnprocessableInput, match="2010 scans"):
        imaging.load(filled, RGB, LIMITS)
    arithmetic = with_scans(2000).replace(b"\xff\xc2", b"\xff\xca", 1)
    with pytest.raises(UnprocessableInput, match="2010 scans"):
        imaging.load(arithmetic, RGB, LIMITS)


def test_an_ordinary_number_of_scans_is_not() -> None:
    assert imaging.load(with_scans(20), RGB, LIMITS).shape == (3, 16, 16)
    # What looks like scans in a film behind the picture is none.
    film = with_scans(0) + b"\xff\xda\x12\x34" * 1000
    assert torch.equal(imaging.load(film, RGB, LIMITS), imaging.load(with_scans(0), RGB, LIMITS))


def test_images_of_one_request_are_bounded_together() -> None:
    large = images.bomb(7000, 7000)
    imaging.check_together([large] * 4, RGB, LIMITS)
    with pytest.raises(PayloadTooLarge, match=r"245000000 pixels together, at most 200000000 .* several requests"):
        imaging.check_together([large] * 5, RGB, LIMITS)
    jpeg = images.encode(Image.new("L", (6000, 6000)), "JPEG")
    with pytest.raises(PayloadTooLarge, match="216000000 pixels together"):
        imaging.check_together([jpeg] * 6, RGB, LIMITS)


def test_what_images_are_resized_to_counts_too() -> None:
    narrow = images.encode(Image.new("RGB", (760, 1)))
    with pytest.raises(PayloadTooLarge, match="several requests"):
        imaging.check_together([narrow] * 64, COVER, LIMITS)
    imaging.check_together([narrow] * 64, RGB, LIMITS)


def test_small_and_unreadable_images_are_no_matter_of_the_sum() -> None:
    strict = dataclasses.replace(LIMITS, max_pixels=256)
    imaging.check_together([images.photo(1)] * 64, RGB, strict)
    imaging.check_together([images.photo(1), b"no image", b"", b"\x89PNG\r\n\x1a\n", images.bomb()], RGB, LIMITS)
    imaging.check_together([images.bomb(7000, 7000)], RGB, strict)


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """(tag, type, count, four bytes of value) each -> a block of EXIF data."""
    entries = b"".join(struct.pack("<HHI4s", *tag) for tag in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


TURNED = (0x112, 3, 1, b"\6\0\0\0")


@pytest.mark.parametrize(
    ("kind", "size"), [("JPEG", (40, 24)), ("JPEG", (400, 300)), ("PNG", (40, 24)), ("WEBP", (40, 24))], ids=str
)
@pytest.mark.parametrize(
    "odd",
    [(0x11A, 2, 4, b"abc\0"), (0x100, 2, 4, b"abc\0"), (0x100, 9, 1, b"\xfb\xff\xff\xff"), (0x102, 2, 4, b"abc\0")],
    ids=["resolution as text", "width as text", "negative width", "bits as text"],
)
def test_a_tag_of_an_odd_type_does_not_spoil_the_picture(
    odd: tuple[int, int, int, bytes], kind: str, size: tuple[int, int]
) -> None:
    picture = images.pixels(2, *size)
    plain = images.encode(picture, kind, exif=exif(TURNED))
    got = imaging.load(images.encode(picture, kind, exif=exif(odd, TURNED)), RGB, LIMITS)
    assert torch.equal(got, imaging.load(plain, RGB, LIMITS))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_data_that_nobody_can_read_say_nothing(kind: str) -> None:
    picture = images.pixels(2, 40, 24)
    got = imaging.load(images.encode(picture, kind, exif=b"Exif\0\0nonsense and more of it"), RGB, LIMITS)
    assert torch.equal(got, imaging.load(images.encode(picture, kind), RGB, LIMITS))


def test_one_grey_level_of_sixteen_bits_is_transparent() -> None:
    levels = np.full((16, 16), 40000, np.uint16)
    levels[0] = 40001  # the same eight upper bits
    got = imaging.load(images.encode(Image.fromarray(levels), transparency=40000), GREY, LIMITS)
    assert got[0, :, 0].tolist() == [156] + [255] * 15


def test_sixteen_bits_in_either_order_of_bytes() -> None:
    levels = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    swapped = Image.frombytes("I;16B", (16, 16), levels.astype(">u2").tobytes())
    got = imaging.load(images.encode(swapped, "TIFF"), GREY, LIMITS)
    assert torch.equal(got[0], torch.from_numpy((levels >> 8).astype(np.uint8)))


def test_lab_becomes_grey_by_way_of_rgb() -> None:
    lab = Image.frombytes("LAB", (16, 16), images.pixels(1).tobytes())
    data = images.encode(lab, "TIFF")
    rgb = imaging.load(data, RGB, LIMITS).permute(1, 2, 0).numpy()
    assert np.array_equal(imaging.load(data, GREY, LIMITS)[0].numpy(), np.asarray(Image.fromarray(rgb).convert("L")))
