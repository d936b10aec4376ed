"""`marina compare`: variants side by side, resumed, with failures as rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from handlerlib.errors import MarinaError
from support import commands
from training import compare, pipeline
from training.compare import CHART_FILE, REPORT_FILE, TABLE_FILE, Comparison, read_variants
from training.config import load_recipe
from training.errors import Interrupted, NumericFailure, RecipeError
from training.progress import Report, Step, silent
from training.train import CHECKPOINT

SMALL = [
    *("data.max_images=300", "data.image_size=8", "train.device=cpu", "train.threads=1", "train.epochs=3"),
    "model.architecture=mlp",
]
VARY = ["train.optimizer=sgd,adam"]


def run(
    folder: Path, *, vary: list[str] | None = None, sets: list[str] | None = None, report: Report = silent
) -> Comparison:
    variants = read_variants(["digits"], overrides=SMALL, vary=VARY if vary is None else vary, sets=sets or [])
    return compare.compare(variants, runs=folder / "runs", report=report)


def trained(steps: list[Step]) -> list[Step]:
    return [step for step in steps if step.phase == "train" and step.total]


def test_every_variant_has_a_row_and_the_figure_is_drawn(tmp_path: Path) -> None:
    found = run(tmp_path, vary=[*VARY, "train.schedule=constant,cosine"])
    assert [row.variant.name for row in found.rows] == [
        "optimizer=sgd, schedule=constant",
        "optimizer=sgd, schedule=cosine",
        "optimizer=adam, schedule=constant",
        "optimizer=adam, schedule=cosine",
    ]
    for row in found.rows:
        assert len(row.history) == 3
        assert row.fields()["validation_loss"] == min(line["validation_loss"] for line in row.history)
        assert row.seconds > 0
        # 64 inputs, 10 classes and at least one layer between.
        assert row.weights > 640
    assert len({row.fields()["validation_loss"] for row in found.rows}) == 4
    told = json.loads((found.folder / REPORT_FILE).read_text())
    assert [one["name"] for one in told["variants"]] == [row.variant.name for row in found.rows]
    assert (found.folder / TABLE_FILE).read_text().count("\n") == 6
    with Image.open(found.folder / CHART_FILE) as image:
        assert min(image.size) > 600
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 4


def test_interrupted_in_the_second_variant_it_goes_on_there_and_gives_the_same(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")

    def stop(step: Step) -> None:
        if step.total and step.phase == "train" and "optimizer=adam" in step.note and step.done == 10:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(tmp_path / "parts", report=stop)
    assert not (whole.folder.parents[1] / "parts" / whole.folder.name / REPORT_FILE).exists()
    seen: list[Step] = []
    found = run(tmp_path / "parts", report=seen.append)
    assert not any("optimizer=sgd" in step.note for step in trained(seen))
    assert trained(seen)[0].done == 11
    assert [row.reused for row in found.rows] == [True, False]
    for mine, theirs in zip(whole.rows, found.rows, strict=True):
        assert [line["validation_loss"] for line in mine.history] == [
            line["validation_loss"] for line in theirs.history
        ]
    seen.clear()
    assert [row.reused for row in run(tmp_path / "parts", report=seen.append).rows] == [True, True]
    assert not trained(seen)


def test_a_failure_is_a_row_and_does_not_end_the_others(tmp_path: Path) -> None:
    found = run(tmp_path, vary=[], sets=["train.optimizer=sgd train.learning_rate=1e20", "train.optimizer=adam"])
    failed, other = found.rows
    assert failed.error.startswith("NumericFailure: the loss became")
    assert isinstance(failed.failure, NumericFailure)
    assert failed.fields()["validation_accuracy"] is None
    assert not other.error
    assert found.failure is None
    assert failed.error in (found.folder / TABLE_FILE).read_text()
    with Image.open(found.folder / CHART_FILE) as image:
        assert image.size[0] > 600


def test_when_all_fail_the_first_error_is_the_comparisons(tmp_path: Path) -> None:
    found = run(tmp_path, vary=["train.learning_rate=1e20,1e21"], sets=[])
    assert isinstance(found.failure, MarinaError)
    assert found.failure.exit_code == 3


def test_a_variant_and_the_training_of_it_share_their_work(tmp_path: Path) -> None:
    found = run(tmp_path)
    recipe = load_recipe("digits", [*SMALL, "train.optimizer=adam"])
    seen: list[Step] = []
    artifacts = tmp_path / "artifacts"
    chosen = pipeline.train(recipe, runs=tmp_path / "runs", artifacts=artifacts, report=seen.append)
    assert chosen.run == found.rows[1].run
    assert not trained(seen)
    assert chosen.metrics["validation_loss"] == found.rows[1].fields()["validation_loss"]
    assert not (chosen.run / CHECKPOINT).exists()
    # And the other way round: what was trained is not trained for a comparison.
    (chosen.run / compare.FITTED_FILE).unlink()
    again = run(tmp_path, report=seen.append)
    assert not trained(seen)
    assert again.rows[1].fields() | {"reused": False} == found.rows[1].fields()


def test_the_test_split_is_not_looked_at(tmp_path: Path) -> None:
    seen: list[Step] = []
    run(tmp_path, report=seen.append)
    assert not [step for step in seen if step.phase == "evaluate"]


@pytest.mark.parametrize(
    ("vary", "sets", "message"),
    [
        ([], [], "there is one variant"),
        (["train.optimizer"], [], "not of the form KEY=VALUE,VALUE"),
        (["train.optimizer=sgd"], [], "two values at least"),
        (["train.optimizer=sgd,sgd"], [], "are the same training"),
        (["train.optimiser=sgd,adam"], [], "unknown key 'train.optimiser'"),
        (["train.optimizer=sgd,adm"], [], "train.optimizer"),
        ([], ["train.epochs=0", "train.epochs=2"], "train.epochs"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_training(vary: list[str], sets: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_variants(["digits"], vary=vary, sets=sets)


def test_losses_of_two_kinds_are_compared_by_another_figure_only() -> None:
    vary = ["train.loss=mean_squared_error,mean_absolute_error"]
    with pytest.raises(RecipeError, match="losses of two kinds cannot be ranked") as caught:
        read_variants(["digit_sums"], vary=vary)
    assert caught.value.remedy == "--set train.monitor=r2"
    assert len(read_variants(["digit_sums"], vary=vary, overrides=["train.monitor=r2"])) == 2


def test_a_comma_within_brackets_divides_nothing() -> None:
    assert compare.split("[1,2],{a='x,y'},\"a,b\", c") == ["[1,2]", "{a='x,y'}", '"a,b"', "c"]


def test_the_command(tmp_path: Path) -> None:
    home = commands.project(tmp_path / "home")
    sets = [word for setting in SMALL for word in ("--set", setting)]
    ran = commands.marina(home, "compare", "digits", *sets, "--vary", "train.optimizer=sgd,adam", "--json")
    assert ran.code == 0, ran.err
    assert [one["changes"] for one in ran.json["variants"]] == [
        {"train.optimizer": "sgd"},
        {"train.optimizer": "adam"},
    ]
    assert Path(ran.json["chart"]).is_file()
    refused = commands.marina(home, "compare", "digits", "--json")
    assert refused.code == 3
    assert refused.json["kind"] == "RecipeError"
