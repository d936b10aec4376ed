"""From files to disjoint splits: by content, never by name, order or place."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from handlerlib import imaging
from training import data
from training.config import Recipe, load_recipe
from training.data import Dataset
from training.progress import Step, silent
from training.sources import Split

WriteTree = Callable[..., Path]
MakeRecipe = Callable[..., Recipe]


def prepared(recipe: Recipe, **options: object) -> Dataset:
    surveyed = data.survey(recipe, threads=2, report=silent)
    return data.prepare(surveyed, recipe, threads=2, report=silent, **options)  # type: ignore[arg-type]


def digests(dataset: Dataset) -> dict[str, list[str]]:
    return {split: [dataset.images[row].digest for row in rows] for split, rows in dataset.rows.items()}


def names(dataset: Dataset, split: Split) -> set[str]:
    return {dataset.images[row].entry.name for row in dataset.rows[split]}


def test_digits_are_divided_in_proportion_and_every_image_once() -> None:
    dataset = prepared(load_recipe("digits", []))
    assert dataset.sizes() == {"train": 1259, "validation": 179, "test": 359}
    rows = [row for part in dataset.rows.values() for row in part]
    assert sorted(rows) == list(range(1797))
    whole = torch.bincount(dataset.targets_N, minlength=10)
    for split, part in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        counts = torch.bincount(dataset.targets_N[list(dataset.rows[split])], minlength=10)  # type: ignore[index]
        assert float((counts - whole * part).abs().max()) <= 1, split


def test_digits_are_stored_without_loss() -> None:
    from sklearn.datasets import load_digits

    dataset = prepared(load_recipe("digits", ["data.image_size=auto"]))
    for sample in list(dataset.samples("test"))[:20]:
        with Image.open(io.BytesIO(sample.data)) as image:
            assert (image.mode, image.size) == ("L", (8, 8))
            original = load_digits().images[int(sample.name.removeprefix("digits-"))]
            np.testing.assert_array_equal(np.asarray(image), np.round(original * 255 / 16))


def test_what_the_network_trains_on_is_what_serving_will_compute(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    recipe = folder_recipe(tree(zero=8, one=8))
    dataset = prepared(recipe)
    for row, sample in zip(dataset.rows["train"], dataset.samples("train"), strict=True):
        served = imaging.load(sample.data, dataset.preprocess, recipe.serve.limits)
        assert torch.equal(dataset.pixels(torch.tensor([row]))[0], served)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [24, 64, 99, 224])
def test_images_of_one_size_are_kept_small_and_a_batch_of_them_is_what_serving_will_compute(
    side: int, channels: int, tmp_path: Path, folder_recipe: MakeRecipe
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 24, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        path = tmp_path / "p" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    dataset = prepared(recipe := folder_recipe(tmp_path / "p", f"data.image_size={side}", f"data.channels={channels}"))
    assert dataset.x_NCHW.shape == (20, channels, 20, 24)
    for split in ("train", "validation", "test"):
        served = [imaging.load(one.data, dataset.preprocess, recipe.serve.limits) for one in dataset.samples(split)]
        assert torch.equal(dataset.pixels(torch.tensor(dataset.rows[split])), torch.stack(served))


@pytest.mark.parametrize("side", [16, 22])
def test_images_larger_than_the_input_are_kept_at_its_size(
    side: int, tmp_path: Path, folder_recipe: MakeRecipe
) -> None:
    for number in range(8):
        colour(tmp_path / "p" / "ab"[number % 2] / f"{number}.png", (number, 9, 30), (24, 20))
    assert prepared(folder_recipe(tmp_path / "p", f"data.image_size={side}")).x_NCHW.shape == (8, 3, side, side)


@pytest.mark.parametrize("side", [8, 20])
def test_mean_and_deviation_are_those_of_the_training_split_as_the_network_sees_it(
    side: int, tree: WriteTree, folder_recipe: MakeRecipe
) -> None:
    dataset = prepared(folder_recipe(tree(zero=10, one=10), f"data.image_size={side}"))
    x_NCHW = dataset.pixels(torch.tensor(dataset.rows["train"])).double() / 255
    assert dataset.preprocess.mean == pytest.approx([float(x_NCHW.mean())], abs=1e-5)
    assert dataset.preprocess.std == pytest.approx([float(x_NCHW.std(correction=0))], abs=1e-5)


def test_another_seed_divides_otherwise() -> None:
    first, second = (prepared(load_recipe("digits", [f"seed={seed}"]), keep=False) for seed in (0, 1))
    assert set(digests(first)["test"]) != set(digests(second)["test"])


def test_names_order_and_place_of_the_files_change_nothing(
    tree: WriteTree, folder_recipe: MakeRecipe, tmp_path: Path
) -> None:
    first = tree("photos", zero=12, one=12)
    second = tmp_path / "elsewhere" / "again"
    for path in sorted(first.rglob("*.png"), reverse=True):
        target = second / path.parent.name / "deeper" / f"x{path.stem[::-1]}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    one, other = prepared(folder_recipe(first)), prepared(folder_recipe(second))
    assert digests(one) == digests(other)
    assert torch.equal(one.x_NCHW, other.x_NCHW)


def test_copies_never_sit_on_two_sides(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    root = tree(zero=30, one=30)
    for number, path in enumerate(sorted(root.rglob("*.png"))[::2]):
        shutil.copyfile(path, path.with_name(f"copy{number}.png"))
        # The same pixels in another file format: other bytes, the same image.
        with Image.open(path) as image:
            image.save(path.with_name(f"copy{number}.bmp"))
    dataset = prepared(folder_recipe(root, "data.test=0.3", "data.validation=0.3"))
    seen: dict[bytes, str] = {}
    for split, rows in dataset.rows.items():
        for row in rows:
            pixels = dataset.x_NCHW[row].numpy().tobytes()
            assert seen.setdefault(pixels, split) == split
    assert sum(dataset.sizes().values()) == 120
    assert dataset.notes.duplicates == 60


def test_the_same_image_under_two_labels_is_reported(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    root = tree(zero=10, one=10)
    shutil.copyfile(root / "zero" / "img3.png", root / "one" / "odd.png")
    dataset = prepared(folder_recipe(root))
    assert [conflict.names for conflict in dataset.notes.conflicts] == [("one/odd.png", "zero/img3.png")]
    assert dataset.notes.counts()["data_label_conflicts"] == 1
    assert "one/odd.png = zero/img3.png (one, zero)" in "\n".join(dataset.notes.lines())


def test_unreadable_files_are_named_counted_and_left_out(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    root = tree(zero=10, one=10)
    whole = (root / "zero" / "img0.png").read_bytes()
    (root / "zero" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "one" / "notes.txt").write_text("not an image")
    (root / "one" / "empty.png").write_bytes(b"")
    (root / "loose.png").write_bytes(whole)
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(whole)
    (root / "zero" / ".DS_Store").write_bytes(b"")
    dataset = prepared(folder_recipe(root))
    assert {skipped.name for skipped in dataset.notes.unreadable} == {
        "zero/cut.png",
        "one/notes.txt",
        "one/empty.png",
        "loose.png",
    }
    assert len(dataset.images) == 20
    assert dataset.notes.counts()["data_unreadable"] == 4
    assert "zero/cut.png" in "\n".join(dataset.notes.lines())


def test_a_given_test_folder_is_kept_and_its_copies_leave_the_training_set(
    tree: WriteTree, folder_recipe: MakeRecipe, tmp_path: Path
) -> None:
    tree("photos/train", zero=20, one=20)
    tree("photos/test", skip=50, zero=5, one=5)
    root = tmp_path / "photos"
    shutil.copyfile(root / "test" / "zero" / "img50.png", root / "train" / "zero" / "leak.png")
    dataset = prepared(folder_recipe(root))
    assert names(dataset, "test") == {f"test/{label}/img{n}.png" for label in ("zero", "one") for n in range(50, 55)}
    assert dataset.notes.removed == ("train/zero/leak.png",)
    assert dataset.sizes() == {"train": 36, "validation": 4, "test": 10}


def test_a_given_validation_folder_is_kept(tree: WriteTree, folder_recipe: MakeRecipe, tmp_path: Path) -> None:
    tree("photos/train", zero=10, one=10)
    tree("photos/valid", skip=30, zero=3, one=3)
    tree("photos/test", skip=50, zero=4, one=4)
    dataset = prepared(folder_recipe(tmp_path / "photos"))
    assert dataset.sizes() == {"train": 20, "validation": 6, "test": 8}
    assert all(name.startswith("valid/") for name in names(dataset, "validation"))


def test_a_zip_reads_like_the_folder(tree: WriteTree, folder_recipe: MakeRecipe, tmp_path: Path) -> None:
    root = tree(zero=10, one=10)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in root.rglob("*.png"):
            archive.write(path, path.relative_to(root))
    folder, zipped = prepared(folder_recipe(root)), prepared(folder_recipe(tmp_path / "photos.zip"))
    assert digests(folder) == digests(zipped)
    assert torch.equal(folder.x_NCHW, zipped.x_NCHW)


@pytest.mark.parametrize("source", ["cifar10", "mnist", "fashion_mnist"])
def test_the_known_sets_also_read_a_tree_of_files(source: str, tree: WriteTree, tmp_path: Path) -> None:
    tree("set/train", zero=10, one=10)
    tree("set/test", skip=50, zero=4, one=4)
    dataset = prepared(load_recipe(source, [f"data.root={tmp_path / 'set'}"]))
    assert dataset.classes == ("one", "zero")
    assert dataset.sizes()["test"] == 8


def test_classes_are_in_natural_order(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    dataset = prepared(folder_recipe(tree(class10=4, class2=4, b=4, a=4)))
    assert dataset.classes == ("a", "b", "class2", "class10")


def test_max_images_takes_a_part_of_every_class(folder_recipe: MakeRecipe) -> None:
    dataset = prepared(load_recipe("digits", ["data.max_images=200"]))
    assert 150 < len(dataset.images) <= 200
    counts = torch.bincount(dataset.targets_N, minlength=10)
    assert int(counts.min()) >= 17


def colour(path: Path, shade: tuple[int, int, int], size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, shade).save(path)


def test_colour_and_size_come_from_the_data(tmp_path: Path, folder_recipe: MakeRecipe) -> None:
    for number in range(6):
        colour(tmp_path / "p" / "red" / f"{number}.png", (200 + number, 0, 0), (20, 12))
        colour(tmp_path / "p" / "blue" / f"{number}.png", (0, 0, 200 + number), (20, 12))
    shape = prepared(folder_recipe(tmp_path / "p")).preprocess
    assert (shape.channels, shape.height, shape.width, shape.resize) == (3, 12, 20, "stretch")


def test_images_of_different_sizes_are_covered_and_cropped(tmp_path: Path, folder_recipe: MakeRecipe) -> None:
    for number in range(6):
        colour(tmp_path / "p" / "red" / f"{number}.png", (200 + number, 0, 0), (90, 40 + number))
        colour(tmp_path / "p" / "blue" / f"{number}.png", (0, 0, 200 + number), (50, 120))
    shape = prepared(folder_recipe(tmp_path / "p", "data.crop_fraction=0.9")).preprocess
    assert (shape.height, shape.width, shape.resize, shape.crop_fraction) == (64, 64, "cover", 0.9)


def test_grey_images_stored_as_colour_are_grey(tmp_path: Path, folder_recipe: MakeRecipe) -> None:
    for number in range(6):
        colour(tmp_path / "p" / "dark" / f"{number}.png", (number,) * 3, (16, 16))
        colour(tmp_path / "p" / "light" / f"{number}.jpg", (200 + number,) * 3, (16, 16))
    recipe = folder_recipe(tmp_path / "p")
    dataset = prepared(recipe)
    assert dataset.preprocess.channels == 1
    for row, sample in zip(dataset.rows["train"], dataset.samples("train"), strict=True):
        assert torch.equal(dataset.x_NCHW[row], imaging.load(sample.data, dataset.preprocess, recipe.serve.limits))


def test_pixels_beyond_the_budget_lie_in_a_file(tree: WriteTree, folder_recipe: MakeRecipe, tmp_path: Path) -> None:
    root = tree(zero=8, one=8)
    in_memory = prepared(folder_recipe(root))
    store = tmp_path / "pixels.bin"
    mapped = prepared(folder_recipe(root, "data.memory_mib=0"), store=store)
    assert store.stat().st_size == 16 * 3 * 8 * 8
    assert torch.equal(in_memory.x_NCHW, mapped.x_NCHW)


def test_progress_counts_every_file(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    steps: list[Step] = []
    recipe = folder_recipe(tree(zero=8, one=8))
    surveyed = data.survey(recipe, threads=1, report=steps.append)
    data.prepare(surveyed, recipe, threads=1, report=steps.append)
    assert [(step.phase, step.done, step.total) for step in steps] == [("read", 16, 16), ("decode", 16, 16)]


def test_the_report_is_plain_json(tree: WriteTree, folder_recipe: MakeRecipe) -> None:
    import dataclasses

    notes = prepared(folder_recipe(tree(zero=8, one=8))).notes
    assert json.loads(json.dumps(dataclasses.asdict(notes)))["duplicates"] == 0
