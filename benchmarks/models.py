"""The yardstick model, once per rung of the ladder: `python -m benchmarks.models ARTIFACT CACHE DEVICE ROOT RUNG...`.

The plain rung is the artifact without its engine. The others are built by `marina optimize`'s own ladder, judged as ever:
a rung that loses too much accuracy here is no rung, and the reason goes into the results. Prints one JSON object, rung to
`{"folder": ...}` or `{"reason": ...}`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal, cast

from benchmarks.systems import PLAIN
from handlerlib.engine_spec import ENGINE_FILE, ENGINE_FOLDER, EngineSpec
from handlerlib.errors import MarinaError
from handlerlib.spec import ModelSpec
from training.optimize import ladder
from training.progress import Step

_TRIAL_SECONDS = 0.3
"""The ladder's own timings are not used here."""
_TEST_IMAGES = 2000


def main(arguments: list[str]) -> None:
    """The command."""
    artifact, cache, device, root, *rungs = arguments
    found = {rung: provide(rung, Path(artifact), Path(cache), device, Path(root) if root else None) for rung in rungs}
    json.dump(found, sys.stdout)


def provide(rung: str, artifact: Path, cache: Path, device: str, root: Path | None) -> dict[str, Any]:
    """An artifact folder with this rung, made when it is not in `cache`."""
    try:
        if rung == PLAIN:
            return {"folder": str(_without_engine(artifact, cache / "models" / PLAIN))}
        return _with_engine(rung, artifact, cache, cast(Literal["cpu", "cuda"], device), root)
    except (MarinaError, OSError) as error:
        return {"reason": str(error)}


def _without_engine(artifact: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(artifact, target, ignore=shutil.ignore_patterns(ENGINE_FILE, ENGINE_FOLDER))
    return target


def _with_engine(
    rung: str, artifact: Path, cache: Path, device: Literal["cpu", "cuda"], root: Path | None
) -> dict[str, Any]:
    own = EngineSpec.load(artifact)
    if own is not None and own.rung == rung:
        return _described(artifact, own)
    settings = ladder.Settings(device=device, rungs=(rung,), root=root, seconds=_TRIAL_SECONDS, limit=_TEST_IMAGES)
    artifacts = cache / "models" / rung
    shutil.rmtree(artifacts, ignore_errors=True)
    result = ladder.run(artifact, settings, runs=cache / "runs", artifacts=artifacts, report=_report)
    if result.artifact is None:
        step = next(step for step in result.outcomes if step.rung == rung)
        return {"reason": step.reason or "it is not clearly faster than the plain weights"}
    engine = EngineSpec.load(result.artifact)
    assert engine is not None
    return _described(result.artifact, engine)


def _described(folder: Path, engine: EngineSpec) -> dict[str, Any]:
    accuracy = engine.accuracy
    return {
        "folder": str(folder),
        "tolerance": engine.tolerance,
        "precision": engine.precision,
        "accuracy": accuracy
        and {
            "images": accuracy.images,
            "plain": accuracy.reference,
            "engine": accuracy.engine,
            "loss_points": accuracy.loss_points,
        },
        "name": ModelSpec.load(folder).name,
    }


def _report(step: Step) -> None:
    sys.stderr.write(f"{step.phase} {step.note}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
