from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from handlerlib import imaging
from handlerlib.errors import PayloadTooLarge, UnprocessableInput, UnsupportedMedia
from handlerlib.spec import Limits, Preprocess
from support import images

RGB = Preprocess(channels=3, height=16, width=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
GREY = Preprocess(channels=1, height=16, width=16, mean=(0.5,), std=(0.5,))
LIMITS = Limits(max_bytes=1_000_000, max_pixels=1_000_000)


def test_lossless_formats_give_the_same_pixels() -> None:
    expected = torch.from_numpy(images.pixels(3).copy()).permute(2, 0, 1)
    for kind, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        data = images.encode(images.pixels(3), kind, **options)
        assert torch.equal(imaging.load(data, RGB, LIMITS), expected), kind


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_stay_close(kind: str) -> None:
    data = images.encode(images.pixels(3), kind)
    got = imaging.load(data, RGB, LIMITS).float()
    expected = torch.from_numpy(images.pixels(3).copy()).permute(2, 0, 1).float()
    assert (got - expected).abs().mean() < 12


def test_grey_becomes_rgb_and_rgb_becomes_grey() -> None:
    grey = Image.fromarray(images.pixels(1)).convert("L")
    x_CHW = imaging.load(images.encode(grey), RGB, LIMITS)
    assert x_CHW.shape == (3, 16, 16)
    assert torch.equal(x_CHW[0], x_CHW[1])
    assert torch.equal(imaging.load(images.photo(1), GREY, LIMITS)[0], x_CHW[0])


def test_transparency_shows_the_background_of_the_spec() -> None:
    clear = Image.new("RGBA", (16, 16), (10, 20, 30, 0))
    for kind in ("PNG", "WEBP", "TIFF"):
        assert imaging.load(images.encode(clear, kind), RGB, LIMITS).unique().tolist() == [255], kind
    dark = dataclasses.replace(RGB, background=0)
    assert imaging.load(images.encode(clear), dark, LIMITS).unique().tolist() == [0]


def test_palette_with_transparent_index() -> None:
    picture = Image.new("P", (16, 16), 0)
    picture.putpalette([200, 0, 0, 0, 200, 0])
    opaque = imaging.load(images.encode(picture), RGB, LIMITS)
    assert opaque[:, 0, 0].tolist() == [200, 0, 0]
    clear = imaging.load(images.encode(picture, transparency=0), RGB, LIMITS)
    assert clear[:, 0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        got = imaging.load(images.encode(Image.fromarray(ramp), kind), GREY, LIMITS)
        assert torch.equal(got[0], torch.from_numpy((ramp >> 8).astype(np.uint8))), kind


def test_cmyk_is_close_to_its_rgb_original() -> None:
    flat = Image.new("RGB", (16, 16), (200, 40, 90))
    got = imaging.load(images.encode(flat.convert("CMYK"), "JPEG"), RGB, LIMITS)
    assert (got[:, 8, 8].float() - torch.tensor([200.0, 40.0, 90.0])).abs().max() < 6


def test_exif_orientation_is_applied() -> None:
    upright = Image.fromarray(images.pixels(2, 16, 32))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    wide = dataclasses.replace(RGB, width=32)
    got = imaging.load(images.encode(turned, "PNG", exif=exif), wide, LIMITS)
    assert torch.equal(got, imaging.load(images.encode(upright), wide, LIMITS))


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    data = images.encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert imaging.load(data, RGB, LIMITS)[:, 0, 0].tolist() == [255, 0, 0]


def test_cover_keeps_proportions_and_cuts_the_centre() -> None:
    striped = np.zeros((16, 48, 3), dtype=np.uint8)
    striped[:, 16:32] = 255
    cover = dataclasses.replace(RGB, resize="cover")
    assert imaging.load(images.encode(striped), cover, LIMITS).float().mean() > 250
    stretched = imaging.load(images.encode(striped), RGB, LIMITS).float()
    assert 60 < stretched.mean() < 110


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (17, 15)])
def test_any_size_fits(height: int, width: int) -> None:
    for policy in ("stretch", "cover"):
        preprocess = dataclasses.replace(RGB, resize=policy, crop_fraction=0.875)
        assert imaging.load(images.photo(1, "PNG", height, width), preprocess, LIMITS).shape == (3, 16, 16)


def test_normalise_is_the_written_formula() -> None:
    x_CHW = imaging.load(images.photo(5), RGB, LIMITS)
    got = imaging.normalise(x_CHW.unsqueeze(0), RGB)
    mean, std = torch.tensor(RGB.mean).view(3, 1, 1), torch.tensor(RGB.std).view(3, 1, 1)
    torch.testing.assert_close(got[0], (x_CHW.float() / 255 - mean) / std)
    assert x_CHW.dtype is torch.uint8


@pytest.mark.parametrize(
    "data", [b"hello", b"<svg/>", b"%PDF-1.7 rest", b"RIFF0000WAVEfmt ", bytes(range(256)), b"\x00"], ids=repr
)
def test_not_an_image_is_415(data: bytes) -> None:
    with pytest.raises(UnsupportedMedia, match="not an image"):
        imaging.load(data, RGB, LIMITS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_is_422(kind: str) -> None:
    with pytest.raises(UnprocessableInput, match=f"{kind} image is truncated or damaged"):
        imaging.load(images.truncated(kind), RGB, LIMITS)


def test_pixels_are_counted_before_decoding() -> None:
    with pytest.raises(UnprocessableInput, match=r"50000x50000 = 2500000000 pixels|too many pixels"):
        imaging.load(images.bomb(), RGB, LIMITS)
    with pytest.raises(UnprocessableInput, match="1001x1000 = 1001000 pixels, at most 1000000"):
        imaging.load(images.bomb(1001, 1000), RGB, LIMITS)


def test_bytes_are_counted_first() -> None:
    with pytest.raises(PayloadTooLarge, match="at most 100 are accepted"):
        imaging.load(images.photo(1), RGB, dataclasses.replace(LIMITS, max_bytes=100))


def test_threads_see_the_same_pixels() -> None:
    encoded = [images.photo(seed, "JPEG", 64, 64) for seed in range(64)]
    alone = [imaging.load(data, RGB, LIMITS) for data in encoded]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: imaging.load(data, RGB, LIMITS), encoded))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
