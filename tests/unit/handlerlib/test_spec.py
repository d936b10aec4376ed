from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from handlerlib.errors import SpecError
from handlerlib.spec import ModelSpec
from support.artifacts import write_artifact


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec.load(write_artifact(tmp_path_factory.mktemp("artifacts")))


def changed(spec: ModelSpec, path: str, value: object) -> str:
    document = json.loads(spec.to_json())
    *parents, last = path.split(".")
    place = document
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return json.dumps(document)


def test_text_and_value_are_the_same_thing(spec: ModelSpec) -> None:
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert ModelSpec.from_json(spec.to_json()).to_json() == spec.to_json()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("preprocess.crop_fractin", 1.0, "unknown key 'preprocess.crop_fractin'.*did you mean 'crop_fraction'"),
        ("preprocess.mean", [0.5], "preprocess.mean must be one value per channel"),
        ("preprocess.std", [0.1, 0.0, 0.1], "preprocess.std must be positive"),
        ("preprocess.resize", "squash", "preprocess.resize must be one of"),
        ("preprocess.mean", [0.5, float("nan"), 0.5], r"preprocess.mean\[1\] must be finite"),
        ("preprocess.std", [0.1, 10**400, 0.1], r"preprocess.std\[1\] must be finite"),
        ("architecture.channels", 4, "architecture.channels must be 1 or 3"),
        ("architecture.channels", True, "architecture.channels must be of type int"),
        ("labels", ["a", "a", "b"], "labels must be distinct"),
        ("labels", ["a", "b"], "labels must be one per class"),
        ("limits.top_k", 0, "limits.top_k must be at least 1"),
        ("golden.samples", [], "golden.samples must be at least one sample"),
        ("golden.samples.0.label", "purple", "a label of this model"),
        ("schema", 2, "schema must be 1"),
    ],
)
def test_wrong_values_are_named(spec: ModelSpec, path: str, value: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ModelSpec.from_json(changed(spec, path, value))


def test_missing_key_is_named(spec: ModelSpec) -> None:
    document = json.loads(spec.to_json())
    del document["preprocess"]["mean"]
    with pytest.raises(SpecError, match=r"lacks the key 'preprocess.mean'"):
        ModelSpec.from_json(json.dumps(document))


def test_optional_keys_may_be_left_out(spec: ModelSpec) -> None:
    document = json.loads(spec.to_json())
    del document["limits"], document["schema"], document["architecture"]["dropout"]
    assert ModelSpec.from_json(json.dumps(document)).labels == spec.labels


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"spec"'])
def test_not_an_object(text: str) -> None:
    with pytest.raises(SpecError):
        ModelSpec.from_json(text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        ModelSpec.load(tmp_path)


def test_values_are_frozen(spec: ModelSpec) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "other"  # type: ignore[misc]
