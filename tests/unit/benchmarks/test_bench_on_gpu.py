"""The comparison on a GPU, as far as a machine without one can tell."""

import dataclasses
import json

import pytest
import torch

from benchmarks import growth, machine
from benchmarks.__main__ import RUNGS, find_device
from benchmarks.errors import BenchmarkError
from support.artifacts import write_artifact
from support.engines import change_engine, write_torch_engine
from training.optimize import rungs

pytestmark = pytest.mark.unit


def test_a_gpu_goes_by_both_words_and_is_asked_for_only_where_there_is_one():
    assert find_device("cpu") == "cpu"
    for word in ("cuda", "gpu"):
        if machine.gpus():
            assert find_device(word) == "cuda"
        else:
            with pytest.raises(BenchmarkError, match="no GPU"):
                find_device(word)
    with pytest.raises(BenchmarkError, match="no device 'tpu'"):
        find_device("tpu")


def test_every_device_has_rungs_that_are_packed_for_it():
    known = {rung.name: rung for rung in rungs.RUNGS}
    for device, names in RUNGS.items():
        assert all(device in known[name].devices and known[name].packed for name in names), device
    assert set(growth.WORKERS) == set(RUNGS)


def test_growth_is_measured_on_the_device_that_is_asked_for(tmp_path, capsys):
    artifact = write_artifact(tmp_path)
    growth.main([str(artifact), "0.01", "model", "tiny_cnn"])
    assert json.loads(capsys.readouterr().out)["images_per_second"] > 0
    found = write_torch_engine(artifact)
    change_engine(artifact, built_for=dataclasses.replace(found.built_for, device="cuda"))
    for curve, value in (("batch", "2"), ("model", "tiny_cnn")):
        arguments = [str(artifact), "0.01", curve, value, "--device", "cuda"]
        if torch.cuda.is_available():
            growth.main(arguments)
            continue
        # It comes as far as the GPU that is not there, where it had refused the engine as one for another device.
        with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
            growth.main(arguments)
