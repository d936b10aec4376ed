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


CHOICES = [*get_args(Task), *get_args(Optimizer), *get_args(Schedule), "model.whiten", 'augment.flip = "alternating"']


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_has_its_line_with_a_source(name: str) -> None:
    line = re.search(rf"^\|[^|]*`{name}`[^|]*\|.+\|([^|]*)\|$", PAGE, re.MULTILINE)
    assert line, name
    assert name == "constant" or line[1].strip(), name


def test_every_line_has_a_source() -> None:
    cells = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("|")]
    assert len(cells) > 40
    assert [first for first, *_, last in cells if not last.strip()] == [" `constant` "]


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
