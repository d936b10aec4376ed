"""The optimisation ladder's rules, and a short real climb."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import psutil
import pytest
import torch

from handlerlib import cores, engine_spec, loading
from handlerlib.engine_spec import EngineSpec, Measurement
from handlerlib.spec import ModelSpec, Task
from support.artifacts import write_artifact
from support.engines import photos
from support.torchserve import eventually
from training import pipeline
from training.errors import RecipeError, RunBusy, TargetError
from training.optimize import judge, ladder, publish, rungs, trial
from training.optimize.ladder import Outcome, Settings
from training.optimize.trial import ChildFailed, Job, Trial
from training.progress import silent


def tried(rung: str, alone: float, busy: float, *, reason: str = "") -> Outcome:
    """A rung that is so many times faster than the plain weights: one image on all cores, a full batch on one."""
    measurements = (
        Measurement(batch=1, threads=2, milliseconds=10 / alone, reference_milliseconds=10),
        Measurement(batch=1, threads=1, milliseconds=20 / alone, reference_milliseconds=20),
        Measurement(batch=32, threads=1, milliseconds=16 / busy, reference_milliseconds=16),
    )
    found = Trial(
        rung=rung,
        golden=judge.Golden(0.0, 0.0, ((1.0,),)),
        load_seconds=0.1,
        memory_mib=10,
        engine_bytes=0,
        measurements=measurements,
    )
    return Outcome(rung=rung, reason=reason, trial=found, tolerance=1e-3)


@pytest.mark.parametrize(
    ("objective", "taken"), [("latency", "openvino-bf16"), ("throughput", "openvino-int8"), ("both", "openvino-int8")]
)
def test_the_fastest_that_passed_is_taken(objective: ladder.Objective, taken: str) -> None:
    outcomes = (
        tried("plain", 1, 1),
        tried("openvino-bf16", 4.0, 2),
        tried("openvino-int8", 3.5, 4),
        tried("aoti-bf16", 9, 9, reason="it loses 3 points"),
    )
    chosen = ladder.choose(outcomes, objective)
    assert chosen is not None
    assert chosen.rung == taken


def test_a_lossless_rung_is_taken_where_the_lossy_ones_are_hardly_faster() -> None:
    outcomes = (tried("plain", 1, 1), tried("openvino-fp32", 2.0, 2.0), tried("openvino-bf16", 2.05, 2.05))
    chosen = ladder.choose(outcomes, "both")
    assert chosen is not None
    assert chosen.rung == "openvino-fp32"


def test_nothing_is_taken_that_is_not_clearly_faster() -> None:
    assert ladder.choose((tried("plain", 1, 1), tried("torch-folded", 1.04, 1.04)), "both") is None
    assert ladder.choose((tried("plain", 2, 2),), "both") is None


def test_gain_is_the_mean_of_both_loads() -> None:
    outcome = tried("openvino-int8", 2, 8)
    assert [round(ladder.gain(outcome, kind), 6) for kind in ("latency", "throughput", "both")] == [2, 8, 4]


def answers(right: str) -> torch.Tensor:
    """Probabilities of two classes: `1` for an image of class 0 that is answered rightly, `0` wrongly."""
    return torch.tensor([[0.9, 0.1] if one == "1" else [0.1, 0.9] for one in right])


def test_what_an_engine_loses_is_counted_in_pairs() -> None:
    reference, candidate = "1" * 80 + "0" * 20, "1" * 76 + "0" * 4 + "1" * 1 + "0" * 19
    found = judge.compare(answers(reference), answers(candidate), torch.zeros(100, dtype=torch.int64))
    assert found.images == 100
    assert found.reference_accuracy == pytest.approx(0.80)
    assert found.accuracy == pytest.approx(0.77)
    assert found.loss_points == pytest.approx(3.0)
    # By hand: 4.5 lost and 1.5 gained of 102.
    middle, deviation = 3 / 102, math.sqrt(6 - 9 / 102) / 102
    assert found.interval == pytest.approx(
        (100 * (middle - 1.959964 * deviation), 100 * (middle + 1.959964 * deviation))
    )


def test_equal_answers_still_have_an_interval_that_images_narrow() -> None:
    few, many = (
        judge.compare(answers("1" * n), answers("1" * n), torch.zeros(n, dtype=torch.int64)) for n in (100, 10_000)
    )
    assert few.loss_points == many.loss_points == 0
    assert few.interval[1] > 1.0
    assert 0 < many.interval[1] < 0.05


@pytest.mark.parametrize(
    ("precision", "difference", "allowed"),
    [
        ("fp32", 5e-5, 1e-4),
        ("fp32", 2e-4, None),
        ("bf16", 0.002, 0.003),
        ("bf16", 1e-5, 1e-3),
        ("bf16", 0.06, None),
        ("int8", 0.02, 0.03),
        ("int8", 0.29, 0.3),
        ("int8", 1.0, None),
    ],
)
def test_tolerance_fits_the_precision_and_is_capped(
    tmp_path: Path, precision: rungs.Precision, difference: float, allowed: float | None
) -> None:
    spec = ModelSpec.load(write_artifact(tmp_path))
    assert judge.tolerance(spec, precision, difference) == allowed


def test_a_wrong_answer_in_the_golden_samples_counts(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path)
    spec = ModelSpec.load(artifact)

    def answering(value: float) -> Callable[[torch.Tensor, int], torch.Tensor]:
        return lambda x_BCHW, threads: torch.full((len(x_BCHW), 3), value)

    assert judge.golden(answering(math.nan), spec, artifact, 1).difference == 1
    even = judge.golden(answering(1 / 3), spec, artifact, 1).difference
    assert even == pytest.approx(max(abs(p - 1 / 3) for s in spec.golden.samples for p in s.probabilities), abs=1e-6)
    plain = loading.load(artifact, torch.device("cpu")).engine
    assert judge.golden(plain, spec, artifact, 1).difference < 1e-6
    mixed_up = judge.golden(lambda x_BCHW, threads: plain(x_BCHW, threads).flip(0), spec, artifact, 1).difference
    assert mixed_up > 10 * spec.golden.tolerance


def test_rungs_that_cannot_be_built_here_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert rungs.missing(rungs.find("openvino-int8"), "cpu", calibration=False) == (
        "there are no training images to calibrate it on"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rungs.missing(rungs.find("aoti-fp32"), "cpu", calibration=True) == "there is no C++ compiler"
    monkeypatch.setattr(rungs.engine_spec, "cpu_features", lambda: frozenset(["sse2"]))
    assert rungs.missing(rungs.find("torch-bf16"), "cpu", calibration=True) == (
        "this processor has no instructions for bf16"
    )
    with pytest.raises(RecipeError, match="there is no rung 'openvino-int4', did you mean 'openvino-int8'"):
        rungs.find("openvino-int4")


def test_a_gpu_has_a_row_for_every_layout_and_precision_of_torch() -> None:
    """What nothing builds is dropped by name, not left out."""
    on_gpu, on_cpu = (
        {rung.name for rung in rungs.for_device(device) if rung.engine != "openvino"} for device in ("cuda", "cpu")
    )
    assert on_cpu - on_gpu == {"torch-bf16-autocast"}
    assert on_gpu - on_cpu == {"torch-fp16", "aoti-fp16", "torch-int8"}
    reasons = {rung.name: rungs.missing(rung, "cuda", calibration=True) for rung in rungs.for_device("cuda")}
    assert reasons["torch-int8"] == "torch has no int8 convolutions for a GPU"
    assert {name for name, reason in reasons.items() if reason and not name.startswith(("aoti", "compile"))} == {
        "torch-int8"
    }


def test_what_was_compiled_here_needs_this_processor_on_a_gpu_too() -> None:
    def needed(rung: str, device: rungs.Device) -> tuple[str, ...]:
        return rungs._needed(rungs.find(rung), device)

    assert needed("aoti-bf16", "cuda") == needed("aoti-bf16", "cpu") != ()
    assert needed("torch-bf16", "cuda") == ()


def test_what_an_engine_answered_is_kept_and_how_much_that_hangs_on_the_batch(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path)
    spec = ModelSpec.load(artifact)
    plain = loading.load(artifact, torch.device("cpu")).engine
    found = judge.golden(plain, spec, artifact, 1)
    assert found.spread < 1e-5
    for kept, sample in zip(found.answers, spec.golden.samples, strict=True):
        assert kept == pytest.approx(sample.probabilities, abs=1e-5)
    assert judge.strays(found.spread) == ""
    uneven = judge.golden(lambda x, threads: plain(x, threads) + (0.04 if len(x) > 1 else 0.0), spec, artifact, 1)
    assert uneven.spread == pytest.approx(0.04, abs=1e-5)
    assert judge.strays(uneven.spread).startswith("its answer to one image differs by 0.04")


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path)
    places = {"runs": tmp_path / "runs", "artifacts": tmp_path, "report": silent}
    with pytest.raises(TargetError, match=r"is no artifact: it lacks model_spec.json"):
        ladder.run(tmp_path, Settings(), **places)
    with pytest.raises(RecipeError, match="there is no rung 'fastest'"):
        ladder.run(artifact, Settings(rungs=("fastest",)), **places)
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="torch sees no GPU"):
            ladder.run(artifact, Settings(device="cuda"), **places)


@pytest.mark.parametrize(
    ("side", "device", "expected"),
    [(16, "cpu", [1, 1, 4, 8, 32]), (224, "cpu", [1, 1, 4, 8]), (224, "cuda", [1, 1, 4, 8, 32])],
)
def test_a_full_batch_is_what_a_worker_takes_at_once(
    tmp_path: Path, side: int, device: Literal["cpu", "cuda"], expected: list[int]
) -> None:
    spec = ModelSpec.load(write_artifact(tmp_path))
    spec = dataclasses.replace(spec, architecture=dataclasses.replace(spec.architecture, height=side, width=side))
    settings = Settings(device=device, batch_size=32)
    job = ladder._job("trial", rungs.find("plain"), tmp_path, spec, tmp_path, None, settings)
    assert [batch for batch, _ in job.pairs] == [1, *expected[1 + (cores.usable() == 1) :]]


def test_a_real_climb_without_images_allows_lossless_rungs_alone(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path)
    settings = Settings(seconds=0.02, batch_size=4, rungs=("torch-folded", "torch-bf16"))
    places = {"runs": tmp_path / "runs", "artifacts": tmp_path, "report": silent}
    result = ladder.run(artifact, settings, **places)
    reasons = {outcome.rung: outcome.reason for outcome in result.outcomes}
    assert reasons == {
        "plain": "",
        "torch-folded": "",
        "torch-bf16": "its accuracy cannot be judged without test images",
    }
    assert result.notes[0].startswith("only lossless rungs are allowed, because there are no test images:")
    for outcome in result.outcomes:
        if outcome.trial is not None:
            pairs = {(one.batch, one.threads) for one in outcome.trial.measurements}
            assert pairs == {(1, cores.usable()), (1, 1), (4, 1)}
            assert all(one.milliseconds > 0 and one.reference_milliseconds > 0 for one in outcome.trial.measurements)
            assert outcome.trial.golden.difference <= 1e-4
    record = json.loads((result.run / "ladder.json").read_text())
    assert [row["rung"] for row in record["rungs"]] == list(reasons)
    assert (result.run / "ladder.png").read_bytes().startswith(b"\x89PNG")
    # The same command again measures nothing and says the same.
    again = ladder.run(artifact, settings, **places)
    assert again.reused
    assert dataclasses.replace(again, reused=False) == result


def test_two_climbs_of_one_ladder_do_not_write_into_each_other(tmp_path: Path) -> None:
    artifact, settings = write_artifact(tmp_path), Settings(rungs=("torch-folded",))
    run = tmp_path / "runs" / ladder._run_name(artifact, ModelSpec.load(artifact), settings, ladder._wanted(settings))
    run.mkdir(parents=True)
    (run / "ladder.json").write_text("of the one that holds it")
    with pipeline.only_one(run), pytest.raises(RunBusy, match="another process is at work in"):
        ladder.run(artifact, settings, runs=run.parent, artifacts=tmp_path, report=silent, again=True)
    assert (run / "ladder.json").read_text() == "of the one that holds it"


def test_a_child_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """It reads a golden sample that is a pipe without an end when whoever started it is killed."""
    artifact, folder = write_artifact(tmp_path), tmp_path / "run"
    spec = ModelSpec.load(artifact)
    draft = rungs.build("torch-folded", loading.read_network(artifact, spec), spec, None, folder)
    folder.mkdir()
    (folder / "draft.json").write_text(json.dumps(dataclasses.asdict(draft)))
    sample = artifact / spec.golden.samples[0].file
    sample.unlink()
    os.mkfifo(sample)
    job = ladder._job("trial", rungs.find("torch-folded"), artifact, spec, folder, None, Settings())
    code = f"import pickle; from training.optimize import trial; trial.run(pickle.loads({pickle.dumps(job)!r}))"
    pipes: list[int] = []

    def reading() -> bool:
        with contextlib.suppress(OSError):  # nobody reads it yet
            pipes.append(os.open(sample, os.O_WRONLY | os.O_NONBLOCK))
        return bool(pipes)

    with subprocess.Popen([sys.executable, "-c", code]) as starter:
        eventually(reading, "the child reads its golden sample", seconds=120)
        (child,) = psutil.Process(starter.pid).children()
        starter.kill()
    try:
        child.wait(timeout=60)
    finally:
        os.close(pipes[0])


def test_a_rung_whose_process_fails_says_why(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path)
    (artifact / "weights.safetensors").write_bytes(b"")
    job = Job(
        what="build",
        rung="torch-folded",
        artifact=artifact,
        folder=tmp_path / "rung",
        data=None,
        device="cpu",
        pairs=((1, 1),),
        seconds=0.01,
    )
    with pytest.raises(ChildFailed, match=r"weights.safetensors cannot be read"):
        trial.run(job)
    assert "Traceback" in (tmp_path / "rung" / "build.log").read_text()


def engine_of(artifact: Path, built: Path, **fields: object) -> EngineSpec:
    spec = ModelSpec.load(artifact)
    draft = rungs.build("openvino-fp32", loading.read_network(artifact, spec), spec, None, built)
    values = {field.name: getattr(draft, field.name) for field in dataclasses.fields(draft)}
    return EngineSpec(**{**values, "tolerance": 1e-4, "golden_difference": 0.0, **fields})


def test_versions_of_optimised_artifacts(tmp_path: Path) -> None:
    artifact, built = write_artifact(tmp_path), tmp_path / "built"
    write_artifact(tmp_path, version="1.9")
    engine = engine_of(artifact, built)
    first = publish.with_engine(artifact, engine, built, tmp_path, run="optimize-tiny-1")
    assert first.name == "1.10"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    assert publish.with_engine(artifact, engine, built, tmp_path, run="optimize-tiny-1") == first
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = publish.with_engine(artifact, engine, built, tmp_path, run="optimize-tiny-2")
    assert other.name == "1.11"
    # Neither that version's own artifact nor one that somebody tuned changes what is published.
    assert publish.with_engine(first, engine, built, tmp_path, run="optimize-tiny-1") == first
    (first / "model-config.yaml").write_text("minWorkers: 2\n")
    assert publish.with_engine(first, engine, built, tmp_path, run="optimize-tiny-1") == first
    untuned = publish.with_engine(artifact, engine, built, tmp_path, run="optimize-tiny-1")
    assert untuned.name == "1.12" and (first / "model-config.yaml").read_text() == "minWorkers: 2\n"
    assert publish.with_engine(artifact, engine, built, tmp_path, run="optimize-tiny-1") == untuned
    assert json.loads((first / "provenance.json").read_text())["parent"]["version"] == "1.0"
    write_artifact(tmp_path, version="2.0")
    assert publish.following(tmp_path / "tiny") == "2.1"
    # Optimised again, its engine and the section on its card are replaced, not added.
    third = publish.with_engine(
        first, engine_of(artifact, built, tolerance=2e-4), built, tmp_path, run="optimize-tiny-3"
    )
    card = (third / "MODEL_CARD.md").read_text()
    assert card.count("## Engine") == 1
    assert card.startswith("# tiny 2.1\n")
    assert json.loads((third / "provenance.json").read_text())["parent"]["version"] == "1.10"


# Compiling takes long, and shares its graph: one task each.
@pytest.mark.parametrize(
    ("rung", "task"),
    [
        *itertools.product(["openvino-fp32", "torch-folded"], get_args(Task)),
        ("aoti-fp32", "multi-label"),
        ("compile-fp32", "regression"),
    ],
)
def test_a_rung_gives_the_tasks_own_answers(rung: str, task: Task, tmp_path: Path) -> None:
    artifact, built = write_artifact(tmp_path, task=task), tmp_path / "built"
    spec = ModelSpec.load(artifact)
    draft = rungs.build(rung, loading.read_network(artifact, spec), spec, None, built)
    engine = rungs.open_engine(draft, built, lambda: loading.read_network(artifact, spec), spec, torch.device("cpu"))
    plain = loading.load(artifact, torch.device("cpu")).engine
    assert torch.allclose(engine(photos(7), 1), plain(photos(7), 1), atol=1e-5)
    found = judge.golden(engine, spec, artifact, 1)
    assert max(found.difference, found.spread) < 1e-5
    own = engine_spec.own_golden(spec.golden, found.answers)
    assert own is not None
    assert [sample.outputs for sample in own.samples] == list(found.answers)


def test_all_labels_of_an_image_must_be_right() -> None:
    answers_NK = torch.tensor([[0.4, 0.6], [0.39, 0.6], [0.9, 0.59], [0.0, 0.0]])
    targets_NK = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert judge.right(answers_NK, targets_NK, (0.4, 0.6)).tolist() == [True, False, True, False]


def test_of_values_only_lossless_rungs_are_climbed(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "artifacts", task="regression")
    settings = Settings(seconds=0.02, batch_size=4, rungs=("torch-folded", "torch-bf16"))
    found = ladder.run(artifact, settings, runs=tmp_path / "runs", artifacts=tmp_path / "artifacts", report=silent)
    assert "no share of right answers" in found.notes[0]
    outcomes = {outcome.rung: outcome for outcome in found.outcomes}
    assert outcomes["torch-folded"].trial is not None and outcomes["torch-folded"].tolerance is not None
    assert outcomes["torch-bf16"].trial is None and outcomes["torch-bf16"].reason in found.notes[0]
