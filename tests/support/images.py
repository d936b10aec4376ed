"""Encoded images, good and bad, made on the spot."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

LABELS = ("blue", "green", "red")


def pixels(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    """uint8 `[height, width, 3]`: a smooth random picture, so that lossy formats change it little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of an image in one of Pillow's formats."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(seed: int, kind: str = "PNG", height: int = 16, width: int = 16) -> bytes:
    """A valid picture that differs per seed."""
    return encode(pixels(seed, height, width), kind)


def truncated(kind: str = "PNG") -> bytes:
    """A valid start, cut off in the middle of the pixels."""
    whole = encode(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8), kind)
    return whole[: len(whole) // 2]


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG of a few bytes whose header announces width x height pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )
