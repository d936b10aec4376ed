"""Labelled images -> disjoint splits -> uint8 tensors.

Three steps, so that a run that is already finished costs only the first: `survey` reads every file once and knows its
digest; `prepare` decodes each image once through `handlerlib.imaging`, at the network's size, and divides. Everything
goes by content: neither the names of files nor their order nor the folder's place changes a split. For texts,
`training.text_data` takes the place of decoding.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from handlerlib import imaging
from handlerlib.errors import RequestError
from handlerlib.spec import Preprocess, Scaling, TextPreprocess
from handlerlib.text import stack
from training import truth
from training.config import TABLES, TEXT_SOURCES, Recipe, Source
from training.errors import DataError
from training.machine import moved
from training.progress import Report, Step
from training.sources import Entry, Skipped, Split, listing

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_EXIF_ORIENTATION = 0x0112
_BLOCK = 512
"""Images in work at once: bounds memory, and the wait after Ctrl-C."""
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image with its encoded bytes."""

    name: str
    label: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Found:
    """One image that was read: what its content is, without the content."""

    entry: Entry
    digest: str
    """SHA-256 of the file's bytes (of the pixels, for images out of arrays)."""
    size: tuple[int, int]
    """Upright width and height in pixels, from the header."""


@dataclass(frozen=True, slots=True)
class Survey:
    """All images of a source that look like images."""

    found: tuple[Found, ...]
    """In order of content."""
    classes: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    digest: str
    """SHA-256 over content, label and given side of every image."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """The same image under different labels."""

    names: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Notes:
    """What the user should know about the data; `data_report.json` in the run folder."""

    unreadable: tuple[Skipped, ...] = ()
    duplicates: int = 0
    """Images that equal another one; they stay on the same side of every split."""
    removed: tuple[str, ...] = ()
    """Training or validation images left out because a given test (or validation) set holds them too."""
    conflicts: tuple[Conflict, ...] = ()
    things: str = "images"
    """What messages call them."""
    advice: tuple[str, ...] = ()
    """Sentences about the data as a whole, with what to do."""

    def counts(self) -> dict[str, float]:
        return {
            "data_unreadable": float(len(self.unreadable)),
            "data_duplicates": float(self.duplicates),
            "data_removed_duplicates": float(len(self.removed)),
            "data_label_conflicts": float(len(self.conflicts)),
        }

    def lines(self) -> Iterator[str]:
        """One sentence per kind of finding, with up to ten names."""
        if self.unreadable:
            yield f"{len(self.unreadable)} files left out: " + some(f"{s.name} ({s.reason})" for s in self.unreadable)
        if self.removed:
            yield f"{len(self.removed)} {self.things} left out that the test or validation set holds too: " + some(
                self.removed
            )
        if self.conflicts:
            pairs = (f"{' = '.join(c.names)} ({', '.join(c.labels)})" for c in self.conflicts)
            yield f"{len(self.conflicts)} {self.things} appear under different labels: " + some(pairs)
        yield from self.advice


@dataclass(frozen=True, slots=True)
class Dataset:
    """Decoded and divided. Row i of `x_NCHW` and `targets_N` is `images[i]`; `rows[split]` are row numbers."""

    images: tuple[Found, ...]
    classes: tuple[str, ...]
    preprocess: Preprocess
    x_NCHW: Tensor
    """uint8, as kept in memory: at the network's size, or at the images' own where that is smaller (see `pixels`);
    empty when only the splits were asked for."""
    targets_N: Tensor
    """int64 class numbers; of other tasks float32 `[N, K]`, as `training.truth.learned` gives them."""
    rows: Mapping[Split, tuple[int, ...]]
    notes: Notes = field(default_factory=Notes)
    text: TextPreprocess | None = None
    """Of texts, which have neither `preprocess` nor `x_NCHW`."""
    terms: tuple[Tensor, ...] = ()
    """Of texts: int32 `[terms]` per row; none when only the splits were asked for."""
    scaling: tuple[Scaling, ...] = ()
    """Of a regression: how `targets_N` were standardised, per target."""

    def sizes(self) -> dict[str, int]:
        return {split: len(self.rows[split]) for split in SPLITS}

    def input(self, rows: Tensor, size: tuple[int, int], device: torch.device) -> Tensor:
        """What the network takes for these rows, on `device`: normalised images of that size, or numbers of terms."""
        if self.text is not None:
            return moved(stack([self.terms[row] for row in rows.tolist()]), device)
        return imaging.normalise(moved(self.pixels(rows, size), device), self.preprocess)

    def pixels(self, rows: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """uint8 `[B, C, height, width]` of these rows, at the network's height and width or at `size`.

        At the network's size these are the bits that `imaging.load` gives a worker.
        """
        height, width = size or (self.preprocess.height, self.preprocess.width)
        # What is kept differs from the network's input by a stretch at most: cutting was done while decoding.
        wanted = replace(self.preprocess, height=height, width=width, resize="stretch")
        return imaging.fit(self.x_NCHW[rows], wanted)

    def samples(self, split: Split) -> Iterator[Sample]:
        """The split's images in its order, read from the source one by one."""
        for row in self.rows[split]:
            entry = self.images[row].entry
            yield Sample(entry.name, entry.label, entry.read())


def survey(recipe: Recipe, *, threads: int, report: Report) -> Survey:
    """Read every image (or text) of the source once. Raises DataError when they are no classification data set."""
    offered = listing(recipe.data, recipe.task)
    results = _each(_examiner(recipe), offered.entries, threads=threads, phase="read", report=report)
    skipped = [*offered.skipped, *(result for result in results if isinstance(result, Skipped))]
    found = [result for result in results if isinstance(result, Found)]
    check_classes(found, offered.classes, skipped, recipe)
    if recipe.data.max_images is not None:
        found = _thin(found, recipe.data.max_images, recipe)
    found.sort(key=lambda one: (one.digest, one.entry.label, one.entry.name))
    lines = sorted(f"{one.digest} {one.entry.given or '-'} {one.entry.label}\n" for one in found)
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return Survey(tuple(found), offered.classes, tuple(skipped), digest)


def prepare(
    surveyed: Survey, recipe: Recipe, *, threads: int, report: Report, store: Path | None = None, keep: bool = True
) -> Dataset:
    """Decode and divide. With `keep` false the pixels are dropped and only the splits remain.

    Pixels beyond `data.memory_mib` go to the file `store`, which the caller removes. Raises DataError when a class
    has too few readable images.
    """
    if recipe.of_texts:
        from training import text_data  # which builds on this module

        return text_data.prepare(surveyed, recipe, report=report, keep=keep)
    preprocess = _geometry(surveyed.found, recipe)
    kept = _kept_geometry(surveyed.found, preprocess)
    images, keys, grey, x_NCHW, damaged = _decode(surveyed.found, kept, recipe, threads, report, store, keep)
    check_classes(images, surveyed.classes, [*surveyed.skipped, *damaged], recipe)
    if recipe.data.channels == "auto" and grey:
        # A grey image has three equal channels after conversion, so one of them is what conversion to grey gives.
        preprocess = replace(preprocess, channels=1, mean=preprocess.mean[:1], std=preprocess.std[:1])
        x_NCHW = x_NCHW[:, :1]
    grouped = groups(images, keys)
    rows, removed = divide(images, grouped, recipe)
    check_splits(images, rows, surveyed.classes, recipe)
    notes = Notes(
        unreadable=(*surveyed.skipped, *damaged),
        duplicates=len(images) - len(grouped),
        removed=tuple(images[row].entry.name for row in removed),
        conflicts=tuple(conflicts(images, grouped)),
    )
    labels = [one.entry.label for one in images]
    targets_N, scaling = truth.learned(labels, surveyed.classes, recipe.task, rows["train"])
    dataset = Dataset(
        tuple(images), surveyed.classes, preprocess, x_NCHW, targets_N, rows, notes, scaling=scaling
    )  # fmt: skip
    return replace(dataset, preprocess=_with_statistics(dataset)) if keep else dataset


# ------------------------------------------------------------------------------------------------------------- reading


def _examiner(recipe: Recipe) -> Callable[[Entry], Found | Skipped]:
    if not recipe.of_texts:
        return _examine
    from training import text_data  # as above

    return text_data.examine


def _examine(entry: Entry) -> Found | Skipped:
    """Digest and size of one file, or why it is none of ours."""
    try:
        data = entry.read()
    except OSError as error:
        return Skipped(entry.name, f"cannot be read: {error.strerror or error}")
    announced = imaging.sniff(data)
    if announced is None:
        return Skipped(entry.name, f"not an image of a supported format ({', '.join(imaging.FORMATS)})")
    try:
        with Image.open(io.BytesIO(data), formats=[announced]) as image:
            width, height = image.size
            # Asking a PNG without early EXIF data would decode all of it.
            has_exif = image.format != "PNG" or "exif" in image.info
            turned = width != height and has_exif and image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
    except Exception:  # noqa: BLE001 - decoders raise anything on damaged files; the file is named and left out
        return Skipped(entry.name, f"damaged {announced}")
    content = data if entry.pixels is None else f"{width}x{height} ".encode() + entry.pixels()
    return Found(entry, hashlib.sha256(content).hexdigest(), (height, width) if turned else (width, height))


def _thin(found: list[Found], most: int, recipe: Recipe) -> list[Found]:
    """At most about `most` images, in proportion over given sides and classes, two of each at least."""
    part = min(1.0, most / len(found))
    strata: dict[tuple[str, str], list[Found]] = defaultdict(list)
    for one in found:
        strata[one.entry.given or "", one.entry.label if recipe.task == "multi-class" else ""].append(one)
    kept = (sorted(stratum, key=lambda one: _draw(recipe.seed, one.digest)) for stratum in strata.values())
    return [one for stratum in kept for one in stratum[: max(2, math.floor(len(stratum) * part))]]


def _draw(seed: int, digest: str) -> str:
    """A random-looking sort key that depends on content and seed only."""
    return hashlib.sha256(f"{seed} {digest}".encode()).hexdigest()


def _each(
    work: Callable[[_T], _R], items: Sequence[_T], *, threads: int, phase: str, report: Report
) -> Iterator[_R] | list[_R]:
    """`work` on every item in threads, results in order."""
    results: list[_R] = []
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), _BLOCK):
            results += pool.map(work, items[start : start + _BLOCK])
            report(Step(phase, len(results), len(items), ""))
    return results


# ------------------------------------------------------------------------------------------------------------ decoding


def _geometry(found: Sequence[Found], recipe: Recipe) -> Preprocess:
    """Input size and resize policy from the images' own sizes; mean and std are placeholders until the split."""
    sizes = {one.size for one in found}
    common = next(iter(sizes)) if len(sizes) == 1 else None
    side = recipe.data.image_size
    if side != "auto":
        width = height = side
    elif common is not None and max(common) <= recipe.data.max_side:
        width, height = common
    else:
        width = height = recipe.data.max_side
    channels = 3 if recipe.data.channels == "auto" else recipe.data.channels
    return Preprocess(
        channels=channels,
        height=height,
        width=width,
        resize="stretch" if common is not None else "cover",
        crop_fraction=recipe.data.crop_fraction if common is None else 1.0,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
    )


def _kept_geometry(found: Sequence[Found], preprocess: Preprocess) -> Preprocess:
    """How images are kept in memory: as they are when a stretch only enlarges them, which each batch can do itself."""
    width, height = found[0].size
    if preprocess.resize == "stretch" and height <= preprocess.height and width <= preprocess.width:
        return replace(preprocess, height=height, width=width)
    return preprocess


def _decode(
    found: Sequence[Found],
    preprocess: Preprocess,
    recipe: Recipe,
    threads: int,
    report: Report,
    store: Path | None,
    keep: bool,
) -> tuple[list[Found], list[bytes], bool, Tensor, list[Skipped]]:
    """Images that decode, a digest of each one's pixels, whether all are grey, the pixels, and what was left out."""
    limits = recipe.serve.limits
    shape = (preprocess.channels, preprocess.height, preprocess.width)
    x_NCHW = _allocate(len(found) if keep else 0, shape, recipe.data.memory_mib, store)

    def load(one: Found) -> Tensor | Skipped:
        try:
            return imaging.load(one.entry.read(), preprocess, limits)
        except OSError as error:
            return Skipped(one.entry.name, f"cannot be read: {error.strerror or error}")
        except RequestError as error:
            return Skipped(one.entry.name, str(error))

    images: list[Found] = []
    keys: list[bytes] = []
    damaged: list[Skipped] = []
    grey = True
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(found), _BLOCK):
            block = found[start : start + _BLOCK]
            for one, loaded in zip(block, pool.map(load, block), strict=True):
                if isinstance(loaded, Skipped):
                    damaged.append(loaded)
                    continue
                grey = grey and bool((loaded == loaded[:1]).all())
                keys.append(hashlib.sha256(loaded.numpy().tobytes()).digest())
                if keep:
                    x_NCHW[len(images)] = loaded
                images.append(one)
            report(Step("decode", min(start + _BLOCK, len(found)), len(found), ""))
    return images, keys, grey, x_NCHW[: len(images)], damaged


def _allocate(count: int, shape: tuple[int, int, int], memory_mib: int, store: Path | None) -> Tensor:
    size = count * math.prod(shape)
    if store is None or size <= memory_mib << 20:
        return torch.empty((count, *shape), dtype=torch.uint8)
    _reserve(store, size)
    return torch.from_file(str(store), shared=True, size=size, dtype=torch.uint8).view(count, *shape)


def _reserve(path: Path, size: int) -> None:
    """Raises OSError when the disk has no room: a mapped page that finds none later ends the process by a signal."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def _with_statistics(dataset: Dataset) -> Preprocess:
    """Mean and standard deviation of the training split. Sums of integers, so that no rounding depends on order."""
    preprocess = dataset.preprocess
    counts = torch.zeros((preprocess.channels, 256), dtype=torch.int64)
    for rows in torch.split(torch.tensor(dataset.rows["train"]), _BLOCK):
        block = dataset.pixels(rows)
        for channel in range(preprocess.channels):
            counts[channel] += torch.bincount(block[:, channel].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    mean = (share * levels).sum(dim=1)
    std = (share * (levels - mean.unsqueeze(1)) ** 2).sum(dim=1).sqrt()
    # Images of one colour throughout have no deviation to divide by.
    return replace(
        preprocess,
        mean=tuple(round(float(value), 6) for value in mean),
        std=tuple(max(round(float(value), 6), 1e-3) for value in std),
    )


# ------------------------------------------------------------------------------------------------------------ dividing


def groups(images: Sequence[Found], keys: Sequence[bytes]) -> list[list[int]]:
    """Rows of images that look the same to the network; equal files are among them."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    return list(groups.values())


def conflicts(images: Sequence[Found], groups: Sequence[Sequence[int]]) -> Iterator[Conflict]:
    for group in groups:
        labels = {images[row].entry.label for row in group}
        if len(labels) > 1:
            yield Conflict(tuple(sorted(images[row].entry.name for row in group)), tuple(sorted(labels)))


def divide(
    images: Sequence[Found], groups: Sequence[Sequence[int]], recipe: Recipe
) -> tuple[dict[Split, tuple[int, ...]], list[int]]:
    """Rows of each split, and rows left out. A group never lies on two sides."""
    data = recipe.data
    rows: dict[Split, list[int]] = {split: [] for split in SPLITS}
    removed: list[int] = []
    free: list[Sequence[int]] = []
    for group in groups:
        sides = {images[row].entry.given for row in group}
        # The stricter side keeps its images as given: figures on a published test set stay comparable.
        side: Split | None = next((side for side in ("test", "validation", "train") if side in sides), None)
        kept = [row for row in group if images[row].entry.given == side]
        removed += [row for row in group if images[row].entry.given != side]
        if side in ("test", "validation"):
            rows[side] += kept
        else:
            free.append(kept)
    own_test = bool(rows["test"])
    own_validation = bool(rows["validation"])
    fractions = (0.0 if own_validation else data.validation, 0.0 if own_test else data.test)
    for split, part in _stratify(images, free, recipe, *fractions).items():
        rows[split] += part
    ordered = {
        split: tuple(sorted(part, key=lambda row: (_draw(recipe.seed, images[row].digest), images[row].entry.name)))
        for split, part in rows.items()
    }
    return ordered, sorted(removed)


def _stratify(
    images: Sequence[Found], groups: Sequence[Sequence[int]], recipe: Recipe, validation: float, test: float
) -> dict[Split, list[int]]:
    """Divide every class in the same proportions: test first, then validation, the rest trains. Sets of labels and values
    are divided at random: most of them are of one image alone."""
    by_label: dict[str, list[Sequence[int]]] = defaultdict(list)
    for group in groups:
        # Rows are in order of content, so the first one's label does not depend on names.
        by_label[images[group[0]].entry.label if recipe.task == "multi-class" else ""].append(group)
    rows: dict[Split, list[int]] = {split: [] for split in SPLITS}
    for members in by_label.values():
        members.sort(key=lambda group: _draw(recipe.seed, images[group[0]].digest))
        tests = max(1, round(len(members) * test)) if test else 0
        validations = max(1, round(len(members) * validation)) if validation and len(members) - tests > 1 else 0
        bounds: tuple[tuple[Split, int], ...] = (("test", tests), ("validation", validations), ("train", len(members)))
        rest = iter(members)
        for split, count in bounds:
            rows[split] += itertools.chain.from_iterable(itertools.islice(rest, count))
    return rows


# ------------------------------------------------------------------------------------------------------------ checking


def check_classes(images: Sequence[Found], classes: Sequence[str], skipped: Sequence[Skipped], recipe: Recipe) -> None:
    """Raises DataError when there are not two classes of two images each, on each given side; of labels and values when
    they cannot be learned from."""
    if recipe.task != "multi-class":
        truth.check([one.entry.label for one in images], classes, recipe)
        return
    root = recipe.data.root or recipe.data.source
    thing, folders = recipe.thing, recipe.data.source not in TABLES
    left_out = f"; {len(skipped)} files were left out: {some(f'{s.name} ({s.reason})' for s in skipped)}"
    if not images:
        raise DataError(
            f"{root} holds no readable {thing}{left_out if skipped else ''}",
            remedy=f"one folder of {thing}s per class is expected in it"
            if folders
            else "give a file with rows of data",
        )
    if len(classes) < 2:
        raise DataError(
            f"{root} holds only one class, '{classes[0]}'",
            remedy=f"classification needs at least two {'class folders' if folders else 'classes'}",
        )
    for split in ("train", "test"):
        if any(one.entry.given == split for one in images):
            _check_same_classes(images, classes, split, root, recipe.data.source)
    counts = Counter(one.entry.label for one in images if one.entry.given in (None, "train"))
    for label in classes:
        if counts[label] < 2:
            mine = [s for s in skipped if f"{label}/" in s.name]
            tail = f"; left out: {some(f'{s.name} ({s.reason})' for s in mine)}" if mine else ""
            raise DataError(
                f"class '{label}' in {root} has {counts[label] or 'no'} readable"
                f" {thing}{'' if counts[label] == 1 else 's'}, two are the least{tail}",
                remedy=f"add {thing}s of '{label}' or remove its {'folder' if folders else 'rows'}",
            )


def _check_same_classes(images: Sequence[Found], classes: Sequence[str], split: str, root: str, source: Source) -> None:
    present = {one.entry.label for one in images if one.entry.given == split}
    missing = ", ".join(repr(label) for label in classes if label not in present)
    if not missing:
        return
    if source in TABLES or source in TEXT_SOURCES:
        raise DataError(
            f"{root}: the {split} split has none of {missing}, others do",
            remedy="training and test data need the same classes, spelt alike",
        )
    raise DataError(
        f"{root}: {split}/ has no images of {missing}, other folders do",
        remedy="train/ and test/ need the same class folders, spelt alike",
    )


def check_splits(
    images: Sequence[Found], rows: Mapping[Split, Sequence[int]], classes: Sequence[str], recipe: Recipe
) -> None:
    if recipe.task != "multi-class":
        truth.check_splits([one.entry.label for one in images], rows, classes, recipe)
        return
    judged: tuple[Split, ...] = ("train", "test")
    for split in judged:
        present = {images[row].entry.label for row in rows[split]}
        for label in classes:
            if label not in present:
                raise DataError(
                    f"class '{label}' has no image left for the {split} split: its images are copies of one another"
                    " or of other classes' images",
                    remedy=f"add different images of '{label}'",
                )
    if not rows["validation"]:
        raise DataError(
            "no class has enough different images for a validation split", remedy="give at least three images per class"
        )


def some(names: Any, most: int = 10) -> str:
    """The first few, and how many more."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
