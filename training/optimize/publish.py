"""An artifact and an engine -> the next version of the artifact, which carries both."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

from handlerlib import engine_spec
from handlerlib.engine_spec import ENGINE_FILE, ENGINE_FOLDER, EngineSpec
from handlerlib.spec import SPEC_FILE, WEIGHTS_FILE, ModelSpec
from training import files
from training.export import CARD_FILE, METRICS_FILE, PROVENANCE_FILE, following, published, to_json
from training.html_report import REPORT_FILE

_CONFIG_FILE = "model-config.yaml"
"""An artifact may bring its own in place of the handler's."""


def with_engine(artifact: Path, engine: EngineSpec, built: Path, artifacts: Path, *, run: str) -> Path:
    """Write `artifacts/NAME/VERSION` with the artifact's files and the engine whose files lie in `built`.

    `run` names what made the engine. A version that already holds this very engine, with the artifact's configuration, is
    returned as it is: it may be served. Otherwise it is the one after the newest. The parent is recorded in
    `provenance.json`; its engine, if it has one, is replaced.
    """
    parent = ModelSpec.load(artifact)
    origin = json.loads((artifact / PROVENANCE_FILE).read_text(encoding="utf-8"))
    origin["parent"] = {
        "name": parent.name,
        "version": parent.version,
        "weights_sha256": engine_spec.sha256_of(artifact / WEIGHTS_FILE),
        "by": "optimize",
        "run": run,
    }
    with files.locked(artifacts / parent.name):
        versions = artifacts / parent.name
        for version in published(versions):
            if _holds(versions / version, engine, run) and _config(versions / version) == _config(artifact):
                return versions / version
        spec = dataclasses.replace(parent, version=following(versions))
        return _write(artifact, spec, parent, origin, engine, built, artifacts)


def _write(
    artifact: Path,
    spec: ModelSpec,
    parent: ModelSpec,
    origin: dict[str, Any],
    engine: EngineSpec,
    built: Path,
    artifacts: Path,
) -> Path:
    metrics = json.loads((artifact / METRICS_FILE).read_text(encoding="utf-8")) | _metrics(engine)
    card = _card((artifact / CARD_FILE).read_text(encoding="utf-8"), spec, parent, engine)
    target = artifacts / spec.name / spec.version

    def fill(folder: Path) -> None:
        for name in (WEIGHTS_FILE, *(sample.file for sample in spec.golden.samples)):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(artifact / name, folder / name)
        if (artifact / _CONFIG_FILE).is_file():
            shutil.copyfile(artifact / _CONFIG_FILE, folder / _CONFIG_FILE)
        for file in engine.files:
            (folder / ENGINE_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(built / file.path, folder / file.path)
        texts = {
            SPEC_FILE: spec.to_json(),
            ENGINE_FILE: engine.to_json(),
            METRICS_FILE: to_json(metrics),
            PROVENANCE_FILE: to_json(origin),
            CARD_FILE: card,
        }
        if (artifact / REPORT_FILE).is_file():
            page = (artifact / REPORT_FILE).read_text(encoding="utf-8")
            texts[REPORT_FILE] = _report(page, parent, engine)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")

    files.publish(target, fill)
    return target


def _config(folder: Path) -> bytes | None:
    return (folder / _CONFIG_FILE).read_bytes() if (folder / _CONFIG_FILE).is_file() else None


def _holds(folder: Path, engine: EngineSpec, run: str) -> bool:
    try:
        made_by = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))["parent"]["run"]
        same = (folder / ENGINE_FILE).read_text(encoding="utf-8") == engine.to_json()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(made_by == run) and same and engine_spec.files_obstacle(engine, folder) is None


def _metrics(engine: EngineSpec) -> dict[str, float]:
    if engine.accuracy is None:
        return {}
    return {
        "engine_accuracy": engine.accuracy.engine,
        "engine_reference_accuracy": engine.accuracy.reference,
        "engine_images": float(engine.accuracy.images),
        "engine_loss_points": engine.accuracy.loss_points,
    }


def _card(text: str, spec: ModelSpec, parent: ModelSpec, engine: EngineSpec) -> str:
    """The parent's card under the new version, with a section on the engine (in place of an older one)."""
    body = re.sub(r"\n## Engine\n.*?(?=\n## |\Z)", "\n", text.partition("\n")[2], flags=re.DOTALL).rstrip()
    lines = [
        f"# {spec.name} {spec.version}",
        body,
        "",
        "## Engine",
        "",
        f"Version {parent.version} with the engine `{engine.rung}` ({engine.precision}); the weights are the same and answer"
        " where the engine does not fit the machine.",
        "",
        *_accuracy(engine, spec),
        "| batch | threads | ms per image | plain | times faster |",
        "|---|---|---|---|---|",
        *(
            f"| {one.batch} | {one.threads} | {one.milliseconds:.2f} | {one.reference_milliseconds:.2f}"
            f" | {one.reference_milliseconds / one.milliseconds:.1f} |"
            for one in engine.measurements
        ),
    ]
    return "\n".join(lines) + "\n"


def _report(page: str, parent: ModelSpec, engine: EngineSpec) -> str:
    """The parent's page, which is about the weights, with a sentence first on the engine (in place of an older one)."""
    said = " ".join(line for line in _accuracy(engine, parent) if line)
    note = html.escape(
        f"The figures on this page are those of the plain weights, as in version {parent.version}. Where it fits the"
        f" machine, the engine {engine.rung} ({engine.precision}) answers in their place. {said}"
    )
    body = re.sub(r'<p class="warn" id="engine">.*?</p>\n', "", page, flags=re.DOTALL)
    return body.replace("<main>\n", f'<main>\n<p class="warn" id="engine">{note}</p>\n', 1)


def _accuracy(engine: EngineSpec, spec: ModelSpec) -> list[str]:
    found: Any = engine.accuracy
    if found is None:
        return ["Its accuracy was not measured: it computes in float32 and only the order of sums differs.", ""]
    low, high = found.interval_points
    what = "Exact matches" if spec.thresholds else "Accuracy"
    return [
        f"{what} on {found.images} test images: {found.engine:.4f}, plain {found.reference:.4f}; lost"
        f" {found.loss_points:.2f} percentage points (95 % interval {low:.2f} to {high:.2f}), allowed"
        f" {found.budget_points:g}. No golden probability differs by more than {engine.golden_difference:.4f}.",
        "",
    ]
