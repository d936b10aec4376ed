"""The recipe that a run or an artifact records, wherever that lies and whatever it leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from training import pipeline
from training.config import load_recipe
from training.errors import TargetError


@pytest.mark.parametrize("place", ["/artifact", "/artifacts/digits", "/artifacts/digits/1.0"])
def test_an_artifact_right_below_the_root_of_the_file_system(place: str) -> None:
    recipe = load_recipe("digits", [])
    origin = {"recipe": recipe.identity(), "run": "no-such-run"}
    assert pipeline.recorded_recipe(Path(place), origin, None).identity() == recipe.identity()


@pytest.mark.parametrize("origin", [{"run": "none"}, {"recipe": None}])
def test_a_provenance_without_a_recipe(origin: dict[str, object]) -> None:
    with pytest.raises(TargetError, match="records no recipe") as caught:
        pipeline.recorded_recipe(Path("/artifact"), origin, None)
    assert "--data" in caught.value.remedy
