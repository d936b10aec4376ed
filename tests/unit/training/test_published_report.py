"""The report of an artifact that got an engine says of which weights its figures are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from handlerlib import loading
from handlerlib.engine_spec import EngineSpec
from handlerlib.spec import ModelSpec
from support.artifacts import write_artifact
from training.html_report import REPORT_FILE
from training.optimize import judge, publish, rungs

PAGE = "<!doctype html>\n<body>\n<main>\n<h2>Figures</h2>\n</main>\n"


def engine_of(artifact: Path, built: Path) -> EngineSpec:
    """A lossy engine without files, judged on answers of which one in ten is wrong."""
    spec = ModelSpec.load(artifact)
    draft = rungs.build("torch-bf16", loading.read_network(artifact, spec), spec, None, built)
    right_N = torch.zeros(20, dtype=torch.long)
    plain_NK = torch.tensor([[0.9, 0.1]] * 19 + [[0.1, 0.9]])
    engine_NK = torch.tensor([[0.9, 0.1]] * 18 + [[0.1, 0.9]] * 2)
    values = {field.name: getattr(draft, field.name) for field in dataclasses.fields(draft)}
    accuracy = judge.compare(plain_NK, engine_NK, right_N).record(budget=10.0)
    return EngineSpec(**values, tolerance=0.01, golden_difference=0.001, accuracy=accuracy)


def test_the_report_travels_with_the_engine_and_names_it(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path)
    (artifact / REPORT_FILE).write_text(PAGE)
    engine = engine_of(artifact, tmp_path / "built")
    page = (publish.with_engine(artifact, engine, tmp_path / "built", tmp_path, run="a") / REPORT_FILE).read_text()
    assert "plain weights, as in version 1.0" in page
    assert "engine torch-bf16 (bf16) answers" in page
    assert "Accuracy on 20 test images: 0.9000, plain 0.9500; lost 5.00 percentage points" in page
    assert page.replace(page[page.index("<p ") : page.index("<h2>")], "") == PAGE


def test_the_next_engine_takes_the_sentence_of_the_one_before(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path)
    (artifact / REPORT_FILE).write_text(PAGE)
    first = publish.with_engine(artifact, engine_of(artifact, tmp_path / "a"), tmp_path / "a", tmp_path, run="a")
    engine = dataclasses.replace(engine_of(first, tmp_path / "b"), accuracy=None, precision="fp32")
    page = (publish.with_engine(first, engine, tmp_path / "b", tmp_path, run="b") / REPORT_FILE).read_text()
    assert page.count('id="engine"') == 1
    assert f"as in version {ModelSpec.load(first).version}." in page
    assert "Its accuracy was not measured" in page


def test_an_artifact_without_a_report_gets_none(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path)
    engine = engine_of(artifact, tmp_path / "built")
    assert not (publish.with_engine(artifact, engine, tmp_path / "built", tmp_path, run="a") / REPORT_FILE).exists()
