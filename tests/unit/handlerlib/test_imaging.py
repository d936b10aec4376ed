from __future__ import annotations

import dataclasses
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from handlerlib import imaging
from handlerlib.errors import PayloadTooLarge, UnprocessableInput, UnsupportedMedia
from handlerlib.spec import Limits, Preprocess
from support import images

RGB = Preprocess(channels=3, height=16, width=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
GREY = Preprocess(channels=1, height=16, width=16, mean=(0.5,), std=(0.5,))
LIMITS = Limits(max_bytes=1_000_000, max_pixels=1_000_000)
LARGE = Limits(max_bytes=1_000_000, max_pixels=2_000_000)


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


def pillow(data: bytes, preprocess: Preprocess) -> torch.Tensor:
    """The pixels as Pillow decodes them, whatever this module chooses."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB" if preprocess.channels == 3 else "L")
    return torch.from_numpy(np.array(upright)).view(*reversed(upright.size), -1).permute(2, 0, 1)


@pytest.mark.parametrize("preprocess", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("source", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}, {"restart_marker_rows": 1}], ids=str
)
def test_every_kind_of_jpeg_has_the_pixels_that_pillow_gives(
    preprocess: Preprocess, source: str, options: dict[str, Any]
) -> None:
    if options.get("keep_rgb") and source != "RGB":
        pytest.skip("only for colour")
    picture = Image.fromarray(images.pixels(7, 37, 51)).convert(source)
    data = images.encode(picture, "JPEG", quality=90, comment=b"a comment", **options)
    assert torch.equal(imaging.decode(data, preprocess, LIMITS), pillow(data, preprocess))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("size", [(40, 24), (1200, 900)], ids=["small", "reduced"])
def test_a_turned_jpeg_is_as_its_upright_form(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = images.encode(images.pixels(2, *size), "JPEG", exif=exif)
    upright = pillow(data, RGB)
    assert torch.equal(imaging.decode(data, RGB, LARGE), upright)
    tall = dataclasses.replace(RGB, height=24, resize="cover")
    got = imaging.load(data, tall, LARGE).float()
    assert (got - imaging.fit(upright, tall).float()).abs().mean() < 2


def test_orientation_in_xmp_counts_as_for_pillow() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    data = images.encode(images.pixels(2, 40, 24), "JPEG", xmp=xmp)
    assert imaging.decode(data, RGB, LIMITS).shape == (3, 24, 40)


@pytest.mark.parametrize("resize", ["stretch", "cover"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_large_jpeg_is_decoded_reduced_and_stays_close(
    resize: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    draft = JpegImageFile.draft

    def spy(image: JpegImageFile, *arguments: Any) -> Any:
        found = draft(image, *arguments)
        sizes.append(image.size)
        return found

    monkeypatch.setattr(JpegImageFile, "draft", spy)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((643, 479)).convert(mode)
    data = images.encode(coarse, "JPEG", quality=90)
    preprocess = dataclasses.replace(RGB, height=32, width=32, resize=resize, crop_fraction=0.875)
    got = imaging.load(data, preprocess, LIMITS)
    full = imaging.fit(imaging.decode(data, preprocess, LIMITS), preprocess)
    assert sizes[0] in ((81, 60), (161, 120)), "at least twice what is wanted"
    assert (got.float() - full.float()).abs().mean() < 2
    small = images.encode(coarse.resize((120, 120)), "JPEG")  # below four times: in full
    assert torch.equal(
        imaging.load(small, preprocess, LIMITS), imaging.fit(imaging.decode(small, preprocess, LIMITS), preprocess)
    )


def test_without_torchvisions_operator_the_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = [images.photo(seed, "JPEG", 50, 70) for seed in range(5)]
    fast = [imaging.load(data, RGB, LIMITS) for data in encoded]
    monkeypatch.setattr(imaging, "_decode_jpeg", None)
    for data, expected in zip(encoded, fast, strict=True):
        assert torch.equal(imaging.load(data, RGB, LIMITS), expected)


def test_resize_gives_torchvisions_pixels() -> None:
    for policy in (
        RGB,
        dataclasses.replace(RGB, interpolation="bicubic"),
        dataclasses.replace(RGB, interpolation="nearest"),
        dataclasses.replace(RGB, antialias=False),
        dataclasses.replace(RGB, resize="cover", crop_fraction=0.8),
    ):
        x_CHW = torch.from_numpy(images.pixels(4, 60, 45).copy()).permute(2, 0, 1)
        size = [round(60 * 16 / 45 / policy.crop_fraction), round(16 / policy.crop_fraction)]
        size = size if policy.resize == "cover" else [16, 16]
        mode = InterpolationMode(policy.interpolation)
        expected = v2.center_crop(v2.resize(x_CHW, size, interpolation=mode, antialias=policy.antialias), [16, 16])
        assert torch.equal(imaging.fit(x_CHW, policy), expected)
        assert torch.equal(imaging.fit(x_CHW.contiguous()[None], policy), expected[None])


def test_stacked_pixels_lie_side_by_side() -> None:
    loaded = [imaging.load(images.photo(seed, kind), RGB, LIMITS) for seed, kind in ((0, "JPEG"), (1, "PNG"))]
    x_BCHW = imaging.stack(loaded)
    assert x_BCHW.shape == (2, 3, 16, 16)
    assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x_BCHW, torch.stack(loaded))


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


def test_training_can_use_what_an_answer_has_normalised_with_before() -> None:
    preprocess = dataclasses.replace(RGB, mean=(0.1, 0.2, 0.3))
    x_BCHW = torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)
    with torch.inference_mode():
        first = imaging.normalise(x_BCHW, preprocess)
    second = imaging.normalise(x_BCHW, preprocess)
    assert torch.equal(first, second)
    assert not second.is_inference()
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (second * weight).sum().backward()  # which inference tensors would refuse
    # Another normalisation is another one.
    assert not torch.equal(imaging.normalise(x_BCHW, RGB), second)


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
