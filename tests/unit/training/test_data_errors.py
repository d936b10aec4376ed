"""Each way in which images are not a data set gets its own clear error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from training import data
from training.config import Recipe, load_recipe
from training.errors import DataError
from training.progress import silent

WriteTree = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]


def prepare(recipe_root: Path, make: MakeRecipe) -> None:
    recipe = make(recipe_root)
    data.prepare(data.survey(recipe, threads=1, report=silent), recipe, threads=1, report=silent)


def refuse(root: Path, make: MakeRecipe, message: str) -> DataError:
    with pytest.raises(DataError, match=message) as caught:
        prepare(root, make)
    assert caught.value.exit_code == 4
    assert caught.value.remedy
    return caught.value


def test_no_root_given() -> None:
    with pytest.raises(DataError, match="where the images lie") as caught:
        data.survey(load_recipe("folder", []), threads=1, report=silent)
    assert "--set data.root=" in caught.value.remedy


def test_root_missing(tmp_path: Path, folder_recipe: MakeRecipe) -> None:
    assert "--set data.root=" in refuse(tmp_path / "none", folder_recipe, "none is neither a folder nor").remedy


def test_root_is_another_file(tmp_path: Path, folder_recipe: MakeRecipe) -> None:
    (tmp_path / "notes.txt").write_text("x")
    refuse(tmp_path / "notes.txt", folder_recipe, "neither a folder nor a .zip")


def test_empty_folder(tmp_path: Path, folder_recipe: MakeRecipe) -> None:
    (tmp_path / "p").mkdir()
    refuse(tmp_path / "p", folder_recipe, "holds no files")


def test_images_without_class_folders(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    refuse(tree(zero=5) / "zero", folder_recipe, "no class folders")


def test_one_class(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    refuse(tree(zero=5), folder_recipe, "only one class, 'zero'")


def test_class_with_one_image(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    refuse(tree(zero=9, one=1), folder_recipe, "class 'one' in .* has 1 readable image, two are the least")


def test_empty_class_folder(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    root = tree(zero=9, one=9)
    (root / "two").mkdir()
    refuse(root, folder_recipe, "class 'two' in .* has no readable images")


def test_class_whose_files_are_all_damaged_but_one(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    root = tree(zero=9, one=2)
    whole = (root / "one" / "img0.png").read_bytes()
    (root / "one" / "img0.png").write_bytes(whole[:-30])
    refuse(root, folder_recipe, r"class 'one' .* has 1 readable image.*one/img0\.png \(.*truncated or damaged")


def test_nothing_readable(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    root = tree(zero=3, one=3)
    for path in root.rglob("*.png"):
        path.write_bytes(b"garbage")
    refuse(root, folder_recipe, "no readable image; 6 files were left out: .*img0.png")


@pytest.mark.parametrize(("there", "missing"), [("train", "test"), ("test", "train")])
def test_split_missing(there: str, missing: str, tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    root = tree(f"photos/{there}", zero=5, one=5).parent
    refuse(root, folder_recipe, f"holds {there} but no {missing}/")


def test_two_validation_folders(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    for name in ("train", "test", "val", "valid"):
        root = tree(f"photos/{name}", zero=5, one=5).parent
    refuse(root, folder_recipe, "more than one validation folder")


def test_class_names_differ_between_train_and_test(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    tree("photos/train", cat=5, dog=5)
    root = tree("photos/test", skip=20, cat=5, dogs=5).parent
    refuse(root, folder_recipe, "train/ has no images of 'dogs'")


def test_class_of_copies_of_one_image(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    root = tree(zero=9, one=1)
    shutil.copyfile(root / "one" / "img0.png", root / "one" / "copy.png")
    refuse(root, folder_recipe, "class 'one' has no image left for the train split")


def test_too_few_images_for_validation(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    refuse(tree(zero=2, one=2), folder_recipe, "validation split")


def test_folders_named_train_and_test_can_be_classes(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    """A collection of vehicles: without class folders inside, `train` is a class."""
    recipe = folder_recipe(tree(train=6, test=6))
    assert data.survey(recipe, threads=1, report=silent).classes == ("test", "train")


@pytest.mark.parametrize("source", ["mnist", "fashion_mnist", "cifar10"])
def test_download_impossible(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        # A port of this machine on which nothing listens: refused at once, whatever network there is.
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(DataError, match="cannot be downloaded") as caught:
        data.survey(load_recipe(source, [f"data.root={tmp_path / 'data'}"]), threads=1, report=silent)
    assert "connect to the internet" in caught.value.remedy


def test_unreadable_file_is_left_out_by_name(
    tree: WriteTree, folder_recipe: MakeRecipe, unreadable: Callable[[Path], None]
) -> None:
    root = tree(zero=5, one=5)
    unreadable(root / "zero" / "img1.png")
    surveyed = data.survey(folder_recipe(root), threads=1, report=silent)
    assert [skipped.name for skipped in surveyed.skipped] == ["zero/img1.png"]
    assert "cannot be read" in surveyed.skipped[0].reason


@pytest.fixture
def unreadable() -> Callable[[Path], None]:
    """Turns a file into a link that leads nowhere: unreadable for every user, root included."""

    def make(path: Path) -> None:
        path.unlink()
        path.symlink_to(path.with_name("gone"))

    return make
