"""Image bytes -> the network's input. Training's evaluation, golden tests and the worker all come through here.

Shapes: a decoded image is a uint8 tensor `[C, H, W]` of the spec's channels, height and width; a batch is stacked to
`[B, C, H, W]`, which the engine normalises. In memory the channels of a pixel lie side by side, as decoders write them
("channels last"); no step transposes them. Decoding and resizing release the interpreter lock.

JPEGs are decoded by torchvision's operator when it is there, else by Pillow: both are libjpeg-turbo and give the same
pixels. Everything that is unusual in a JPEG, and every other format, is Pillow's.

A photo of at least four times the wanted size on both sides is decoded at 1/2, 1/4 or 1/8 of its size, which libjpeg does
within the inverse cosine transform, and never below twice the wanted size, so that the antialiased resize still decides
each pixel. Against decoding in full that changes photographs by less than 2 grey levels on average (0-255), at about
a quarter of the time; `load` does so wherever it is called, so training, golden test and worker see the same pixels.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

import handlerlib.lean  # noqa: F401 - torchvision, for its operators
from handlerlib.errors import PayloadTooLarge, UnprocessableInput, UnsupportedMedia
from handlerlib.spec import Limits, Preprocess

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may try; anything else is refused as not an image."""

_SIGNATURES: tuple[tuple[bytes, bytes, str], ...] = (
    (b"\xff\xd8\xff", b"", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", b"", "PNG"),
    (b"RIFF", b"WEBP", "WEBP"),
    (b"GIF87a", b"", "GIF"),
    (b"GIF89a", b"", "GIF"),
    (b"BM", b"", "BMP"),
    (b"II*\x00", b"", "TIFF"),
    (b"MM\x00*", b"", "TIFF"),
)
TOGETHER = 4
"""How many times the pixels of the largest image the images of one request may have between them."""
MOST_SCANS = 100
"""Of a JPEG; progressive encoders write about ten. Each is a pass over all pixels, of which a hundred bytes may tell."""
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
"""A scan's header (ITU-T T.81, B.2.3) up to its number of components, which its length must fit."""
_AMPLE_PIXELS = Limits().max_pixels
_WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION = 0x0112
"""EXIF's tag."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""As Pillow's `exif_transpose`, which also writes the whole EXIF block again and fails at a tag of an odd type."""
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations that exchange height and width."""
_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_TABLE_MARKERS = frozenset({0xC4, 0xCC, 0xDB, 0xDD, 0xFE})
_SAME_IN_BOTH = frozenset({(3, 3), (1, 3), (1, 1)})
"""Components of a JPEG and channels wanted where libjpeg gives what Pillow would; from colour to grey they round apart."""
_decode_jpeg = getattr(torch.ops.image, "decode_jpeg", None)
"""(uint8 bytes, 1 for grey or 3 for RGB, whether to apply EXIF's orientation) -> uint8 `[C, H, W]`, channels last."""


def sniff(data: bytes | bytearray) -> str | None:
    """The format that the first bytes announce, one of FORMATS, or None."""
    for start, at_eight, name in _SIGNATURES:
        if data.startswith(start) and data[8 : 8 + len(at_eight)] == at_eight:
            return name
    return None


def load(data: bytes | bytearray, preprocess: Preprocess, limits: Limits) -> Tensor:
    """One encoded image -> uint8 `[C, height, width]`, ready for `stack`.

    Raises PayloadTooLarge, UnsupportedMedia or UnprocessableInput; the message is fit for a client.
    """
    picture = _decode(data, preprocess, limits, reduce=True)
    tall, wide = _resized(picture.height, picture.width, preprocess)
    if tall * wide > _most_pixels(limits):
        raise UnprocessableInput(
            f"the image of {picture.width}x{picture.height} pixels is too narrow for this model:"
            f" to cover its input it would become {wide}x{tall}"
        )
    return _fit(picture.x_CHW, picture.height, picture.width, preprocess)


def check_together(encoded: Sequence[bytes | bytearray], preprocess: Preprocess, limits: Limits) -> None:
    """Raises PayloadTooLarge (413) when the images of one request are too much work together, which its batch would wait
    for: more than `TOGETHER` times `max_pixels` (or its default where that is more), by their headers or as resized.

    One image is `load`'s own to judge, and so is one whose header cannot be read.
    """
    if len(encoded) < 2:
        return
    total, most = 0, TOGETHER * _most_pixels(limits)
    for data in encoded:
        height, width = _announced_size(data)
        tall, wide = _resized(height, width, preprocess)
        total += max(height * width, tall * wide)
    if total > most:
        raise PayloadTooLarge(
            f"the {len(encoded)} images of the request have {total} pixels together, at most {most} are accepted: "
            "send them in several requests"
        )


def decode(data: bytes | bytearray, preprocess: Preprocess, limits: Limits) -> Tensor:
    """One encoded image -> uint8 `[C, H, W]` at its own size, upright, in the spec's channels.

    The first frame of an animation; EXIF orientation applied; transparency over the spec's background; 16 bits per
    channel scaled to 8. Raises as `load`.
    """
    return _decode(data, preprocess, limits, reduce=False).x_CHW


def fit(x_CHW: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 `[C, H, W]` of any size, or such a batch, -> the same of `height` x `width` by the spec's resize policy."""
    return _fit(x_CHW, x_CHW.shape[-2], x_CHW.shape[-1], preprocess)


def upright(image: Image.Image) -> Image.Image:
    """Turned as `decode` turns it: by EXIF's or XMP's orientation, not at all where nobody can read that."""
    image.load()  # the orientation may stand behind the pixels
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def stack(images: Sequence[Tensor]) -> Tensor:
    """uint8 `[C, height, width]` each, at least one -> uint8 `[B, C, height, width]`, channels last in memory."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def normalise(x_BCHW: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 `[B, C, H, W]` -> float32 of the same shape and device: (x / 255 - mean) / std."""
    mean, std = _of_bytes(preprocess.mean, preprocess.std, x_BCHW.device)
    return x_BCHW.to(torch.float32).sub_(mean).div_(std)


@functools.lru_cache(maxsize=16)
def _of_bytes(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Both for values of 0 to 255, float32 `[1, C, 1, 1]`. Kept: on a GPU each would stop every batch for a copy."""
    with torch.inference_mode(False):  # for training too, whoever asks first
        first, second = (torch.tensor(one, device=device).view(1, -1, 1, 1) * 255.0 for one in (mean, std))
    return first, second


def batch(images: Sequence[bytes], preprocess: Preprocess, limits: Limits) -> Tensor:
    """Encoded images -> uint8 `[B, C, height, width]`. Raises as `load`, for the first bad one."""
    return stack([load(data, preprocess, limits) for data in images])


@dataclass(frozen=True, slots=True)
class _Picture:
    """Decoded pixels, and the upright image's own size, which is larger when it was decoded reduced."""

    x_CHW: Tensor
    height: int
    width: int


def _decode(data: bytes | bytearray, preprocess: Preprocess, limits: Limits, *, reduce: bool) -> _Picture:
    if len(data) > limits.max_bytes:
        raise PayloadTooLarge(f"the image has {len(data)} bytes, at most {limits.max_bytes} are accepted")
    announced = sniff(data)
    if announced is None:
        raise UnsupportedMedia(f"the body is not an image of a supported format ({', '.join(FORMATS)})")
    try:
        picture = _plain_jpeg(data, preprocess, limits, reduce=reduce) if announced == "JPEG" else None
        return picture or _with_pillow(data, announced, preprocess, limits, reduce=reduce)
    except (UnprocessableInput, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UnprocessableInput(f"the image has too many pixels, at most {limits.max_pixels} are accepted") from error
    except Exception as error:
        raise UnprocessableInput(f"the {announced} image is truncated or damaged and cannot be decoded") from error


def _with_pillow(
    data: bytes | bytearray, announced: str, preprocess: Preprocess, limits: Limits, *, reduce: bool
) -> _Picture:
    with Image.open(io.BytesIO(data), formats=[announced]) as image:
        width, height = image.size
        _check_pixels(width, height, limits)
        upright, orientation = None, _orientation(image) if announced == "JPEG" else None
        if reduce and announced == "JPEG":
            turned = orientation in _SIDEWAYS
            upright = (width, height) if turned else (height, width)
            wanted = _resized(*upright, preprocess)
            image.draft(None, (2 * wanted[not turned], 2 * wanted[turned]))
        image.load()
        turn = _TURNS.get(orientation or _orientation(image))  # elsewhere it may stand behind the pixels
        pixels = np.array(_to_mode(image if turn is None else image.transpose(turn), preprocess))
    x_HWC = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])
    return _Picture(x_HWC.permute(2, 0, 1), *(upright or x_HWC.shape[:2]))


def _plain_jpeg(data: bytes | bytearray, preprocess: Preprocess, limits: Limits, *, reduce: bool) -> _Picture | None:
    """By torchvision's operator; None for what is Pillow's: colour to grey, CMYK, turned, very large, or damaged."""
    header = _jpeg_header(data)
    if header is None or header.scans:
        _check_scans(data)
    if header is None or _decode_jpeg is None or (header.components, preprocess.channels) not in _SAME_IN_BOTH:
        return None
    height, width = header.height, header.width
    _check_pixels(width, height, limits)
    if reduce:
        wanted = _resized(height, width, preprocess)
        if height >= 4 * wanted[0] and width >= 4 * wanted[1]:
            return None
    if header.metadata:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if _orientation(image) != 1:
                return None
    try:
        encoded = torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=torch.uint8)
        return _Picture(_decode_jpeg(encoded, preprocess.channels, False), height, width)
    except RuntimeError:
        return None  # Pillow says what is wrong with it, or decodes it all the same


@dataclass(frozen=True, slots=True)
class _JpegHeader:
    height: int
    width: int
    components: int
    metadata: bool
    """Whether there is a block of EXIF or XMP data, which may hold an orientation."""
    scans: bool
    """Whether its scans may be many for few bytes: it is progressive or arithmetically coded."""


def _jpeg_header(data: bytes | bytearray) -> _JpegHeader | None:
    """What stands before a JPEG's pixels (ITU-T T.81, B.1.1.3 and B.2.2); None when anything there is unusual."""
    at, metadata, last = 2, False, len(data) - 10
    while at < last and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAME_MARKERS:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            plain = data[at + 4] == 8 and height > 0 and width > 0
            return _JpegHeader(height, width, data[at + 9], metadata, marker > 0xC1) if plain else None
        if not (0xE0 <= marker <= 0xEF or marker in _TABLE_MARKERS):
            return None
        metadata = metadata or marker == 0xE1
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _orientation(image: Image.Image) -> int:
    """As Pillow finds it, in EXIF or XMP data; 1 is upright, and what is said where nobody can read it."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - a camera's slip in what stands beside the pixels
        return 1
    return int(found) if found in range(2, 9) else 1


def _check_scans(data: bytes | bytearray) -> None:
    if data.count(b"\xff\xda") > MOST_SCANS and (scans := len(_SCAN.findall(data))) > MOST_SCANS:
        raise UnprocessableInput(f"the JPEG image has {scans} scans, at most {MOST_SCANS} are accepted")


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise UnprocessableInput(
            f"the image has {width}x{height} = {width * height} pixels, at most {limits.max_pixels} are accepted"
        )


def _most_pixels(limits: Limits) -> int:
    """Of an image while it is resized, whose own size may be limited to less than the network wants."""
    return max(limits.max_pixels, _AMPLE_PIXELS)


def _announced_size(data: bytes | bytearray) -> tuple[int, int]:
    """Height and width as the header has them; (1, 1) when there is none."""
    announced = sniff(data)
    header = _jpeg_header(data) if announced == "JPEG" else None
    if header is not None or announced is None:
        return (header.height, header.width) if header else (1, 1)
    try:
        with Image.open(io.BytesIO(data), formats=[announced]) as image:
            return image.height, image.width
    except Exception:  # noqa: BLE001 - `load` says what is wrong with it
        return 1, 1


def _to_mode(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    mode = "L" if preprocess.channels == 1 else "RGB"
    # Pillow's own conversions clip at 255; a 16-bit scan would turn white.
    if image.mode in _WIDE_GREY:
        image = _high_bytes(image)
    elif image.mode == "I":
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "LAB":
        image = image.convert("RGB")  # it knows no way to grey
    elif image.mode == "F":
        raise UnprocessableInput("images of floating-point pixels are not supported")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (preprocess.background,) * 3 + (255,))
        image = Image.alpha_composite(ground, rgba).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _high_bytes(image: Image.Image) -> Image.Image:
    """16-bit grey -> 8 bits, with an alpha channel when one grey level is transparent, which all its bits decide (PNG
    Specification, 11.3.2.1)."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


def _resized(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """Height and width to which an upright image of this size is resized, before its centre is cut out."""
    if preprocess.resize == "stretch":
        return preprocess.height, preprocess.width
    scale = max(preprocess.height / height, preprocess.width / width) / preprocess.crop_fraction
    return max(preprocess.height, round(height * scale)), max(preprocess.width, round(width * scale))


def _fit(x_CHW: Tensor, height: int, width: int, preprocess: Preprocess) -> Tensor:
    """By the policy for an image of `height` x `width`, which `x_CHW` may be a reduced form of."""
    resized = _resize(x_CHW, _resized(height, width, preprocess), preprocess)
    top = round((resized.shape[-2] - preprocess.height) / 2)
    left = round((resized.shape[-1] - preprocess.width) / 2)
    return resized[..., top : top + preprocess.height, left : left + preprocess.width]


def _resize(x_CHW: Tensor, size: tuple[int, int], preprocess: Preprocess) -> Tensor:
    """On integers all the way; the same pixels as torchvision's `v2.functional.resize`, whose import costs a second."""
    if x_CHW.shape[-2:] == size:
        return x_CHW
    mode = preprocess.interpolation
    options = {} if mode == "nearest" else {"align_corners": False, "antialias": preprocess.antialias}
    batch = x_CHW if x_CHW.ndim == 4 else _as_batch(x_CHW)
    resized = interpolate(batch, size, mode=mode, **options)
    return resized if x_CHW.ndim == 4 else resized[0]


def _as_batch(x_CHW: Tensor) -> Tensor:
    """`[1, C, H, W]` that torch takes for channels last when it is; of a batch of one it would not know otherwise.

    See https://github.com/pytorch/pytorch/issues/68430.
    """
    channels, height, width = x_CHW.shape
    if x_CHW.stride() == (1, width * channels, channels):
        return x_CHW.as_strided((1, channels, height, width), (x_CHW.numel(), *x_CHW.stride()))
    return x_CHW.unsqueeze(0)
