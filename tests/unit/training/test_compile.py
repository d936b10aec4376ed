"""`train.compile`: the same training from a compiled network, and a clear error where nothing can be compiled."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

from support import commands

SMALL = [
    *("data.max_images=200", "data.image_size=8", "train.device=cpu", "train.threads=1", "train.epochs=2"),
    # 136 images train, in four equal batches: one form of the network to compile. The moving average is judged uncompiled.
    *("model.architecture=mlp", "model.dropout=0", "train.batch_size=34", "train.ema=0.5", "train.optimizer=sgd"),
]


def settings() -> list[str]:
    return [word for one in SMALL for word in ("--set", one)]


@pytest.mark.timeout(600)
@pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
    reason="torch.compile needs g++ and Python's header files",
)
def test_a_compiled_network_learns_the_same(tmp_path: Path) -> None:
    home = commands.project(tmp_path / "home")
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    asked = ["compare", "digits", *settings(), "--vary", "train.compile=false,true", "--json"]
    ran = commands.marina(home, *asked, timeout=540, **cache)
    assert ran.code == 0, ran.err
    plain, compiled = ran.json["variants"]
    assert compiled["error"] is None
    assert list((tmp_path / "cache").rglob("*.cpp"))
    for mine, theirs in zip(plain["history"], compiled["history"], strict=True):
        assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-3)
        assert theirs["validation_loss"] == pytest.approx(mine["validation_loss"], rel=1e-3)


def test_without_a_compiler_the_recipe_is_refused_with_the_reason(tmp_path: Path) -> None:
    home = commands.project(tmp_path / "home")
    without = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ran = commands.marina(home, "train", "digits", *settings(), "--set", "train.compile=true", "--json", **without)
    assert ran.code == 3, ran.err
    assert ran.json["kind"] == "RecipeError"
    assert "torch.compile does not work here" in ran.json["error"]
    assert "/nowhere/c++" in ran.json["error"]
    assert "g++" in ran.json["remedy"]
