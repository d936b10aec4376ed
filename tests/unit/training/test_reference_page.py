"""training/README.md names every choice that a recipe has, and points at files that are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

import training
from handlerlib import architectures
from handlerlib.spec import Task
from training.config import Optimizer, Recipe, Schedule

FOLDER = Path(training.__file__).parent
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*get_args(Task), *get_args(Optimizer), *get_args(Schedule)])
def test_every_choice_has_its_line(name: str) -> None:
    assert re.search(rf"^\|[^|]*`{name}`[^|]*\|.+\|", PAGE, re.MULTILINE), name


@pytest.mark.parametrize("name", architectures.text_names())
def test_networks_for_texts_are_named(name: str) -> None:
    assert f"`{name}`" in PAGE


def test_keys_are_keys_of_a_recipe() -> None:
    named = re.findall(r"`(train|model|text)\.([a-z0-9_]+)", PAGE)
    assert len(named) > 15
    for section, key in named:
        if key != "stages":
            assert key in Recipe.model_fields[section].annotation.model_fields, f"{section}.{key}"  # type: ignore[union-attr]


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert len(links) > 10
    assert [link for link in links if not (FOLDER / link).is_file()] == []
