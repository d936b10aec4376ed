"""Where labelled texts come from: class folders of .txt files, and CSV; the latter also of images beside it.

A text is read as UTF-8 from here on, whatever its file's encoding, as a worker gets it. What is wrong in a file is an
error with its name and line: a text that is left out silently would be missing where it matters.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from handlerlib.spec import Task
from training import columns
from training.config import Data
from training.errors import DataError
from training.sources import Entry, Listing, Skipped, Split, natural, tree

CSV_FILES: tuple[tuple[str, Split], ...] = (
    ("train.csv", "train"),
    ("validation.csv", "validation"),
    ("test.csv", "test"),
)
"""In a folder given as `data.root`."""
_Row = tuple[int, list[str]]
"""Number of its last line, and its values."""


def listing(data: Data, task: Task = "multi-class") -> Listing:
    """All texts of the recipe's source, or the images of its table. Raises DataError when there is nothing usable."""
    try:
        # Not codecs.lookup(), which also knows codecs that are none of text, such as hex.
        "text".encode(data.encoding)
    except (LookupError, ValueError):
        raise DataError(
            f"data.encoding '{data.encoding}' is not known as an encoding of text", remedy="e.g. utf-8, cp1252, gb18030"
        ) from None
    if data.root is None:
        raise DataError(
            f"the source '{data.source}' needs to know where the {_thing(data)}s lie",
            remedy=f"--set data.root={_thing(data).upper()}S, " + _EXPECTED[data.source],
        )
    return _folders(Path(data.root), data) if data.source == "texts" else _csv(Path(data.root), data, task)


def _thing(data: Data) -> str:
    return "image" if data.source == "image_csv" else "text"


_EXPECTED = {
    "texts": "a folder with one folder of .txt files per class",
    "csv": "a .csv file, or a folder with train.csv and test.csv",
    "image_csv": "a .csv file beside the images, or a folder with train.csv and test.csv",
}


def _folders(root: Path, data: Data) -> Listing:
    found = tree(root, "texts")
    entries: list[Entry] = []
    skipped = list(found.skipped)
    for entry in found.entries:
        if not entry.name.lower().endswith(".txt"):
            skipped.append(Skipped(entry.name, "not a .txt file"))
            continue
        read = functools.partial(_as_utf8, entry.read, f"{root / entry.name}", data.encoding)
        entries.append(Entry(entry.name, entry.label, entry.given, read))
    return Listing(tuple(entries), found.classes, tuple(skipped))


def _as_utf8(read: Callable[[], bytes], where: str, encoding: str) -> bytes:
    return _decoded(read(), where, encoding).encode()


def _decoded(data: bytes, where: str, encoding: str) -> str:
    try:
        text = data.decode(encoding)
        text.encode()
    except UnicodeError as error:
        start = error.start if isinstance(error, UnicodeDecodeError) else 0
        line = data.count(b"\n", 0, start) + 1
        raise DataError(
            f"{where}, line {line}: not {encoding}: {getattr(error, 'reason', error)} (byte {start})",
            remedy=f"store it as UTF-8, or --set data.encoding={_likely(data)} if it is that; look at the labels afterwards",
        ) from error
    return text.removeprefix("\ufeff")


_HAN = "[\u4e00-\u9fff]{2,}"
_FITS: tuple[tuple[str, str, str, float], ...] = (
    ("utf-8", "utf-8", "(?!)", 0.0),
    ("cp949", "cp949", "[\uac00-\ud7a3]+", 0.8),
    ("cp932", "cp932", "[\u3041-\u30ff]+", 0.2),
    ("euc_jp", "euc_jp", "[\u3041-\u30ff]+", 0.2),
    ("gb2312", "gb18030", _HAN, 0.5),
    ("big5", "big5", _HAN, 0.5),
    ("gb18030", "gb18030", _HAN, 0.5),
)
"""Codec that the bytes must fit, the one to name, its language's characters, and their least share of what is not ASCII.

Bytes of one often fit several. Hangul and kana tell theirs; Big5 has second bytes that GB 2312 has not. Han characters
count two in a row: an accented letter of cp1252 and the letter after it look like a single one.
"""


def _likely(data: bytes) -> str:
    """The encoding that bytes which are not in the given one may be in."""
    for codec, name, characters, least in _FITS:
        try:
            text = data.decode(codec)
        except UnicodeError:
            continue
        others = len(text) - len(text.encode("ascii", "ignore"))
        if sum(len(found[0]) for found in re.finditer(characters, text)) >= least * others:
            return name
    return "cp1252"


# ----------------------------------------------------------------------------------------------------------------- csv


def _csv(root: Path, data: Data, task: Task) -> Listing:
    entries: list[Entry] = []
    for path, split in _files(root, data):
        named = list(_entries(path, split, data, task))
        entries += named if split is not None else _divided(path, named, data)
    return Listing(tuple(entries), columns.classes(data, task, (entry.label for entry in entries), natural))


def _files(root: Path, data: Data) -> list[tuple[Path, Split | None]]:
    if root.is_file():
        return [(root, None)]
    found: list[tuple[Path, Split | None]] = [
        (root / name, split) for name, split in CSV_FILES if (root / name).is_file()
    ]
    sides = {split for _, split in found}
    if not {"train", "test"} <= sides:
        raise DataError(
            f"data.root {root} is neither a .csv file nor a folder with train.csv and test.csv",
            remedy="--set data.root=FILE.csv",
        )
    if data.train_rows:
        raise DataError(
            f"data.train_rows divides one file, and {root} holds {len(found)}",
            remedy="leave the rows out, or name a file",
        )
    return found


def _entries(path: Path, split: Split | None, data: Data, task: Task) -> Iterator[Entry]:
    """Every row, checked."""
    rows = _rows(path, data)
    if data.columns is not None:
        names: Sequence[str] = data.columns
    else:
        _, names = next(rows, (0, []))
        names = [name.strip() for name in names]
    if not names:
        raise DataError(f"{path} is empty", remedy="give a file with a row of column names and rows of data")
    label = columns.reader(data, task, lambda wanted: _column(path, names, wanted, data))
    content = (data.path_column,) if data.source == "image_csv" else data.text_columns
    content_at = [_column(path, names, wanted, data) for wanted in content]
    lines: dict[str, int] = {}
    for line, values in rows:
        where = f"{path}, line {line}"
        if len(values) != len(names):
            raise DataError(
                f"{where}: {len(values)} values, the columns are {len(names)} ({', '.join(names)})",
                remedy='mend the row: a value with a delimiter, a quote or a line break stands in "quotes"',
            )
        text = "\n".join(values[at] for at in content_at)
        known = label(values, where)
        if data.source == "image_csv":
            name = text.strip()
            yield Entry(name, known, split, _image(path.parent, name, where, lines.setdefault(name, line) == line))
        else:
            yield Entry(f"{path.name}:{line}", known, split, functools.partial(bytes, text.encode()))


def _image(folder: Path, name: str, where: str, first: bool) -> Callable[[], bytes]:
    if not name or not _is_file(folder / name):
        raise DataError(
            f"{where}: there is no image '{name[:200]}' in {folder}" if name else f"{where}: no image is named",
            remedy="paths are relative to the folder of the file with the table; data.path_column names their column",
        )
    if not first:
        raise DataError(f"{where}: the image '{name}' has a row already", remedy="give each image one row")
    return (folder / name).read_bytes


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # longer than a name may be
        return False


def _rows(path: Path, data: Data) -> Iterator[_Row]:
    """Rows that are not blank. RFC 4180, with any delimiter."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", remedy="check data.root") from error
    text = _decoded(raw, str(path), data.encoding)
    before = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=data.delimiter, strict=True)
    try:
        for values in reader:
            if values:
                yield reader.line_num, values
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}",
            remedy='mend the row: inside "quotes" a quote is written twice, and every quote is closed',
        ) from error
    finally:
        csv.field_size_limit(before)


def _column(path: Path, names: Sequence[str], wanted: str, data: Data) -> int:
    if names.count(wanted) == 1:
        return names.index(wanted)
    if wanted in names:
        raise DataError(f"{path}: there is more than one column '{wanted}'", remedy="rename one of them")
    if len(names) == 1 and (delimiter := next((one for one in ";\t|," if one in names[0]), None)):
        raise DataError(
            f"{path} has no column '{wanted}': its first row names {names[0][:200]}",
            remedy=f"--set 'data.delimiter={json.dumps(delimiter)}' when that stands between its values",
        )
    beyond = "data.columns" if data.columns is not None else "its first row"
    raise DataError(
        f"{path} has no column '{wanted}': {beyond} names {', '.join(names)[:200]}",
        remedy="name the columns in [data]: label_column, label_columns or target_columns, and path_column or"
        " text_columns; data.columns=[...] when no row of the file names them",
    )


def _divided(path: Path, entries: list[Entry], data: Data) -> list[Entry]:
    """The recipe's first, next and last rows; all of them, not divided, when it names none."""
    if not data.train_rows:
        return entries
    first, chosen, last = data.train_rows, data.validation_rows, data.test_rows
    if first + chosen + last > len(entries):
        raise DataError(
            f"{path} has {len(entries)} rows of data, the recipe wants {first} + {chosen} + {last}",
            remedy="--set data.train_rows=N, data.validation_rows=M and data.test_rows=K with a smaller sum",
        )
    sides: tuple[tuple[Split, Sequence[Entry]], ...] = (
        ("train", entries[:first]),
        ("validation", entries[first : first + chosen]),
        ("test", entries[-last:]),
    )
    return [Entry(entry.name, entry.label, split, entry.read, entry.pixels) for split, part in sides for entry in part]
