"""Image bytes -> the network's input. Training's evaluation, golden tests and the worker all come through here.

Shapes: a decoded image is a uint8 tensor `[C, H, W]` of the spec's channels, height and width; a batch is stacked to
`[B, C, H, W]` and normalised to float32. Decoding releases the interpreter lock inside Pillow.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

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
_INTERPOLATION = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "nearest": InterpolationMode.NEAREST,
}
_WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N")


def sniff(data: bytes) -> str | None:
    """The format that the first bytes announce, one of FORMATS, or None."""
    for start, at_eight, name in _SIGNATURES:
        if data.startswith(start) and data[8 : 8 + len(at_eight)] == at_eight:
            return name
    return None


def load(data: bytes, preprocess: Preprocess, limits: Limits) -> Tensor:
    """One encoded image -> uint8 `[C, height, width]`, ready to stack.

    Raises PayloadTooLarge, UnsupportedMedia or UnprocessableInput; the message is fit for a client.
    """
    return fit(decode(data, preprocess, limits), preprocess)


def decode(data: bytes, preprocess: Preprocess, limits: Limits) -> Tensor:
    """One encoded image -> uint8 `[C, H, W]` at its own size, upright, in the spec's channels.

    The first frame of an animation; EXIF orientation applied; transparency over the spec's background; 16 bits per
    channel scaled to 8. Raises as `load`.
    """
    if len(data) > limits.max_bytes:
        raise PayloadTooLarge(f"the image has {len(data)} bytes, at most {limits.max_bytes} are accepted")
    announced = sniff(data)
    if announced is None:
        raise UnsupportedMedia(f"the body is not an image of a supported format ({', '.join(FORMATS)})")
    try:
        with Image.open(io.BytesIO(data), formats=[announced]) as image:
            _check_pixels(image, limits)
            image.load()
            pixels = np.array(_to_mode(ImageOps.exif_transpose(image), preprocess))
    except (UnprocessableInput, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UnprocessableInput(f"the image has too many pixels, at most {limits.max_pixels} are accepted") from error
    except Exception as error:
        raise UnprocessableInput(f"the {announced} image is truncated or damaged and cannot be decoded") from error
    x_HWC = torch.from_numpy(pixels)
    return x_HWC.unsqueeze(0) if x_HWC.ndim == 2 else x_HWC.permute(2, 0, 1).contiguous()


def fit(x_CHW: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 `[C, H, W]` of any size -> uint8 `[C, height, width]` by the spec's resize policy."""
    height, width = preprocess.height, preprocess.width
    if preprocess.resize == "stretch":
        return _resize(x_CHW, height, width, preprocess)
    _, source_height, source_width = x_CHW.shape
    scale = max(height / source_height, width / source_width) / preprocess.crop_fraction
    resized = _resize(
        x_CHW, max(height, round(source_height * scale)), max(width, round(source_width * scale)), preprocess
    )
    cropped: Tensor = F.center_crop(resized, [height, width])
    return cropped


def normalise(x_BCHW: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 `[B, C, H, W]` -> float32 of the same shape and device: (x / 255 - mean) / std."""
    mean = torch.tensor(preprocess.mean, device=x_BCHW.device).view(1, -1, 1, 1)
    std = torch.tensor(preprocess.std, device=x_BCHW.device).view(1, -1, 1, 1)
    return x_BCHW.to(torch.float32).sub_(mean * 255.0).div_(std * 255.0)


def batch(images: Sequence[bytes], preprocess: Preprocess, limits: Limits) -> Tensor:
    """Encoded images -> uint8 `[B, C, height, width]`. Raises as `load`, for the first bad one."""
    return torch.stack([load(data, preprocess, limits) for data in images])


def _check_pixels(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise UnprocessableInput(
            f"the image has {width}x{height} = {width * height} pixels, at most {limits.max_pixels} are accepted"
        )


def _to_mode(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    mode = "L" if preprocess.channels == 1 else "RGB"
    if image.mode in _WIDE_GREY or image.mode == "I":
        # Pillow's own conversion clips at 255; a 16-bit scan would turn white.
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise UnprocessableInput("images of floating-point pixels are not supported")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (preprocess.background,) * 3 + (255,))
        image = Image.alpha_composite(ground, rgba).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _resize(x_CHW: Tensor, height: int, width: int, preprocess: Preprocess) -> Tensor:
    if x_CHW.shape[-2:] == (height, width):
        return x_CHW
    resized: Tensor = F.resize(
        x_CHW, [height, width], interpolation=_INTERPOLATION[preprocess.interpolation], antialias=preprocess.antialias
    )
    return resized
