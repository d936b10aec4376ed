"""Deploy, roll back, retire, again and again: processes, sockets, descriptors and temp files are what they were before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.chaos import endurance, resources
from benchmarks.chaos.stack import marina_serve, running
from marina import archive, store
from support.artifacts import write_artifact
from support.gateway import require_haproxy

ROOT = Path(__file__).resolve().parents[2]
CYCLES = 2


@pytest.mark.timeout(600)
def test_cycles_leave_nothing_behind(tmp_path: Path) -> None:
    require_haproxy()
    packed = {
        version: archive.pack(
            write_artifact(tmp_path, version=version, seed=seed),
            handlers=ROOT / "handlers",
            destination=tmp_path / version,
        )
        for seed, version in enumerate(("1.0", "2.0"))
    }
    models = tmp_path / "store"
    models.mkdir()
    first = models / packed["1.0"].path.name
    os.link(packed["1.0"].path, first)
    store.publish(models, archive.Archive(first, "tiny", "1.0", packed["1.0"].sha256, packed["1.0"].size))
    with (
        resources.temp_folder() as folder,
        running(folder, "tiny", marina_serve(models), store=models, servers=1) as stack,
    ):
        found = endurance.cycles(stack, packed["2.0"].path, CYCLES, folder, before=1)
    assert found.details["grown"]["processes"] == {}, found.measured
    for name in ("descriptors", "sockets", "temp_files"):
        assert found.details["grown"][name] <= 0, found.measured
