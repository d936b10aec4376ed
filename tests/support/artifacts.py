"""A small artifact with seeded random weights: what export would write, in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from handlerlib import architectures, imaging, tasks
from handlerlib.spec import (
    GOLDEN_FOLDER,
    WEIGHTS_FILE,
    Architecture,
    Golden,
    GoldenSample,
    Limits,
    ModelSpec,
    Preprocess,
    Scaling,
    Task,
)
from support import images


def write_artifact(
    folder: Path,
    *,
    name: str = "tiny",
    version: str = "1.0",
    seed: int = 0,
    limits: Limits | None = None,
    task: Task = "multi-class",
) -> Path:
    """Write `folder/NAME/VERSION` for three classes (or labels, or targets) of 16x16 RGB pictures and return it."""
    target = folder / name / version
    (target / GOLDEN_FOLDER).mkdir(parents=True)
    limits = limits or Limits(max_bytes=200_000, max_pixels=1_000_000, max_instances=8, top_k=3, max_top_k=100)
    architecture = Architecture(name="tiny_cnn", channels=3, height=16, width=16, classes=len(images.LABELS))
    preprocess = Preprocess(channels=3, height=16, width=16, resize="cover", mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.manual_seed(seed)
    network = architectures.build(architecture).eval()
    safetensors.torch.save_file(dict(network.state_dict()), target / WEIGHTS_FILE)
    scaling = tuple(Scaling(mean=10.0 * index, scale=2.0 + index) for index in range(3)) if task == "regression" else ()
    finish, field = tasks.of_task(task, scaling), "values" if scaling else "probabilities"
    samples = []
    for index, label in enumerate(images.LABELS):
        data = images.photo(index)
        (target / GOLDEN_FOLDER / f"{index}.png").write_bytes(data)
        with torch.inference_mode():
            row = finish(network(imaging.normalise(imaging.batch([data], preprocess, limits), preprocess)))[0]
        outputs: Any = {field: tuple(row.tolist())}
        samples.append(GoldenSample(file=f"{GOLDEN_FOLDER}/{index}.png", label=label, **outputs))
    spec = ModelSpec(
        name=name,
        version=version,
        handler="image_classifier",
        architecture=architecture,
        preprocess=preprocess,
        task=task,
        labels=images.LABELS,
        thresholds=(0.4, 0.5, 0.6) if task == "multi-label" else (),
        scaling=scaling,
        limits=limits,
        golden=Golden(tolerance=1e-4, samples=tuple(samples)),
    )
    (target / "model_spec.json").write_text(spec.to_json())
    (target / "metrics.json").write_text(json.dumps({"test_accuracy": 1 / 3}) + "\n")
    (target / "provenance.json").write_text(json.dumps({"run": f"{name}-test", "recipe": {}}) + "\n")
    (target / "MODEL_CARD.md").write_text(f"# {name} {version}\n\nA test model with random weights.\n")
    return target
