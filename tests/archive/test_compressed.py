"""A pruned model as an archive: TorchServe's own loader builds the small network and it answers as it was judged."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import safetensors.torch
import torch

from handlerlib import architectures, imaging
from handlerlib.spec import ModelSpec
from marina import archive, verify
from training.compress import channels


def pruned(artifact: Path, target: Path) -> Path:
    """The artifact with half of its channels, as `marina compress` would write it."""
    shutil.copytree(artifact, target)
    spec = ModelSpec.load(target)
    network = architectures.build(spec.architecture)
    network.load_state_dict(safetensors.torch.load_file(target / "weights.safetensors"))
    groups = channels.groups(network, spec.architecture)
    keep = [(one, channels.least_important(channels.importance(network, one, "norm"), 0.5)) for one in groups]
    smaller, shape = channels.prune(network.eval(), spec.architecture, keep)
    safetensors.torch.save_file(dict(smaller.eval().state_dict()), target / "weights.safetensors")

    def answer(file: str) -> tuple[float, ...]:
        x_BCHW = imaging.batch([(target / file).read_bytes()], spec.preprocess, spec.limits)
        with torch.inference_mode():
            return tuple(smaller(imaging.normalise(x_BCHW, spec.preprocess)).softmax(dim=1)[0].tolist())

    samples = tuple(dataclasses.replace(one, probabilities=answer(one.file)) for one in spec.golden.samples)
    golden = dataclasses.replace(spec.golden, samples=samples)
    changed = dataclasses.replace(spec, architecture=shape, golden=golden)
    (target / "model_spec.json").write_text(changed.to_json())
    return target


def test_a_pruned_artifact_packs_and_answers_as_it_was_judged(artifact: Path, handlers: Path, tmp_path: Path) -> None:
    folder = pruned(artifact, tmp_path / "tiny" / "1.1")
    packed = archive.pack(folder, handlers=handlers, destination=tmp_path / "store")
    report = verify.verify(packed.path)
    assert report.passed, report.findings
    whole = (artifact / "weights.safetensors").stat().st_size
    assert (folder / "weights.safetensors").stat().st_size < 0.5 * whole


def test_weights_of_other_widths_are_refused(artifact: Path, handlers: Path, tmp_path: Path) -> None:
    folder = pruned(artifact, tmp_path / "tiny" / "1.1")
    shutil.copyfile(artifact / "weights.safetensors", folder / "weights.safetensors")
    report = verify.verify(archive.pack(folder, handlers=handlers, destination=tmp_path / "store").path)
    assert any("does not fit architecture 'tiny_cnn'" in finding.message for finding in report.findings)
