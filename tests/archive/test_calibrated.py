"""A model with a temperature as an archive: TorchServe's own loader answers the golden samples at that temperature."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from handlerlib.calibration import soften
from handlerlib.spec import ModelSpec
from marina import archive, verify


def warm(artifact: Path, target: Path, *, golden_at: float, temperature: float) -> Path:
    """The artifact with a temperature, its golden answers at one that may be another."""
    shutil.copytree(artifact, target)
    spec = ModelSpec.load(target)
    samples = tuple(
        dataclasses.replace(one, probabilities=tuple(soften(torch.tensor([one.probabilities]), golden_at)[0].tolist()))
        for one in spec.golden.samples
    )
    changed = dataclasses.replace(
        spec, temperature=temperature, golden=dataclasses.replace(spec.golden, samples=samples)
    )
    (target / "model_spec.json").write_text(changed.to_json())
    return target


def test_a_model_with_a_temperature_packs_and_answers_at_it(artifact: Path, handlers: Path, tmp_path: Path) -> None:
    folder = warm(artifact, tmp_path / "tiny" / "1.0", golden_at=1.8, temperature=1.8)
    report = verify.verify(archive.pack(folder, handlers=handlers, destination=tmp_path / "store").path)
    assert report.passed, report.findings


def test_golden_answers_of_another_temperature_are_refused(artifact: Path, handlers: Path, tmp_path: Path) -> None:
    folder = warm(artifact, tmp_path / "tiny" / "1.0", golden_at=1.0, temperature=1.8)
    report = verify.verify(archive.pack(folder, handlers=handlers, destination=tmp_path / "store").path)
    assert not report.passed
    assert any("probability of" in finding.message for finding in report.findings), report.findings
