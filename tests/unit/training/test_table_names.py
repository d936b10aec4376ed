"""What names in a table mean: class names that are numbers, and a first row read with the wrong delimiter."""

from __future__ import annotations

from pathlib import Path

import pytest

from training import sources
from training.config import load_recipe
from training.errors import DataError


def labels(root: Path, *overrides: str) -> list[str]:
    recipe = load_recipe("texts", ["data.source=csv", f"data.root={root}", *overrides])
    return [entry.label for entry in sources.listing(recipe.data).entries]


def table(path: Path, *values: str) -> Path:
    path.write_text("text,label\n" + "".join(f"good {number},{value}\n" for number, value in enumerate(values)))
    return path


def test_class_names_that_are_numbers_are_names(tmp_path: Path) -> None:
    stars = table(tmp_path / "stars.csv", "5", "4", "1")
    assert labels(stars, 'data.class_names=["5","4","3","2","1"]') == ["5", "4", "1"]


def test_a_number_is_no_place_among_class_names_that_are_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 3: class '10' is not one of data"):
        labels(table(tmp_path / "t.csv", "9", "10"), 'data.class_names=["0","1","2","3","4","5","6","7","8","9"]')


def test_a_number_is_the_place_of_a_name_otherwise(tmp_path: Path) -> None:
    assert labels(table(tmp_path / "t.csv", "2", "bad"), 'data.class_names=["good","bad"]') == ["bad", "bad"]


@pytest.mark.parametrize(("delimiter", "written"), [(";", '";"'), ("\t", '"\\t"')])
def test_another_delimiter_is_advised_and_helps(delimiter: str, written: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"text{delimiter}label\nfine{delimiter}good\nawful{delimiter}bad\n")
    with pytest.raises(DataError, match="has no column") as caught:
        labels(path)
    assert f"--set 'data.delimiter={written}'" in caught.value.remedy
    assert labels(path, f"data.delimiter={written}") == ["good", "bad"]
