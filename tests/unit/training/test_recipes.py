"""What a recipe accepts, and what it says when it does not."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from training.config import load_recipe, recipe_names
from training.errors import RecipeError


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_comes_along_is_valid_and_named_after_its_file(name: str) -> None:
    assert load_recipe(name, []).name == name


def test_the_known_recipes() -> None:
    assert recipe_names() == (
        "agnews",
        "agnews_cnn",
        "cifar10",
        "cifar10_long",
        "cifar10_resnet18",
        "digit_pairs",
        "digit_sums",
        "digits",
        "fashion_mnist",
        "folder",
        "mnist",
        "texts",
    )


def test_an_unknown_recipe_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(RecipeError, match="did you mean 'digits'") as caught:
        load_recipe("digit", [])
    assert "fashion_mnist" in caught.value.remedy
    assert caught.value.exit_code == 3


def test_a_recipe_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[data]\nsource = "digits"\n[model]\narchitecture = "mlp"\n')
    assert load_recipe(str(path), []).model.architecture == "mlp"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not TOML"),
        ('name = "x"', "data: Field required"),
        ('name = "a/b"\n[data]\nsource = "digits"\n[model]\narchitecture = "mlp"', "name: "),
        ('name = "x"\nversion = 1.0\n[data]\nsource = "digits"\n[model]\narchitecture = "mlp"', "version: .*string"),
    ],
    ids=["broken", "incomplete", "bad-name", "version-as-number"],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path), [])


def test_a_missing_file_is_named() -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.toml does not exist"):
        load_recipe("nowhere.toml", [])


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("train.epochs=5", "train.epochs", 5),
        ("train.learning_rate=1e-2", "train.learning_rate", 1e-2),
        ("train.weight_decay=0", "train.weight_decay", 0.0),
        ("augment.flip=true", "augment.flip", True),
        ("train.optimizer=sgd", "train.optimizer", "sgd"),
        ('train.optimizer="sgd"', "train.optimizer", "sgd"),
        ("data.image_size=12", "data.image_size", 12),
        ("data.image_size=auto", "data.image_size", "auto"),
        ("version=1.10", "version", "1.10"),
        ("name=2024", "name", "2024"),
        (" seed = 3 ", "seed", 3),
    ],
)
def test_an_override_is_read_as_toml_or_as_plain_text(override: str, field: str, value: object) -> None:
    recipe: object = load_recipe("digits", [override])
    for part in field.split("."):
        recipe = getattr(recipe, part)
    assert recipe == value
    assert type(recipe) is type(value)


def test_a_root_that_looks_like_a_number_or_holds_an_equals_sign_stays_text() -> None:
    assert load_recipe("folder", ["data.root=2024"]).data.root == "2024"
    assert load_recipe("folder", ["data.root=a=b c"]).data.root == "a=b c"


def test_the_last_override_wins() -> None:
    assert load_recipe("digits", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=5", r"unknown key 'train\.epoch', did you mean 'train\.epochs'\?"),
        ("epochs=5", r"unknown key 'epochs', did you mean 'train\.epochs'\?"),
        ("trian.epochs=5", r"unknown key 'trian', did you mean 'train'\?"),
        ("augment.zzz=1", r"unknown key 'augment\.zzz'; known here: shift, flip"),
        ("train.epochs=0", r"train\.epochs: .*greater than or equal to 1 \(got 0\)"),
        ("train.epochs=many", r"train\.epochs: .*integer"),
        ("train.optimizer=adma", r"train\.optimizer: .*'sgd', .*'adamw'"),
        ("train.learning_rate=nan", r"train\.learning_rate: .*finite"),
        ("data.image_size=big", r"data\.image_size: .*auto"),
        ("data.root=photos", r"data\.root: the digits come with scikit-learn"),
        ("model.architecture=resnet81", r"unknown architecture 'resnet81', did you mean 'resnet18'"),
        ("train", "not of the form key=value"),
        ("=5", "not of the form key=value"),
        ("train..epochs=5", "not of the form key=value"),
        ("seed.x=5", "'seed' is a value, not a section"),
    ],
)
def test_a_wrong_override_names_the_key_and_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("digits", [*(["seed=1"] if override.startswith("seed.") else []), override])


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError):
        load_recipe("digits", []).seed = 1


def test_what_cannot_change_the_result_is_not_part_of_the_identity() -> None:
    loose = ("version=2", "data.memory_mib=1", "train.checkpoint_minutes=1")
    here, there = (load_recipe("folder", [f"data.root={root}", *loose]) for root in ("here", "there"))
    assert here.identity() == there.identity() == load_recipe("folder", []).identity()
    assert load_recipe("folder", ["seed=1"]).identity() != here.identity()
