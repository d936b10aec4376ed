"""Which engine answers, and that the plain weights answer, loudly, wherever the packed one cannot."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from handlerlib import engines, imaging, loading, telemetry
from handlerlib.engine_spec import TorchOptions, sha256_of
from handlerlib.errors import SpecError
from handlerlib.loading import LoadedModel
from handlerlib.spec import ModelSpec
from marina.java import METRICS_CONFIG
from support.artifacts import write_artifact
from support.engines import CPU, forged, photos, write_optimised, write_torch_engine


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_optimised(tmp_path_factory.mktemp("int8"))


@pytest.fixture
def artifact(int8: Path, tmp_path: Path) -> Path:
    return shutil.copytree(int8, tmp_path / "artifact")


def started(folder: Path) -> tuple[LoadedModel, float]:
    """As a worker starts."""
    model = loading.load(folder, CPU)

    def answer(data: bytes) -> torch.Tensor:
        return model.probabilities(imaging.batch([data], model.spec.preprocess, model.spec.limits))[0]

    return model, loading.self_test(model, answer, folder)


def test_the_packed_engine_answers_within_its_tolerance(int8: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model, worst = started(int8)
    assert (model.serving.engine, model.serving.packed, model.serving.fallback) == (
        "openvino-int8",
        "openvino-int8",
        None,
    )
    assert isinstance(model.engine, engines.OpenVinoEngine)
    # int8 is not float32: if it were, nothing would have been quantised.
    assert 1e-6 < worst <= (model.serving.tolerance or 0)
    assert [record.getMessage() for record in caplog.records] == ["tiny 1.1 is served by its engine openvino-int8"]
    assert loading.warm_up(model, [1, 4], threads=(1, 2)) == (1, 4)


def test_layout_threads_and_batch_change_nothing(int8: Path) -> None:
    model = loading.load(int8, CPU)
    x_BCHW = photos(5)
    laid_out = x_BCHW.contiguous(memory_format=torch.channels_last)
    expected = model.probabilities(x_BCHW, 1)
    assert expected.shape == (5, 3)
    assert expected.dtype == torch.float32
    assert torch.equal(model.probabilities(laid_out, 1), expected)
    assert torch.allclose(model.probabilities(x_BCHW, 2), expected, atol=1e-3)
    alone = torch.cat([model.probabilities(x_BCHW[row : row + 1], 1) for row in range(5)])
    assert torch.allclose(alone, expected, atol=1e-3)
    # The answer is the caller's own: the next batch does not write into it.
    kept = expected.clone()
    model.probabilities(photos(5).flip(0), 1)
    assert torch.equal(expected, kept)


def damage(folder: Path) -> None:
    path = folder / "engine" / "model.weights"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unfit(folder: Path) -> None:
    """Files that are those that were built, and that OpenVINO cannot read."""
    (folder / "engine" / "model.xml").write_text("<net/>")
    for number, name in enumerate(("model.xml", "model.weights")):
        forged(folder, f"files.{number}.sha256", sha256_of(folder / "engine" / name))


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("device", lambda folder: forged(folder, "built_for.device", "cuda")),
        ("machine", lambda folder: forged(folder, "built_for.machine", "riscv64")),
        ("cpu-feature", lambda folder: forged(folder, "built_for.cpu_features", ["avx1024"])),
        ("package-missing", lambda folder: forged(folder, "built_for.packages.0.name", "no-such-engine")),
        ("package-version", lambda folder: forged(folder, "built_for.packages.0.at_least", "2026.99")),
        ("files", damage),
        ("files", lambda folder: (folder / "engine" / "model.xml").unlink()),
        ("load", unfit),
        ("self-test", lambda folder: forged(folder, "tolerance", 1e-9)),
        ("spec", lambda folder: forged(folder, "tolerance", 7)),
    ],
)
def test_plain_weights_answer_where_the_engine_cannot(
    artifact: Path, caplog: pytest.LogCaptureFixture, reason: str, change: Callable[[Path], Any]
) -> None:
    change(artifact)
    with caplog.at_level(logging.INFO):
        model, worst = started(artifact)
    assert (model.serving.engine, model.serving.fallback) == ("plain", reason)
    assert isinstance(model.engine, loading.PlainEngine)
    assert worst < 1e-6
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "tiny 1.1: the plain weights answer instead of the engine" in record.getMessage()
    assert record.getMessage().endswith(f"({reason})")


def test_the_switch(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARINA_ENGINE", "plain")
    model, _ = started(artifact)
    assert (model.serving.engine, model.serving.fallback) == ("plain", "switched-off")
    monkeypatch.setenv("MARINA_ENGINE", "plian")
    with pytest.raises(loading.BadSwitch, match="MARINA_ENGINE is 'plian'"):
        loading.load(artifact, CPU)


def test_damaged_plain_weights_stop_the_worker_only_when_they_are_needed(artifact: Path) -> None:
    (artifact / "weights.safetensors").write_bytes(b"")
    assert started(artifact)[0].serving.engine == "openvino-int8"
    damage(artifact)
    with pytest.raises(SpecError, match=r"weights.safetensors cannot be read"):
        loading.load(artifact, CPU)


@pytest.mark.parametrize(
    ("options", "precision", "allowed"),
    [
        ({"channels_last": True, "fold": True}, "fp32", 1e-4),
        ({"channels_last": True, "fold": True}, "bf16", 0.05),
        ({"channels_last": True, "fold": True, "autocast": True}, "bf16", 0.05),
    ],
)
def test_torch_engines(tmp_path: Path, options: dict[str, bool], precision: Any, allowed: float) -> None:
    artifact = write_artifact(tmp_path)
    reference = loading.load(artifact, CPU).probabilities(photos(6), 1)
    spec = ModelSpec.load(artifact)
    engine = engines.TorchEngine(
        loading.read_network(artifact, spec),
        spec.preprocess,
        CPU,
        precision=precision,
        options=TorchOptions(**options),
    )
    for threads in (1, 2):
        assert torch.allclose(engine(photos(6), threads), reference, atol=allowed)
        assert torch.get_num_threads() == threads


def test_an_engine_of_torch_needs_no_files(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path)
    write_torch_engine(artifact)
    model, worst = started(artifact)
    assert model.serving.engine == "torch-folded"
    assert worst <= 1e-4


@pytest.mark.parametrize(
    ("threads", "cores", "step"), [(1, 2, 1), (2, 2, 2), (5, 2, 2), (0, 2, 1), (6, 16, 4), (12, 12, 12), (11, 12, 8)]
)
def test_thread_steps(threads: int, cores: int, step: int) -> None:
    assert engines.thread_step(threads, cores) == step


def test_openvino_is_imported_without_its_usage_reports() -> None:
    """In a process of its own: here another test may have imported it for a reason of its own."""
    code = (
        "import sys; from handlerlib import engines; engines.import_openvino()\n"
        "print(sys.modules['openvino_telemetry'], [name for name in sys.modules if name.startswith('openvino_telemetry.')])"
    )
    path = str(Path(engines.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "None []", done.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TorchServe leaves metrics.yaml open
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_metrics_name_the_engine_and_the_reason(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = MetricsCacheYamlImpl(str(METRICS_CONFIG))
    cache.initialize_cache()

    def sent() -> list[str]:
        caplog.clear()
        model = loading.load(artifact, CPU)
        with caplog.at_level(logging.INFO):
            telemetry.Reporter(model.spec, cache, model.serving)
        found = (
            re.match(r"\[METRICS\](marina_engine\w*)\.\w+:(\d)\|#(.*)\|#type:GAUGE", one) for one in caplog.messages
        )
        return [f"{match[1]} {match[3]} {match[2]}" for match in found if match]

    assert sent() == [
        "marina_engine model:tiny,version:1.1,engine:openvino-int8 1",
        "marina_engine model:tiny,version:1.1,engine:plain 0",
    ]
    forged(artifact, "built_for.machine", "riscv64")
    assert sent() == [
        "marina_engine model:tiny,version:1.1,engine:plain 1",
        "marina_engine model:tiny,version:1.1,engine:openvino-int8 0",
        "marina_engine_fallback model:tiny,version:1.1,reason:machine 1",
    ]


def test_float32_on_a_gpu_is_float32(tmp_path: Path) -> None:
    """In a process of its own: the settings are torch's and last as long as it."""
    code = (
        "import torch; from pathlib import Path; from handlerlib import loading\n"
        "backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul\n"
        "before = [one.fp32_precision for one in backends]\n"
        "loading.engines.use_float32(torch.device('cpu'))\n"
        "assert [one.fp32_precision for one in backends] == before\n"
        "try: loading.load(Path('nowhere'), torch.device('cuda:0'))\n"
        "except loading.SpecError: pass\n"
        "print(*(one.fp32_precision for one in backends), torch.backends.cudnn.allow_tf32)"
    )
    path = str(Path(engines.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.split() == ["ieee", "ieee", "False"], done.stderr


class Noted(TorchDispatchMode):
    """What torch is asked to do: the operation, its first tensor's type, and whether it may go on meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if args and isinstance(args[0], torch.Tensor):
            self.seen.append((func.overloadpacket.__name__, args[0].dtype, bool(options.get("non_blocking"))))
        return func(*args, **options)


@pytest.mark.parametrize("kind", ["plain", "torch"])
def test_bytes_are_moved_without_waiting_and_normalised_where_the_network_is(int8: Path, kind: str) -> None:
    """On a device that computes nothing, and from which no answer comes back."""
    spec, meta = ModelSpec.load(int8), torch.device("meta")
    network = loading.read_network(int8, spec).to(meta)
    engine: loading.Engine = engines.PlainEngine(network, spec.preprocess, meta)
    if kind == "torch":
        engine = engines.TorchEngine(network, spec.preprocess, meta, precision="fp32", options=TorchOptions())
    x_BCHW = imaging.stack(list(photos(2)))
    imaging.normalise(x_BCHW.to(meta), spec.preprocess)  # mean and deviation are there from the second batch on
    with pytest.raises(RuntimeError, match="meta"), Noted() as noted:
        engine(x_BCHW, 1)
    assert noted.seen[:4] == [
        ("to", torch.uint8, True),
        ("to", torch.uint8, False),
        ("sub_", torch.float32, False),
        ("div_", torch.float32, False),
    ]


def test_plain_weights_lie_on_a_gpu_as_its_batches_do(int8: Path) -> None:
    spec = ModelSpec.load(int8)
    for device, layout in ((CPU, torch.contiguous_format), (torch.device("cuda"), torch.channels_last)):
        network = loading.read_network(int8, spec)
        engines.plain_engine(network, spec, device)
        wide = [one for one in network.parameters() if one.ndim == 4 and one.shape[1] > 1 and one.shape[-1] > 1]
        assert wide
        assert all(one.is_contiguous(memory_format=layout) for one in wide)


def test_a_warm_up_looks_like_a_batch_of_photos(int8: Path) -> None:
    model = loading.load(int8, CPU)
    seen: list[torch.Tensor] = []

    def note(x_BCHW: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        seen.append(x_BCHW)
        return answers

    model.engine = Odd(model.engine, note)
    loading.warm_up(model, [3])
    batch = imaging.stack(list(photos(3)))
    assert [(one.shape, one.stride(), one.dtype) for one in seen] == [(batch.shape, batch.stride(), batch.dtype)]


class Odd:
    """An engine whose answers are right until something is done to them."""

    def __init__(self, inner: loading.Engine, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self._inner, self._change = inner, change

    def __call__(self, x_BCHW: torch.Tensor, threads: int) -> torch.Tensor:
        return self._change(x_BCHW, self._inner(x_BCHW, threads))


def with_engine(
    folder: Path, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[LoadedModel, Callable[[bytes], torch.Tensor]]:
    """A loaded model whose engine is odd, and what asks it for one image."""
    model = loading.load(folder, CPU)
    model.engine = Odd(model.engine, change)
    return model, lambda data: model.probabilities(imaging.batch([data], model.spec.preprocess, model.spec.limits), 1)[
        0
    ]


def no_batches(x_BCHW: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    if len(x_BCHW) > 1:
        raise RuntimeError("no such batch")
    return answers


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_batches, "RuntimeError: no such batch"),
        (lambda x_BCHW, answers: answers if len(answers) == 1 else answers.roll(1, 0), "golden sample golden/"),
    ],
    ids=["fails", "mixes them up"],
)
def test_an_engine_that_cannot_do_batches_does_not_serve(
    int8: Path, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], said: str
) -> None:
    model, answer = with_engine(int8, change)
    loading.self_test(model, answer, int8, batch=4)
    assert (model.serving.engine, model.serving.fallback) == ("plain", "self-test")
    assert said in model.serving.detail


def test_an_engine_that_fails_while_it_warms_up_does_not_serve(int8: Path) -> None:
    model, answer = with_engine(int8, no_batches)
    warmed = []

    def prepare() -> None:
        loading.warm_up(model, [1, 4])
        warmed.append(model.serving.engine)

    assert loading.self_test(model, answer, int8, prepare=prepare) < 1e-6
    assert warmed == ["plain"]
    assert model.serving.detail == "RuntimeError: no such batch"


def test_an_engine_stays_near_what_it_answered_when_it_was_judged(
    artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def moved(x_BCHW: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        return answers + torch.tensor([0.04, -0.04, 0.0])

    forged(artifact, "tolerance", 0.3)
    model, answer = with_engine(artifact, moved)
    loading.self_test(model, answer, artifact, batch=4)
    assert (model.serving.engine, model.serving.fallback) == ("plain", "self-test")
    assert "of the engine's own answers, probability of" in model.serving.detail
    # Older ones kept no answers of their own.
    forged(artifact, "own_answers", [])
    caplog.clear()
    with caplog.at_level(logging.INFO):
        model, answer = with_engine(artifact, moved)
        loading.self_test(model, answer, artifact, batch=4)
    assert model.serving.engine == "openvino-int8"
    assert "brings no answers of its own, and is held to 0.3" in caplog.text
    # Those of other samples are none of these.
    forged(artifact, "own_answers", [[0.5, 0.5]])
    model, worst = started(artifact)
    assert (model.serving.fallback, worst < 1e-6) == ("self-test", True)
    assert model.serving.detail.startswith("own_answers must be rows of [3, 3, 3] numbers")


@pytest.mark.parametrize(("device", "number"), [("cuda:1", 1), ("cuda", -1), ("cpu", -1)])
def test_a_compiled_package_is_opened_on_its_workers_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, number: int
) -> None:
    opened: list[int] = []
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path, device_index: opened.append(device_index))
    engines.AotiEngine(Path("model.pt2"), torch.device(device))
    assert opened == [number]
