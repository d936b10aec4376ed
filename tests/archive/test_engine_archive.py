"""Archives that bring an engine: packed with the plain weights, proved with both, refused when either was changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from handlerlib import loading
from handlerlib.engine_spec import EngineSpec
from handlerlib.spec import WEIGHTS_FILE, ModelSpec, Task
from marina import archive, golden, load_checks, load_payloads, tune_config, verify
from marina.archive import Archive
from marina.errors import ArchiveError
from marina.loadgen import Check
from marina.tune import Candidate
from support.archives import repack
from support.engines import change_engine, forged, write_optimised


@pytest.fixture(scope="module")
def optimised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_optimised(tmp_path_factory.mktemp("optimised"))


@pytest.fixture(scope="module")
def mar(optimised: Path, handlers: Path, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return archive.pack(optimised, handlers=handlers, destination=tmp_path_factory.mktemp("store"))


def findings(report: verify.Report) -> dict[str, str]:
    return {
        outcome.check: " | ".join(f"{one.where}: {one.message}" for one in outcome.findings)
        for outcome in report.outcomes
        if outcome.findings
    }


def test_it_holds_both_and_is_packed_the_same_twice(
    optimised: Path, mar: Archive, handlers: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(mar.path) as opened:
        names = set(opened.namelist())
        recorded = json.loads(opened.read("build.json"))["files"]
    assert {"engine.json", "engine/model.xml", "engine/model.weights", WEIGHTS_FILE} <= names
    assert {"engine.json", "engine/model.xml", "engine/model.weights"} <= set(recorded)
    again = archive.pack(optimised, handlers=handlers, destination=tmp_path)
    assert again.sha256 == mar.sha256


def test_engine_and_plain_weights_are_both_proved(mar: Archive) -> None:
    report = verify.verify(mar.path)
    assert report.passed, report.findings
    (engine,) = (outcome for outcome in report.outcomes if outcome.check == "engine")
    assert engine.notes == ()
    found = verify.inspect(mar.path)
    assert found["engine"]["rung"] == "openvino-int8"
    # The proof over HTTP allows what the engine needs, and no more.
    assert golden.tolerance(mar.path) == found["engine"]["tolerance"] > 1e-4


@pytest.mark.parametrize(("task", "rung"), [("multi-label", "openvino-int8"), ("regression", "openvino-fp32")])
def test_engines_of_the_other_tasks_are_proved_and_held_to_their_own_answers(
    task: Task, rung: str, handlers: Path, tmp_path: Path
) -> None:
    artifact = write_optimised(tmp_path / "artifacts", rung, task=task)
    report = verify.verify(archive.pack(artifact, handlers=handlers, destination=tmp_path / "store").path)
    assert report.passed, report.findings
    served = loading.load(artifact, torch.device("cpu"))
    assert served.serving.engine == rung
    found = EngineSpec.load(artifact)
    assert found is not None
    units = served.spec.units
    rows = [[value + 0.2 * unit for value, unit in zip(row, units, strict=True)] for row in found.own_answers]
    change_engine(artifact, own_answers=tuple(map(tuple, rows)))
    away = archive.pack(artifact, handlers=handlers, destination=tmp_path / "away")
    assert "own answers" in findings(verify.verify(away.path))["engine"]


def test_a_tuner_holds_each_form_of_a_model_to_its_own_tolerance(optimised: Path, mar: Archive, handlers: Path) -> None:
    """By the plain weights' tolerance every answer of a faster engine would be a wrong one."""
    store = mar.path.parent
    plain = archive.pack(optimised.parent / "1.0", handlers=handlers, destination=store)
    load = load_payloads.from_archive(plain.path)
    forms = [Candidate(key="", file=one.path.name, sha256=one.sha256) for one in (plain, mar)]
    checks = [tune_config.checked(store, form, load).check for form in forms]
    assert load.check is not None and checks[0] == load.check
    engine = EngineSpec.load(optimised)
    assert engine is not None and checks[1] is not None
    assert checks[1].settings == {**load.check.settings, "tolerance": engine.tolerance}

    def said(check: Check) -> list[str]:
        judge = load_checks.probabilities(check.settings)
        rows = [[{"index": index, "label": "", "probability": value} for index, value in enumerate(row)] for row in own]
        return [judge(number, json.dumps({"predictions": [row]}).encode()) for number, row in enumerate(rows)]

    own = engine.own_answers
    assert any(said(load.check)) and not any(said(checks[1]))
    others = dataclasses.replace(load, payloads=tuple(reversed(load.payloads)))
    assert tune_config.checked(store, forms[1], others).check is None


def test_an_engine_for_another_machine_is_noted_and_not_refused(mar: Archive, tmp_path: Path) -> None:
    report = verify.verify(
        repack(mar, tmp_path, lambda root: forged(root, "built_for.cpu_features", ["avx1024"]), honest=True)
    )
    assert report.passed, report.findings
    (engine,) = (outcome for outcome in report.outcomes if outcome.check == "engine")
    assert engine.notes == (
        "engine openvino-int8 not tried on this machine, plain weights answer: this processor lacks avx1024",
    )


def flip(root: Path) -> None:
    path = root / "engine" / "model.weights"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def test_a_changed_engine_is_refused(mar: Archive, tmp_path: Path) -> None:
    for folder in ("plain", "honest"):
        (tmp_path / folder).mkdir()
    found = findings(verify.verify(repack(mar, tmp_path / "plain", flip)))
    assert "engine/model.weights: the file was changed after packing" in found["digests"]
    found = findings(verify.verify(repack(mar, tmp_path / "honest", flip, honest=True)))
    assert set(found) == {"engine"}
    assert "engine/model.weights is not the file that was built" in found["engine"]


def test_an_engine_that_does_not_keep_its_promise(mar: Archive, tmp_path: Path) -> None:
    def check(name: str, change: Callable[[Path], object]) -> str:
        (tmp_path / name).mkdir()
        found = findings(verify.verify(repack(mar, tmp_path / name, change, honest=True)))
        assert set(found) == {"engine"}
        return found["engine"]

    found = check("tolerance", lambda root: forged(root, "tolerance", 1e-9))
    assert "the engine openvino-int8 cannot serve where it fits: golden sample golden/" in found
    found = check("stray", lambda root: (root / "engine" / "extra.so").write_bytes(b""))
    assert "engine/extra.so: engine.json does not name this file" in found
    assert "rung must be lower case" in check("spec", lambda root: forged(root, "rung", "Nonsense Rung"))


def test_an_engine_must_still_answer_as_when_it_was_judged(optimised: Path) -> None:
    engine = EngineSpec.load(optimised)
    assert engine is not None

    def said(shift: float) -> list[str]:
        rows = [[row[0] + shift, row[1] - shift, *row[2:]] for row in engine.own_answers]
        labelled = [[{"index": index, "probability": value} for index, value in enumerate(row)] for row in rows]
        answers = [{"status": 200, "body": json.dumps({"predictions": [row]})} for row in labelled]
        report = {"stage": "golden", "engine": engine.rung, "alone": answers, "unasked": [], "batch": [], "order": []}
        subject: Any = SimpleNamespace(
            engine=dataclasses.replace(engine, tolerance=0.3),
            spec=ModelSpec.load(optimised),
            root=optimised,
            replayed_engine=report,
        )
        return [f"{one.where}: {one.message}" for one in verify.engine(subject) if isinstance(one, verify.Finding)]

    assert said(0.02) == []
    found = said(0.04)
    assert len(found) == len(engine.own_answers)
    assert found[0].startswith("engine openvino-int8 beside its own answers, golden/0.png, alone: probability of")


def test_a_damaged_engine_is_not_packed(optimised: Path, handlers: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(optimised, tmp_path / "broken")
    flip(broken)
    with pytest.raises(ArchiveError, match=r"engine/model.weights is not the file that was built"):
        archive.pack(broken, handlers=handlers, destination=tmp_path)
    forged(broken, "precision", "int4")
    with pytest.raises(ArchiveError, match="precision must be one of"):
        archive.pack(broken, handlers=handlers, destination=tmp_path)


def test_the_parent_is_on_record(optimised: Path) -> None:
    origin = json.loads((optimised / "provenance.json").read_text())
    assert origin["run"] == "tiny-test"
    assert origin["parent"]["version"] == "1.0"
    assert origin["parent"]["weights_sha256"] == archive.sha256_of(optimised / WEIGHTS_FILE)
    metrics = json.loads((optimised / "metrics.json").read_text())
    engine = EngineSpec.load(optimised)
    assert engine is not None
    assert engine.accuracy is not None
    assert metrics["engine_accuracy"] == engine.accuracy.engine
    card = (optimised / "MODEL_CARD.md").read_text()
    assert card.startswith("# tiny 1.1\n")
    assert "engine `openvino-int8` (int8)" in card
