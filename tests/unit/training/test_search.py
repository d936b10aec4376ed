"""`marina search`: trials on the validation split, resumed after kills, shared by processes, ending in a recipe."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from support import commands
from training import search, toml
from training.config import Recipe, load_recipe
from training.errors import Interrupted, RecipeError
from training.progress import Report, Step, silent
from training.search import BEST_FILE, CHART_FILE, REPORT_FILE, Found, read_space

pytestmark = pytest.mark.timeout(600)

SMALL = [
    *("data.max_images=200", "data.image_size=8", "train.device=cpu", "train.threads=1", "train.epochs=3"),
    *("model.architecture=mlp", "train.batch_size=32", "search={}"),
]
SPACE = ["train.learning_rate=1e-4..1e-1,log", "train.optimizer=sgd,adamw", "train.batch_size=16..48,step=16"]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return read_space(load_recipe("digits", SMALL), SPACE)


Search = Callable[..., Found]


def start(recipe: Recipe, folder: Path, trials: int, report: Report = silent, jobs: int = 1) -> Found:
    return search.search(recipe, trials=trials, runs=folder / "runs", report=report, jobs=jobs)


@pytest.fixture(scope="module")
def found(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Eight trials in one process."""
    return start(recipe, tmp_path_factory.mktemp("search"), 8)


def values(found: Found) -> list[tuple[object, object]]:
    return [(one["values"], one["value"]) for one in found.trials if one["state"] in ("complete", "pruned")]


def test_trials_stay_in_the_space_and_begin_with_the_recipe_itself(found: Found) -> None:
    assert [one["number"] for one in found.trials] == list(range(8))
    assert found.trials[0]["values"] == {
        "train.learning_rate": 0.001,
        "train.optimizer": "adamw",
        "train.batch_size": 32,
    }
    for one in found.trials:
        assert one["state"] in ("complete", "pruned")
        assert 1e-4 <= one["values"]["train.learning_rate"] <= 1e-1
        assert one["values"]["train.batch_size"] in (16, 32, 48)
    assert len({json.dumps(one["values"]) for one in found.trials}) == 8
    complete = [one["value"] for one in found.trials if one["state"] == "complete"]
    assert found.value == min(complete)
    assert found.trials[0]["value"] >= found.value


def test_the_report_tells_what_matters_and_is_drawn(found: Found) -> None:
    assert set(found.importance) == {"train.learning_rate", "train.optimizer", "train.batch_size"}
    assert sum(found.importance.values()) == pytest.approx(1)
    parts = list(found.importance.values())
    assert parts == sorted(parts, reverse=True)
    told = json.loads((found.folder / REPORT_FILE).read_text())
    assert told["value"] == found.value
    with Image.open(found.folder / CHART_FILE) as image:
        assert min(image.size) > 600
    # Weights of trials are not kept: the best recipe makes them again.
    assert not list(found.folder.glob("trial-*"))


def test_more_trials_go_on_and_those_that_fall_behind_are_pruned(found: Found, recipe: Recipe, tmp_path: Path) -> None:
    shutil.copytree(found.folder, tmp_path / "runs" / found.folder.name)
    ended = start(recipe, tmp_path, 12)
    assert values(ended)[:8] == values(found)
    pruned = [one for one in ended.trials if one["state"] == "pruned"]
    assert pruned
    assert all(one["epochs"] < 3 for one in pruned)


def test_the_best_recipe_trains_as_it_is(found: Found, recipe: Recipe, tmp_path: Path) -> None:
    assert found.best is not None
    best = load_recipe(str(found.best))
    assert best.model_dump()["search"] == {}
    assert {key: best.train.model_dump()[key.partition(".")[2]] for key in found.values} == found.values
    ran = commands.marina(commands.project(tmp_path / "home"), "train", found.folder / BEST_FILE, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["metrics"]["validation_loss"] == pytest.approx(found.value, rel=1e-6)


def test_interrupted_it_goes_on_with_the_same_trials(found: Found, recipe: Recipe, tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        if step.phase == "train" and step.total and step.note.startswith("trial 3") and "epoch 2" in step.note:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        start(recipe, tmp_path, 8, stop)
    seen: list[Step] = []
    resumed = start(recipe, tmp_path, 8, seen.append)
    notes = [step.note for step in seen]
    assert any("resuming in epoch 2" in note for note in notes)
    states = [one["state"] for one in resumed.trials]
    assert states.count("failed") == 1
    assert states.index("failed") == 3
    assert resumed.trials[3]["error"] == "its process died"
    assert values(resumed)[:3] == values(found)[:3]
    # The one that was stopped is tried again with its values and comes to the same end.
    assert values(resumed)[3] == values(found)[3]
    assert len(values(resumed)) == 8
    seen.clear()
    assert values(start(recipe, tmp_path, 8, seen.append)) == values(resumed)
    assert not [step for step in seen if step.phase == "train"]


def test_processes_share_a_study_and_a_killed_one_is_made_good(recipe: Recipe, tmp_path: Path) -> None:
    home = commands.project(tmp_path / "home")
    words = ["search", "digits", "--trials", "4", "--jobs", "2", "--json"]
    # With a checkpoint from the first steps on, the kill comes long before any trial ends.
    long = (*SMALL, "train.epochs=80", "train.checkpoint_minutes=0.001")
    words += [word for setting in long for word in ("--set", setting)]
    words += [word for one in SPACE for word in ("--space", one)]
    command = [sys.executable, "-m", "marina", *words]
    process = subprocess.Popen(
        command, cwd=home, env=commands.environment(home), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        commands.wait_for(lambda: len(list(home.glob("runs/*/trial-*/checkpoint.pt"))) > 0, process)
    finally:
        # The parent dies without a word; its children notice and leave their trials where they are.
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (folder,) = (home / "runs").iterdir()
    commands.wait_for(lambda: not children_of(folder))
    ended = commands.marina(home, *words, timeout=480)
    assert ended.code == 0, ended.err
    states = [one["state"] for one in ended.json["trials"]]
    assert "running" not in states
    assert len([state for state in states if state in ("complete", "pruned")]) == 4
    assert 1 <= states.count("failed") <= 2
    assert Path(ended.json["best"]).is_file()


def children_of(folder: Path) -> list[int]:
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in process.cmdline():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("count", "visible", "seen"),
    [
        (0, None, [None, None, None]),
        (1, "1", [None, None, None]),
        (2, None, ["0", "1", "0"]),
        (2, "3, GPU-5e1d", ["3", "GPU-5e1d", "3"]),
        (2, "2,3,99", ["2", "3", "2"]),  # CUDA sees those before the first that is not there
    ],
)
def test_processes_take_the_gpus_in_turn(count: int, visible: str | None, seen: list[str | None]) -> None:
    given = [search.one_gpu(number, count, visible) for number in range(3)]
    assert [one.get("CUDA_VISIBLE_DEVICES") for one in given] == seen


def test_a_trial_that_runs_away_is_told_and_passed_over(tmp_path: Path) -> None:
    wild = read_space(load_recipe("digits", [*SMALL, "train.optimizer=sgd"]), ["train.learning_rate=1e19..1e20"])
    ended = start(wild, tmp_path, 2)
    assert [one["state"] for one in ended.trials] == ["pruned", "pruned"]
    assert "the loss became" in ended.trials[0]["error"]
    assert ended.best is None
    assert ended.importance == {}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ([], "nothing to search"),
        (["train.learning_rate"], "not of the form KEY=RANGE"),
        (["train.learning_rat=1e-4..1e-1"], "no key 'train.learning_rat', did you mean 'train.learning_rate'"),
        (["data.validation=0.1..0.2"], "search has no key 'data.validation'"),
        (["seed=1..5"], "search has no key 'seed'"),
        (["train.learning_rate=1e-1..1e-4"], "low being the smaller"),
        (["train.learning_rate=0.0..0.1,log"], "log needs a low above 0"),
        (["train.learning_rate=1e-4..1e-1,lg"], "'lg', did you mean 'log'"),
        (["train.batch_size=0.5..8"], "train.batch_size = 0.5"),
        (["train.momentum=0.5..1.5"], "train.momentum = 1.5"),
        (["train.optimizer=sgd,adm"], "train.optimizer = adm"),
        (["train.optimizer=sgd"], "two different values"),
        (["train.batch_size=8..16,step=32"], "step must be above 0 and fit"),
    ],
)
def test_a_space_that_is_none_is_refused(space: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe = read_space(load_recipe("digits", ["search={}"]), space)
        search.search(recipe, trials=1, runs=Path("unused"), report=silent)


def test_losses_of_two_kinds_are_not_ranked() -> None:
    both = ["train.loss=mean_squared_error,mean_absolute_error"]
    with pytest.raises(RecipeError, match="losses of two kinds cannot be ranked") as caught:
        search.search(read_space(load_recipe("digit_sums"), both), trials=1, runs=Path("unused"), report=silent)
    assert caught.value.remedy == "--set train.monitor=r2"


def test_of_equal_values_the_lower_loss_is_the_best(tmp_path: Path) -> None:
    import optuna

    recipe = read_space(load_recipe("digits", [*SMALL, "train.monitor=accuracy"]), ["train.optimizer=sgd,adamw,adam"])
    study = optuna.create_study(
        study_name=tmp_path.name, storage=f"sqlite:///{tmp_path / search.STUDY_FILE}", direction="maximize"
    )
    kind = optuna.distributions.CategoricalDistribution(("sgd", "adamw", "adam"))
    for name, value, loss in (("sgd", 0.9, 0.5), ("adamw", 0.9, 0.3), ("adam", 0.8, 0.1)):
        study.add_trial(
            optuna.trial.create_trial(
                params={"train.optimizer": name},
                distributions={"train.optimizer": kind},
                value=value,
                user_attrs={"validation_loss": loss, "best_epoch": 1},
            )
        )
    ended = search.conclude(tmp_path, recipe)
    assert ended.values == {"train.optimizer": "adamw"}
    assert [one["validation_loss"] for one in ended.trials] == [0.5, 0.3, 0.1]


def test_the_space_of_a_recipe_file(tmp_path: Path) -> None:
    text = 'name = "x"\n[data]\nsource = "digits"\n[model]\narchitecture = "mlp"\n[search]\n'
    good = tmp_path / "good.toml"
    good.write_text(
        text + "train.learning_rate = { low = 1e-4, high = 1e-1, log = true }\nmodel.dropout.choices = [0.1, 0.2]"
    )
    recipe = load_recipe(str(good))
    assert set(recipe.search) == {"train.learning_rate", "model.dropout"}
    assert recipe.search["train.learning_rate"].log
    assert recipe.identity() == load_recipe(str(good), ["search={}"]).identity()
    bad = tmp_path / "bad.toml"
    bad.write_text(text + "train.momentum = { low = 0.1, hihg = 0.9 }")
    with pytest.raises(RecipeError, match=r"search\.train\.momentum\.hihg: a range is a table of low, high"):
        load_recipe(str(bad))


def test_recipes_that_come_with_a_space_begin_with_themselves(tmp_path: Path) -> None:
    recipe = read_space(load_recipe("digits", [one for one in SMALL if one != "search={}"]), [])
    ended = start(recipe, tmp_path, 1)
    assert set(ended.trials[0]["values"]) == set(recipe.search)
    assert ended.trials[0]["values"]["model.dropout"] == 0.3
    news = load_recipe("agnews").search
    assert set(news) == {"train.learning_rate", "model.naive_bayes", "model.dropout"}
    with pytest.raises(RecipeError, match="recipe folder has nothing to search") as caught:
        read_space(load_recipe("folder"), [])
    assert "[search]" in caught.value.remedy


def test_without_optuna_the_command_says_what_to_install(recipe: Recipe, tmp_path: Path) -> None:
    home = commands.project(tmp_path / "home")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "optuna.py").write_text("raise ImportError('no optuna here')")
    path = f"{tmp_path / 'blocked'}:{commands.environment(home)['PYTHONPATH']}"
    words = [word for one in SPACE for word in ("--space", one)]
    ran = commands.marina(home, "search", "digits", *words, "--json", PYTHONPATH=path)
    assert ran.code == 3
    assert "not installed (extra 'search')" in ran.json["error"]
    assert ran.json["remedy"] == "pip install 'marina[search]'"


def test_every_recipe_written_as_toml_is_read_as_it_was() -> None:
    from training.config import recipe_names

    for name in recipe_names():
        recipe = load_recipe(name)
        text = toml.write(recipe.model_dump(mode="json", exclude_defaults=True))
        assert Recipe.model_validate(tomllib.loads(text)) == recipe, name


def test_toml_of_unusual_values() -> None:
    content = {"a b": 'say "ü"\n\x7f\\', "flag": True, "n": 1e-7, "list": [1, [2.5]], "t": {"x": {"y": [{"z": "1"}]}}}
    assert tomllib.loads(toml.write(content)) == content
