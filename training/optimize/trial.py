"""One rung in a process of its own, so that threads, memory and a crash are its own too.

    python -m training.optimize.trial JOB.json

A job either builds a rung (`build`) or opens it as a worker would and tries it (`trial`); the result is a file beside
it. The parent is `training.optimize.ladder`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch

from handlerlib import cores, engines, loading
from handlerlib.engine_spec import BuiltFor, EngineFile, Measurement, Package, TorchOptions
from handlerlib.errors import MarinaError
from handlerlib.spec import ModelSpec
from training import files, lifeline
from training.optimize import judge, measure, rungs
from training.optimize.judge import Golden
from training.optimize.rungs import Draft

DRAFT_FILE = "draft.json"
TRIAL_FILE = "trial.json"
ANSWERS_FILE = "answers.safetensors"
CHILD_SECONDS = 1800.0
"""How long one child may take."""
_LAST_WORDS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one child does."""

    what: Literal["build", "trial"]
    rung: str
    artifact: Path
    folder: Path
    """The rung's own: `engine/`, its log and its results."""
    data: Path | None
    """Safetensors with `test`, `targets` and `calibration`; None: there are no real images."""
    device: Literal["cpu", "cuda"]
    pairs: tuple[tuple[int, int], ...]
    """(batch, threads) to measure."""
    seconds: float
    """Per measurement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What a rung showed. Its answers on the test images, when there are any, lie beside it."""

    rung: str
    golden: Golden
    load_seconds: float
    """Opening the engine and its first answer, libraries included."""
    memory_mib: int
    """What that added to the process (proportional set size)."""
    engine_bytes: int
    measurements: tuple[Measurement, ...]


class ChildFailed(MarinaError):
    """A rung's process ended without a result; the message is its last word."""


def run(job: Job) -> None:
    """Do the job in a child. Raises ChildFailed with the reason that the child gave, or how it ended."""
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / f"{job.what}-job.json"
    path.write_text(json.dumps(dataclasses.asdict(job), default=str), encoding="utf-8")
    environment = {
        **os.environ,
        # As the server starts its workers: idle threads sleep.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCHINDUCTOR_CACHE_DIR": str(job.folder / "inductor"),
        "PYTHONWARNINGS": "ignore",
    }
    log = job.folder / f"{job.what}.log"
    command = [sys.executable, "-m", "training.optimize.trial", str(path)]
    with log.open("wb") as stream, lifeline.held() as pipe:
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=pipe,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=CHILD_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ChildFailed(f"no result within {CHILD_SECONDS:.0f} s") from None
    if done.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
        how = f"ended by signal {-done.returncode}: " if done.returncode < 0 else ""
        raise ChildFailed(how + lines[-1][:_LAST_WORDS])


def read_draft(folder: Path) -> Draft:
    """What `build` wrote."""
    value = json.loads((folder / DRAFT_FILE).read_text(encoding="utf-8"))
    packages = tuple(Package(**package) for package in value["built_for"].pop("packages"))
    features = tuple(value["built_for"].pop("cpu_features"))
    return Draft(
        rung=value["rung"],
        engine=value["engine"],
        precision=value["precision"],
        options=TorchOptions(**value["options"]),
        files=tuple(EngineFile(**file) for file in value["files"]),
        built_for=BuiltFor(**value["built_for"], cpu_features=features, packages=packages),
    )


def read_trial(folder: Path) -> Trial:
    """What `trial` wrote."""
    value = json.loads((folder / TRIAL_FILE).read_text(encoding="utf-8"))
    golden = value["golden"] | {"answers": tuple(tuple(row) for row in value["golden"]["answers"])}
    measurements = tuple(Measurement(**one) for one in value["measurements"])
    return Trial(**value | {"golden": Golden(**golden), "measurements": measurements})


def main(path: Path) -> None:
    """The child's own program; it ends with the process that started it."""
    lifeline.follow()
    value = json.loads(path.read_text(encoding="utf-8"))
    job = Job(
        **value
        | {
            "artifact": Path(value["artifact"]),
            "folder": Path(value["folder"]),
            "data": Path(value["data"]) if value["data"] else None,
            "pairs": tuple((batch, threads) for batch, threads in value["pairs"]),
        }
    )
    engines.use_float32(torch.device(job.device))
    (_build if job.what == "build" else _try)(job)


def _build(job: Job) -> None:
    spec = ModelSpec.load(job.artifact)
    network = loading.read_network(job.artifact, spec).to(job.device)
    calibration = _tensor(job, "calibration")
    draft = rungs.build(job.rung, network, spec, calibration, job.folder)
    files.write_text(job.folder / DRAFT_FILE, json.dumps(dataclasses.asdict(draft)))


def _try(job: Job) -> None:
    spec, draft = ModelSpec.load(job.artifact), read_draft(job.folder)
    all_cores = cores.usable()
    before, started = _pss(), time.perf_counter()
    device = torch.device(job.device)
    engine = rungs.open_engine(draft, job.folder, lambda: loading.read_network(job.artifact, spec), spec, device)
    engine(measure.pixels(spec.architecture, 1), all_cores)
    load_seconds, memory = time.perf_counter() - started, _pss() - before
    golden = judge.golden(engine, spec, job.artifact, all_cores)
    reference = engines.plain_engine(loading.read_network(job.artifact, spec).to(device), spec, device)
    measurements = measure.times(engine, reference, spec, job.pairs, seconds=job.seconds)
    x_NCHW = _tensor(job, "test")
    if x_NCHW is not None:
        answers = judge.answers(engine, x_NCHW, all_cores)
        files.write(
            job.folder / ANSWERS_FILE, lambda path: path.write_bytes(safetensors.torch.save({"answers": answers}))
        )
    trial = Trial(
        rung=job.rung,
        golden=golden,
        load_seconds=round(load_seconds, 3),
        memory_mib=round(memory / 2**20),
        engine_bytes=sum((job.folder / file.path).stat().st_size for file in draft.files),
        measurements=measurements,
    )
    files.write_text(job.folder / TRIAL_FILE, json.dumps(dataclasses.asdict(trial)))


def _tensor(job: Job, name: str) -> torch.Tensor | None:
    if job.data is None:
        return None
    with safetensors.safe_open(job.data, framework="pt") as opened:
        found: torch.Tensor = opened.get_tensor(name)
    return found


def _pss() -> int:
    """Bytes of this process, shared pages in proportion; 0 where the system does not tell."""
    try:
        text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def _explained(error: Exception) -> str:
    """One line: the reason under which the rung is dropped."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, MarinaError) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    import traceback

    try:
        main(Path(sys.argv[1]))
    except Exception as error:  # noqa: BLE001 - whatever stops a rung is the reason why it is dropped
        traceback.print_exc()
        sys.exit(_explained(error))
