"""Where labelled images and texts come from: each source becomes a list of entries, whose bytes are read when needed."""

from __future__ import annotations

import functools
import io
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from PIL import Image

from handlerlib.spec import Task
from training.config import TABLES, TEXT_SOURCES, Data, Source
from training.errors import DataError

Split = Literal["train", "validation", "test"]

_SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One labelled image (or text) that has not been read yet."""

    name: str
    """Path below the root with `/`, or `<set>-<number>`; what messages show."""
    label: str
    """The class; of several labels or of values, their text of `training.truth`."""
    given: Split | None
    """The side on which the data itself puts the image, None when we divide."""
    read: Callable[[], bytes]
    """The encoded image, a text as UTF-8. May raise OSError, of a text DataError."""
    pixels: Callable[[], bytes] | None = None
    """For images that we encode ourselves: the raw pixels, because encoded bytes depend on zlib's version."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that training goes on without."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source offers. `classes` are in natural order (img2 before img10)."""

    entries: tuple[Entry, ...]
    classes: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()


def listing(data: Data, task: Task = "multi-class") -> Listing:
    """All images of the recipe's source. Raises DataError when there is nothing usable."""
    if data.source in (*TEXT_SOURCES, *TABLES):
        from training import text_sources  # which builds on this module

        return text_sources.listing(data, task)
    if data.source == "digit_pairs":
        from training import pairs  # as above

        return pairs.listing(data, task)
    if data.source == "digits":
        return _digits()
    if data.source == "folder":
        if data.root is None:
            raise DataError(
                "the source 'folder' needs to know where the images lie",
                remedy="--set data.root=PHOTOS, a folder with one folder per class",
            )
        return tree(Path(data.root))
    root = Path(data.root or "data")
    if root.is_file() or any((root / name).is_dir() for name in ("train", "test")):
        return tree(root)
    return _downloaded(data.source, root)


def natural(name: str) -> tuple[object, ...]:
    """Sort key by which `img2` comes before `img10`."""
    # split() with a group puts texts at even and numbers at odd places, so that like is compared with like.
    parts = re.split(r"([0-9]+)", name)
    return (tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name)


# ---------------------------------------------------------------------------------------------- folders and zip files


@dataclass(frozen=True, slots=True)
class _File:
    path: PurePosixPath
    read: Callable[[], bytes]


def tree(root: Path, things: str = "images") -> Listing:
    """`root/<class>/**`, or `root/{train,val,test}/<class>/**`; `root` may be a .zip of either.

    Raises DataError, whose messages call the files `things`.
    """
    files, folders = _files(root)
    if not files:
        raise DataError(f"{root} holds no files", remedy=f"one folder of {things} per class is expected in it")
    tops = {path.parts[0] for path in folders}
    if not tops:
        raise DataError(
            f"{root} holds {things} but no class folders",
            remedy=f"put the {things} of each class into a folder of its name",
        )
    given = _are_given(root, tops, {path.parts[0] for path in folders if len(path.parts) > 1})
    depth = 2 if given else 1
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    for file in files:
        name = _shown(str(file.path))
        if len(file.path.parts) <= depth:
            skipped.append(Skipped(name, "not in a class folder"))
            continue
        split = _SPLIT_FOLDERS[file.path.parts[0].lower()] if given else None
        entries.append(Entry(name, file.path.parts[depth - 1], split, file.read))
    labels = {path.parts[depth - 1] for path in folders if len(path.parts) >= depth}
    for label in labels:
        if _shown(label) != label:
            raise DataError(
                f"the name of the class folder '{_shown(label)}' in {root} is not UTF-8",
                remedy="rename it, e.g. with convmv",
            )
    return Listing(tuple(entries), tuple(sorted(labels, key=natural)), tuple(skipped))


def _shown(name: str) -> str:
    """The name of a file; bytes that are not UTF-8 as \\udcXX, so that it can be written into reports."""
    return name.encode("utf-8", "backslashreplace").decode()


def _are_given(root: Path, tops: set[str], nested: set[str]) -> bool:
    """Whether the folders are the sides of a split, not classes; `nested` are those with folders in them.

    Raises DataError when only some of them are, or a side is missing or there twice.
    """
    split = {top for top in tops if top.lower() in _SPLIT_FOLDERS}
    others = ", ".join(_shown(top) for top in sorted(tops - split, key=natural)[:10])
    if others:
        if len({_SPLIT_FOLDERS[top.lower()] for top in split & nested}) > 1:
            raise DataError(
                f"{root} holds {' and '.join(sorted(split, reverse=True))} folders and also {others}",
                remedy="move the latter away, or point data.root at the class folders",
            )
        return False
    if nested:
        _check_split_folders(root, tops)
    return bool(nested)


def _check_split_folders(root: Path, tops: set[str]) -> None:
    sides = [_SPLIT_FOLDERS[top.lower()] for top in tops]
    for side in sides:
        if sides.count(side) > 1:
            raise DataError(
                f"{root} holds more than one {side} folder: {', '.join(sorted(tops))}", remedy="keep one of each"
            )
    for wanted in ("train", "test"):
        if wanted not in sides:
            raise DataError(
                f"{root} holds {', '.join(sorted(tops))} but no {wanted}/",
                remedy=f"add {wanted}/ with one folder per class, or point data.root at a folder that holds the class"
                " folders themselves: Marina then divides the images",
            )


def _files(root: Path) -> tuple[list[_File], set[PurePosixPath]]:
    """Every visible file and folder, as paths below the root."""
    if root.is_dir():
        files = [_File(path, (root / path).read_bytes) for path in _walk(root)]
        # Folders without files count too: an empty class folder is a mistake to report, not to overlook.
        below = [path.relative_to(root) for pattern in ("*", "*/*") for path in root.glob(pattern) if path.is_dir()]
        folders = {PurePosixPath(path.as_posix()) for path in below if not any(part[0] == "." for part in path.parts)}
    elif zipfile.is_zipfile(root):
        archive = _opened(root)
        named = [(PurePosixPath(name), name) for name in sorted(archive.namelist()) if not name.endswith("/")]
        files = [
            _File(path, functools.partial(_member, archive, name))
            for path, name in named
            if not any(part.startswith((".", "__MACOSX")) for part in path.parts)
        ]
        folders = set()
    else:
        raise DataError(
            f"data.root {root} is neither a folder nor a .zip file",
            remedy="--set data.root=PATH with the images' folder",
        )
    for file in files:
        folders |= {parent for parent in file.path.parents if parent.parts}
    return files, folders


def _opened(root: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(root)
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{root} cannot be read: {error}", remedy="make the .zip file again") from error


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Raises OSError, as a loose file would."""
    try:
        return archive.read(name)
    # In this order: damaged, cut short, encrypted, of an unknown compression.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise OSError(f"damaged or encrypted in the zip: {error}") from error


def _walk(root: Path) -> Iterator[PurePosixPath]:
    """Visible files in sorted order. Links are followed, each folder once."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield PurePosixPath((Path(folder) / name).relative_to(root).as_posix())


# --------------------------------------------------------------------------------------------------- images in arrays


def png(pixels: np.ndarray) -> bytes:
    """uint8 `[H, W]` or `[H, W, 3]` -> a PNG file of exactly these pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _digits() -> Listing:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The originals count 17 grey levels, 0 to 16.
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    entries = tuple(
        array_entry(f"digits-{index:04d}", str(label), None, image)
        for index, (image, label) in enumerate(zip(images, digits.target, strict=True))
    )
    return Listing(entries, tuple(str(name) for name in digits.target_names))


def _downloaded(source: Source, root: Path) -> Listing:
    """MNIST, FashionMNIST or CIFAR10 as torchvision keeps them, fetched on first use."""
    from torchvision import datasets

    kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[source]
    entries: list[Entry] = []
    classes: list[str] = []
    sides: tuple[tuple[Split, bool], ...] = (("train", True), ("test", False))
    for split, train in sides:
        images = _fetch(kind, root, train=train)
        # MNIST's own class names read "0 - zero"; its label is the digit.
        classes = [str(index) if source == "mnist" else str(name) for index, name in enumerate(images.classes)]
        for index, (image, target) in enumerate(zip(images.data, images.targets, strict=True)):
            entries.append(array_entry(f"{source}-{split}-{index:05d}", classes[int(target)], split, np.asarray(image)))
    return Listing(tuple(entries), tuple(sorted(classes, key=natural)))


def _fetch(kind: Any, root: Path, *, train: bool) -> Any:
    try:
        return kind(str(root), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{kind.__name__} is not in {root} and cannot be downloaded: {error}",
            remedy=f"connect to the internet, copy torchvision's files to {root}, or set data.root to a folder with"
            " train/<class>/ and test/<class>/",
        ) from error


def array_entry(name: str, label: str, given: Split | None, pixels: np.ndarray) -> Entry:
    """An image that lies in memory: uint8 `[H, W]` or `[H, W, 3]`."""
    return Entry(name, label, given, functools.partial(png, pixels), pixels.tobytes)
