"""Folders and zip files as people have them: split folders in any spelling, odd names, damaged members."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from training import data, html_report, sources
from training.config import Recipe
from training.data import Survey
from training.errors import DataError
from training.progress import silent

WriteTree = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]


def survey(recipe: Recipe) -> Survey:
    return data.survey(recipe, threads=1, report=silent)


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAIN", "Val", "test")])
def test_split_folders_in_any_case_are_the_split(
    names: tuple[str, ...], tree: WriteTree, folder_recipe: MakeRecipe
) -> None:
    for number, name in enumerate(names):
        root = tree(f"photos/{name}", skip=5 * number, cat=5, dog=5).parent
    found = survey(folder_recipe(root))
    assert found.classes == ("cat", "dog")
    assert {one.entry.given for one in found.found} == {sources._SPLIT_FOLDERS[name.lower()] for name in names}


@pytest.mark.parametrize("other", ["docs", "Meta"])
@pytest.mark.parametrize("names", [("train", "test"), ("Train", "val")])
def test_split_folders_beside_another_folder_are_refused(
    names: tuple[str, str], other: str, tree: WriteTree, folder_recipe: MakeRecipe
) -> None:
    for name in names:
        root = tree(f"photos/{name}", cat=5, dog=5).parent
    (root / other).mkdir()
    (root / other / "readme.txt").write_text("x")
    with pytest.raises(DataError, match=f"folders and also {other}") as caught:
        survey(folder_recipe(root))
    assert "move the latter away" in caught.value.remedy


def test_split_folders_twice_in_two_spellings_are_refused(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    for name in ("Train", "train", "test"):
        root = tree(f"photos/{name}", cat=5, dog=5).parent
    with pytest.raises(DataError, match="more than one train folder: Train, test, train"):
        survey(folder_recipe(root))


def test_a_class_named_as_a_split_stays_one_among_others(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    """Vehicles, of which one has folders of its own."""
    tree("photos", train=5, car=5, test=5)
    root = tree("photos/car", estate=5).parent
    assert survey(folder_recipe(root)).classes == ("car", "test", "train")


# -------------------------------------------------------------------------------------------------- names not in UTF-8


def test_a_file_whose_name_is_not_utf8_can_be_named_in_every_report(
    tmp_path: Path, tree: WriteTree, folder_recipe: MakeRecipe
) -> None:
    root = tree("photos", cat=5, dog=5)
    (root / "cat" / "img0.png").rename(root / "cat" / os.fsdecode(b"caf\xe9.png"))
    (root / os.fsdecode(b"h\xe9.txt")).write_text("x")
    found = survey(folder_recipe(root))
    names = [one.entry.name for one in found.found] + [one.name for one in found.skipped]
    assert "cat/caf\\udce9.png" in names and "h\\udce9.txt" in names
    (odd,) = (one.entry for one in found.found if "caf" in one.entry.name)
    assert odd.read().startswith(b"\x89PNG")
    (tmp_path / "names.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")


def test_a_class_folder_whose_name_is_not_utf8_is_refused_by_name(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    root = tree("photos", cat=5, dog=5)
    (root / "cat").rename(root / os.fsdecode(b"ca\xe9"))
    with pytest.raises(DataError, match=r"class folder 'ca\\udce9' in .* is not UTF-8") as caught:
        survey(folder_recipe(root))
    assert "convmv" in caught.value.remedy


# ---------------------------------------------------------------------------------------------------------------- zips


def pack(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.png")):
            info = zipfile.ZipInfo(prefix + file.relative_to(folder).as_posix())
            archive.writestr(info, file.read_bytes(), zipfile.ZIP_DEFLATED)
    return path


def test_a_zip_whose_names_begin_with_a_dot_and_a_slash(
    tmp_path: Path, tree: WriteTree, folder_recipe: MakeRecipe
) -> None:
    packed = pack(tree("photos", cat=5, dog=5), tmp_path / "photos.zip", "./")
    found = survey(folder_recipe(packed))
    assert found.classes == ("cat", "dog") and len(found.found) == 10 and not found.skipped


def change(path: Path, number: int, local: int, central: int, value: bytes) -> None:
    """Overwrite a field of one member in its local and its central header (APPNOTE, 4.3.7 and 4.3.12)."""
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        at = -1
        for _ in range(number + 1):
            at = content.index(mark, at + 1)
        content[at + offset : at + offset + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("local", "central", "value", "reason"),
    [
        (14, 16, b"\0\0\0\0", "Bad CRC-32"),
        (6, 8, b"\1\0", "encrypted"),
        (8, 10, b"\x63\0", "compression"),
    ],
    ids=["damaged", "encrypted", "unknown compression"],
)
def test_a_member_that_cannot_be_unpacked_is_left_out_by_name(
    local: int, central: int, value: bytes, reason: str, tmp_path: Path, tree: WriteTree, folder_recipe: MakeRecipe
) -> None:
    packed = pack(tree("photos", cat=5, dog=5), tmp_path / "photos.zip")
    change(packed, 0, local, central, value)
    found = survey(folder_recipe(packed))
    assert len(found.found) == 9
    assert [one.name for one in found.skipped] == ["cat/img0.png"]
    assert "damaged or encrypted in the zip" in found.skipped[0].reason and reason in found.skipped[0].reason


# -------------------------------------------------------------------------------------------------------- the pictures


def test_an_image_that_cannot_be_pictured_is_named(tree: WriteTree) -> None:
    whole = (tree("photos", cat=1) / "cat" / "img0.png").read_bytes()
    shot = html_report._pictured("cat/img0.png", "60% sure", "cat, taken for dog", whole[:-30])
    assert shot["name"] == "img0.png" and not shot["picture"] and not shot["text"]


def test_a_picture_with_an_oddly_typed_exif_tag_is_shown_upright() -> None:
    """A text where a number belongs, as some cameras write it: whoever writes the block again fails at it."""
    turned, width = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0), struct.pack(">HHI4s", 0x0100, 2, 4, b"abc")
    block = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + width + turned + bytes(4)
    buffer = io.BytesIO()
    Image.new("RGB", (200, 100), "red").save(buffer, "JPEG", exif=block)
    shot = html_report._pictured("a.jpg", "60% sure", "cat", buffer.getvalue())
    picture = Image.open(io.BytesIO(base64.b64decode(shot["picture"].partition(",")[2])))
    assert picture.height > picture.width
