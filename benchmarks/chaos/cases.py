"""What is served and sent: two versions of one model, real images with the right answers of both, damaged images.

    python -m benchmarks.chaos.cases FOLDER      (a process of its own: it loads torch, the harness does not)

The images are scikit-learn's scanned digits as PNG, so that a fresh clone needs no download. The network is the
demonstration's on images of three times the size: what a request costs shall be the model, so that the load generator,
which shares the machine, and the refusing of what is too much are small beside it. What was made is kept, and found again
while the code that makes it is the same.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError
from marina.loadgen import Check, Payload

ROOT = Path(__file__).resolve().parents[2]
MODEL = "chaos_digits"
VERSIONS = ("1.0", "2.0")
IMAGES = 100
"""So many different ones are sent in turn; a damaged one takes the place of every hundredth or tenth."""
_CASES_FILE = "cases.json"
_MADE_BY = ("handlers", "training", "marina/archive.py", "marina/model_config.py", "benchmarks/chaos/cases.py")
_SETTINGS = (f"name={MODEL}", "data.image_size=48", "train.epochs=3", "train.batch_size=16")
_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Cases:
    """Built archives and what their answers are."""

    archives: dict[str, Path]
    """Version -> archive."""
    images: tuple[bytes, ...]
    expected: dict[str, list[list[float]]]
    """Version -> per image the probability of every class."""
    tolerance: float

    def payloads(self, damaged_every: int = 0) -> tuple[Payload, ...]:
        """The images in turn; with `damaged_every`, each so-manieth is a damaged one."""
        return tuple(
            Payload(body=damage(body, index) if _is_damaged(index, damaged_every) else body, content_type=_TYPE)
            for index, body in enumerate(self.images)
        )

    def check(self, damaged_every: int = 0) -> Check:
        """That every answer is the one of the version that it names, for the very image that was sent."""
        damaged = [index for index in range(len(self.images)) if _is_damaged(index, damaged_every)]
        settings = {"expected": self.expected, "tolerance": self.tolerance, "refused": damaged}
        return Check("benchmarks.chaos.checks:of_its_version", settings)


def damage(body: bytes, seed: int) -> bytes:
    """Cut off, overwritten in the middle, or no image at all: what broken uploads look like."""
    draw = random.Random(seed)
    kind = draw.randrange(3)
    if kind == 0:
        return body[: max(20, len(body) // 3)]
    if kind == 1:
        middle = len(body) // 2
        return body[: middle - 16] + draw.randbytes(32) + body[middle + 16 :]
    return b"<html>" + draw.randbytes(100)


def _is_damaged(index: int, every: int) -> bool:
    return every > 0 and index % every == every - 1


def prepare(folder: Path) -> Cases:
    """Train, pack and ask what is not there yet. Raises BenchmarkError with the last words of what failed."""
    value = _found(folder / _CASES_FILE)
    if value is None:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.chaos.cases", str(folder)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            words = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise BenchmarkError(f"the model cannot be made: {words}", remedy="see the message; then try again")
        value = json.loads((folder / _CASES_FILE).read_text())
    return Cases(
        archives={version: Path(path) for version, path in value["archives"].items()},
        images=tuple(base64.b64decode(text) for text in value["images"]),
        expected=value["expected"],
        tolerance=value["tolerance"],
    )


def _found(file: Path) -> dict[str, Any] | None:
    """What an earlier run has made, when the code is still the same."""
    try:
        value: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    there = all(Path(path).is_file() for path in value["archives"].values())
    return value if there and value.get("made_by") == _made_by() else None


def _made_by() -> str:
    """Digest of the code that trains and packs."""
    digest = hashlib.sha256()
    for place in _MADE_BY:
        path = ROOT / place
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".toml", ".yaml"):
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def main(arguments: Sequence[str]) -> None:
    """Leave `cases.json` in the folder."""
    import torch

    from handlerlib import imaging
    from handlerlib.loading import load
    from marina import archive
    from training import config, pipeline
    from training.progress import silent

    folder = Path(arguments[0])
    # Exported anew: a version that is there may be of another run, and versions never change.
    shutil.rmtree(folder / "artifacts", ignore_errors=True)
    value: dict[str, Any] = {"made_by": _made_by(), "archives": {}, "expected": {}}
    images: list[bytes] = []
    for seed, version in enumerate(VERSIONS):
        recipe = config.load_recipe("digits", [*_SETTINGS, f"version={version}", f"seed={seed}"])
        trained = pipeline.train(recipe, runs=folder / "runs", artifacts=folder / "artifacts", report=silent)
        packed = archive.pack(trained.artifact, handlers=ROOT / "handlers", destination=folder / "built")
        value["archives"][version] = str(packed.path)
        if not images:  # the first version's: which images are for testing depends on the seed
            images += [sample.data for sample in itertools.islice(pipeline.test_samples(trained.artifact), IMAGES)]
        model = load(trained.artifact, torch.device("cpu"))
        found = model.probabilities(imaging.batch(images, model.spec.preprocess, model.spec.limits))
        value["expected"][version] = [[float(item) for item in row] for row in found]
        value["tolerance"] = model.spec.golden.tolerance
    value["images"] = [base64.b64encode(data).decode() for data in images]
    (folder / _CASES_FILE).write_text(json.dumps(value))


if __name__ == "__main__":
    main(sys.argv[1:])
