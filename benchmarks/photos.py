"""The payload of the comparison: 64 photographs as JPEGs, the same ones on every machine.

Windows cut out of the two photographs that scikit-learn carries (a temple and a flower, 640x427), enlarged to the sizes
that photo collections have (about 500x375, upright and square ones among them), two of them in grey. Which window becomes
which photo is drawn from a seeded generator; the bytes follow Pillow's JPEG encoder, so `digest` goes into the results.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.errors import BenchmarkError

COUNT = 64
GREY = (21, 50)
"""Which of them are greyscale: 3 %, as in collections of photos from the web, and spread over the rotation."""
GRAIN = 5.0
"""Standard deviation in grey levels, that of a camera at a middling sensitivity."""
_SIZES = ((500, 375), (500, 375), (500, 375), (500, 333), (375, 500), (500, 375), (333, 500), (500, 400), (400, 400))
_QUALITIES = (95, 96, 97, 98)
_SUFFIXES = (".jpg", ".jpeg")


@dataclass(frozen=True, slots=True)
class Photo:
    """One body of a request."""

    name: str
    data: bytes


def standard(seed: int = 0) -> tuple[Photo, ...]:
    """The 64 photos of the committed results."""
    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draw = random.Random(seed)
    return tuple(
        Photo(f"{index:02d}.jpg", _encode(_cut(sources[index % len(sources)], draw), index, draw))
        for index in range(COUNT)
    )


def read(folder: Path) -> tuple[Photo, ...]:
    """One's own JPEGs, in the order of their names. Raises BenchmarkError when there are none."""
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise BenchmarkError(f"{folder} holds no .jpg files", remedy="give a folder of JPEG photos with --photos")
    return tuple(Photo(path.name, path.read_bytes()) for path in files)


def digest(photos: Sequence[Photo]) -> str:
    """SHA-256 over all bytes in order: whether two runs sent the same."""
    sums = hashlib.sha256()
    for photo in photos:
        sums.update(hashlib.sha256(photo.data).digest())
    return sums.hexdigest()


def mean_bytes(photos: Sequence[Photo]) -> float:
    """Mean size of one body."""
    return sum(len(photo.data) for photo in photos) / len(photos)


def is_grey(photo: Photo) -> bool:
    """Whether it has one channel, which torchvision's usual transforms do not take."""
    with Image.open(io.BytesIO(photo.data)) as image:
        return image.mode == "L"


def resized(photos: Sequence[Photo], width: int, height: int, quality: int = 90) -> tuple[Photo, ...]:
    """The same pictures at another size, for the growth curves."""
    found = []
    for photo in photos:
        with Image.open(io.BytesIO(photo.data)) as image:
            picture = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        found.append(Photo(photo.name, buffer.getvalue()))
    return tuple(found)


def write(photos: Sequence[Photo], folder: Path) -> list[Path]:
    """Each photo as a file; returns the paths in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / photo.name for photo in photos]
    for path, photo in zip(paths, photos, strict=True):
        path.write_bytes(photo.data)
    return paths


def _cut(source: Image.Image, draw: random.Random) -> Image.Image:
    """A window of the target's proportions that covers 60 to 100 % of what fits, perhaps mirrored, at the target size."""
    width, height = draw.choice(_SIZES)
    largest = min(source.width / width, source.height / height)
    scale = largest * draw.uniform(0.6, 1.0)
    window = (round(width * scale), round(height * scale))
    left, top = draw.randint(0, source.width - window[0]), draw.randint(0, source.height - window[1])
    picture = source.resize(
        (width, height), Image.Resampling.LANCZOS, box=(left, top, left + window[0], top + window[1])
    )
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else picture


def _encode(picture: Image.Image, index: int, draw: random.Random) -> bytes:
    """As JPEG, with the grain that enlarging took away: without it the bytes, and the decoder's work, would be too few."""
    grain = np.random.default_rng(index).normal(0.0, GRAIN, (picture.height, picture.width, 1))
    pixels = (np.asarray(picture, dtype=np.float64) + grain).round().clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    grained = Image.fromarray(pixels).convert("L" if index in GREY else "RGB")
    grained.save(buffer, "JPEG", quality=draw.choice(_QUALITIES))
    return buffer.getvalue()
