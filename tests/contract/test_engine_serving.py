"""An optimised archive in a real TorchServe: its engine answers, and beside it one whose engine does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from handlerlib import imaging, loading
from handlerlib.spec import ModelSpec
from marina import archive, golden, store
from marina.client import InferenceClient
from marina.server import Server
from support import images
from support.engines import CPU, forged, write_optimised
from support.torchserve import eventually, running
from training.optimize import judge

SEEDS = range(12)


@dataclass(frozen=True, slots=True)
class Served:
    server: Server
    fits: Path
    unfit: Path

    def engines(self) -> set[tuple[str, str, str, float]]:
        """(metric, model, its last label, its value) of what the workers announced."""
        text = requests.get(f"{self.server.metrics_url}/metrics", timeout=10).text
        line = r'^(marina_engine\w*)\{model="(\w+)",version="1.1",\w+="([\w-]+)",[^}]*\} (\S+)'
        return {(*found[:3], float(found[3])) for found in re.findall(line, text, re.MULTILINE)}

    def differences(self, name: str, engine: loading.Engine, spec: ModelSpec) -> list[float]:
        """Per photo, how far the served probabilities are from those of an engine in this process."""
        worst = []
        with InferenceClient(self.server.inference_url) as client:
            for seed in SEEDS:
                data = images.photo(seed)
                (labels,) = client.predict(name, data, top_k=3).predictions
                (row,) = engine(imaging.batch([data], spec.preprocess, spec.limits), 1).tolist()
                worst.append(max(abs(label.probability - row[label.index]) for label in labels))
        return worst


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, handlers: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("engines")
    fits, unfit = write_optimised(folder, name="fits"), write_optimised(folder, name="unfit")
    forged(unfit, "built_for.cpu_features", ["avx1024"])
    packed = [archive.pack(one, handlers=handlers, destination=folder / "store") for one in (fits, unfit)]
    for one in packed:
        store.publish(folder / "store", one)
    with running(store.to_serve(packed)) as server:
        yield Served(server, fits, unfit)


def test_the_engine_answers(served: Served) -> None:
    model = loading.load(served.fits, CPU)
    plain = loading.PlainEngine(loading.read_network(served.fits, model.spec), model.spec.preprocess, CPU)
    assert max(served.differences("fits", model.engine, model.spec)) <= 1e-4
    # Were the plain weights to answer, these would be zero.
    assert 1e-3 < max(served.differences("fits", plain, model.spec)) < judge.CAPS["int8"]


def test_plain_weights_answer_where_it_does_not_fit(served: Served) -> None:
    model = loading.load(served.unfit, CPU)
    assert isinstance(model.engine, loading.PlainEngine)
    assert max(served.differences("unfit", model.engine, model.spec)) <= 1e-6
    assert "unfit 1.1: the plain weights answer instead of the engine openvino-int8: this processor lacks avx1024" in (
        served.server.log_tail(400)
    )


def test_metrics_say_which_engine_answers(served: Served) -> None:
    expected = {
        ("marina_engine", "fits", "openvino-int8", 1.0),
        ("marina_engine", "fits", "plain", 0.0),
        ("marina_engine", "unfit", "plain", 1.0),
        ("marina_engine", "unfit", "openvino-int8", 0.0),
        ("marina_engine_fallback", "unfit", "cpu-feature", 1.0),
    }
    eventually(lambda: served.engines() == expected, f"the metrics {expected}")


def test_the_golden_proof_takes_both(served: Served) -> None:
    with InferenceClient(served.server.inference_url) as client:
        for model in served.server.expected():
            golden.prove(model, client)
