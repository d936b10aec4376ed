from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path

import pytest

from handlerlib import engine_spec
from handlerlib.engine_spec import Accuracy, BuiltFor, EngineFile, EngineSpec, Package, TorchOptions
from handlerlib.errors import SpecError

SPEC = EngineSpec(
    rung="openvino-int8",
    engine="openvino",
    precision="int8",
    options=TorchOptions(),
    files=(EngineFile(path="engine/model.xml", sha256="0" * 64),),
    built_for=BuiltFor(
        device="cpu",
        machine=platform.machine(),
        cpu_features=(),
        packages=(Package(name="torch", at_least="2.0", below="99"),),
    ),
    tolerance=0.01,
    golden_difference=0.004,
    accuracy=Accuracy(
        split="test",
        images=100,
        reference=0.9,
        engine=0.9,
        loss_points=0.0,
        interval_points=(-1.0, 1.0),
        budget_points=0.5,
    ),
)


def with_built_for(**fields: object) -> EngineSpec:
    return dataclasses.replace(SPEC, built_for=dataclasses.replace(SPEC.built_for, **fields))


def test_text_and_value_are_the_same_thing() -> None:
    assert EngineSpec.from_json(SPEC.to_json()) == SPEC
    assert EngineSpec.from_json(SPEC.to_json()).to_json() == SPEC.to_json()
    assert "own_answers" not in SPEC.to_json()  # as older code wrote it
    kept = dataclasses.replace(SPEC, own_answers=((0.25, 0.75), (1.0, 0.0)))
    assert EngineSpec.from_json(kept.to_json()) == kept


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("tolerence", 0.1, "unknown key 'tolerence' in engine.json, did you mean 'tolerance'"),
        ("built_for.cpu_feature", [], "unknown key 'built_for.cpu_feature' in engine.json, did you mean"),
        ("tolerance", 1.5, "tolerance must be in"),
        ("engine", "tensorrt", "engine must be one of"),
        ("rung", "Open Vino", "rung must be lower case"),
        ("files", [], "files must be at least one"),
        ("files.0.path", "engine/../../etc/passwd", "files.path must be 'engine/NAME'"),
        ("files.0.path", "weights.safetensors", "files.path must be 'engine/NAME'"),
        ("files.0.sha256", "abc", "files.sha256 must be 64 hex digits"),
        ("accuracy", None, "accuracy must be measured for the precision int8"),
        ("accuracy.interval_points", [1.0], "accuracy.interval_points must be two numbers"),
        ("built_for.packages.0.below", "1.9", "a range that holds a version"),
        ("built_for.packages.0.at_least", "new", "a version number"),
        ("schema", 2, "schema must be 1"),
    ],
)
def test_wrong_values_are_named(path: str, value: object, message: str) -> None:
    document = json.loads(SPEC.to_json())
    *parents, last = path.split(".")
    place = document
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    with pytest.raises(SpecError, match=message):
        EngineSpec.from_json(json.dumps(document))


def test_an_artifact_without_engine_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    assert EngineSpec.load(tmp_path) is None
    (tmp_path / "engine.json").write_text("{")
    with pytest.raises(SpecError, match=r"engine.json is not JSON"):
        EngineSpec.load(tmp_path)


@pytest.mark.parametrize(
    ("spec", "device", "reason", "detail"),
    [
        (SPEC, "cuda", "device", "built for cpu and this worker is on cuda"),
        (with_built_for(machine="sparc64"), "cpu", "machine", "built for sparc64"),
        (with_built_for(cpu_features=("sve9",)), "cpu", "cpu-feature", "lacks sve9"),
        (
            with_built_for(packages=(Package(name="no-such-engine", at_least="1", below="2"),)),
            "cpu",
            "package-missing",
            "no-such-engine is not installed",
        ),
        (
            with_built_for(packages=(Package(name="torch", at_least="1.0", below="2.0"),)),
            "cpu",
            "package-version",
            "at least 1.0 and below 2.0",
        ),
    ],
)
def test_what_stands_against_an_engine(spec: EngineSpec, device: str, reason: str, detail: str) -> None:
    found = engine_spec.obstacle(spec, device)
    assert found is not None
    assert found.reason == reason
    assert detail in found.detail


def test_nothing_stands_against_it_where_it_was_built() -> None:
    assert engine_spec.obstacle(SPEC, "cpu") is None


@pytest.mark.parametrize(
    ("version", "at_least", "below", "fits"),
    [
        ("2.14.1+cpu", "2.14", "2.15", True),
        ("2.14.0", "2.14", "2.15", True),
        ("2.14", "2.14.0", "2.15", True),
        ("2.15.0.dev3", "2.14", "2.15", False),
        ("2.9.1", "2.14", "2.15", False),
        ("2026.4.1", "2026.4", "2027", True),
        ("2027.0.0", "2026.4", "2027", False),
    ],
)
def test_version_ranges(monkeypatch: pytest.MonkeyPatch, version: str, at_least: str, below: str, fits: bool) -> None:
    monkeypatch.setattr(engine_spec.importlib.metadata, "version", lambda name: version)
    spec = with_built_for(packages=(Package(name="torch", at_least=at_least, below=below),))
    assert (engine_spec.obstacle(spec, "cpu") is None) is fits


def test_features_of_both_kinds_of_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "intel").write_text("processor : 0\nflags\t\t: fpu avx2 avx512_vnni\nbugs : none\n\nflags : other\n")
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    assert engine_spec.cpu_features(tmp_path / "intel") == {"fpu", "avx2", "avx512_vnni"}
    assert engine_spec.cpu_features(tmp_path / "arm") == {"fp", "asimd", "asimddp"}
    assert engine_spec.cpu_features(tmp_path / "none") == frozenset()
