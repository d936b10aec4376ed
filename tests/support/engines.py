"""An artifact with a real engine, built and judged as the ladder does it, in a second or two."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from handlerlib import loading
from handlerlib.engine_spec import ENGINE_FILE, EngineSpec, Measurement
from handlerlib.spec import ModelSpec, Task
from support.artifacts import write_artifact
from support.images import pixels
from training.optimize import judge, publish, rungs

CPU = torch.device("cpu")


def photos(count: int, height: int = 16, width: int = 16) -> torch.Tensor:
    """uint8 `[count, 3, height, width]`: the pixels of support.images' photos."""
    stacked = torch.stack([torch.tensor(pixels(seed, height, width)) for seed in range(count)])
    return stacked.permute(0, 3, 1, 2).contiguous()


def write_optimised(
    folder: Path, rung: str = "openvino-int8", *, name: str = "tiny", task: Task = "multi-class"
) -> Path:
    """Write `folder/NAME/1.0` as write_artifact does, and `folder/NAME/1.1` with an engine; return the latter."""
    artifact = write_artifact(folder, name=name, task=task)
    spec = ModelSpec.load(artifact)
    built = folder / f"{name}-{rung}"
    draft = rungs.build(rung, loading.read_network(artifact, spec), spec, photos(40), built)
    engine = rungs.open_engine(draft, built, lambda: loading.read_network(artifact, spec), spec, CPU)
    plain = loading.load(artifact, CPU).engine
    x_NCHW = photos(60)
    reference = judge.answers(plain, x_NCHW, 1)
    thresholds = spec.thresholds
    truth = (reference >= torch.tensor(thresholds)).float() if thresholds else reference.argmax(dim=1)
    compared = judge.compare(reference, judge.answers(engine, x_NCHW, 1), truth, thresholds)
    golden = judge.golden(engine, spec, artifact, 1)
    tolerance = judge.tolerance(spec, draft.precision, golden.difference)
    assert tolerance is not None
    found = EngineSpec(
        rung=draft.rung,
        engine=draft.engine,
        precision=draft.precision,
        options=draft.options,
        files=draft.files,
        built_for=draft.built_for,
        tolerance=tolerance,
        golden_difference=golden.difference,
        own_answers=golden.answers,
        accuracy=None if task == "regression" else compared.record(budget=100.0),
        measurements=(Measurement(batch=1, threads=1, milliseconds=1.0, reference_milliseconds=2.0),),
    )
    return publish.with_engine(artifact, found, built, folder, run=f"{name}-{rung}")


def change_engine(folder: Path, **fields: Any) -> EngineSpec:
    """Write `engine.json` of a folder again with other values, as somebody else's hand would."""
    found = EngineSpec.load(folder)
    assert found is not None
    changed = dataclasses.replace(found, **fields)
    (folder / ENGINE_FILE).write_text(changed.to_json())
    return changed


def write_torch_engine(folder: Path, **fields: Any) -> EngineSpec:
    """`engine.json` of the rung torch-folded for a plain artifact: no files, no other runtime."""
    spec = ModelSpec.load(folder)
    draft = rungs.build("torch-folded", loading.read_network(folder, spec), spec, None, folder)
    values = {**{field.name: getattr(draft, field.name) for field in dataclasses.fields(draft)}, **fields}
    found = EngineSpec(**{"tolerance": 1e-4, "golden_difference": 0.0, **values})
    (folder / ENGINE_FILE).write_text(found.to_json())
    return found


def forged(folder: Path, path: str, value: object) -> None:
    """Set one dotted key of `engine.json`, valid or not."""
    document = json.loads((folder / ENGINE_FILE).read_text())
    *parents, last = path.split(".")
    place = document
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    (folder / ENGINE_FILE).write_text(json.dumps(document))
