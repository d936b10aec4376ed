"""The comparison's own machinery on the real server: a limit without a server, Marina beside it, and a figure."""

import dataclasses
import itertools
import os
import sys
from pathlib import Path

import pytest

from benchmarks import answers, figures, load, measure, systems
from benchmarks.errors import NotAvailable
from benchmarks.measure import Plan
from benchmarks.run import EQUAL, expected_answers, program
from benchmarks.systems import PLAIN, Launch, Layout, Place, Setup
from support import images
from support.artifacts import write_artifact

pytestmark = [pytest.mark.contract, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("comparison")
    return Place(folder / "cache", folder, {PLAIN: write_artifact(folder / "artifacts")})


@pytest.fixture(scope="module")
def photos(place) -> Path:
    folder = place.scratch / "photos"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.jpg").write_bytes(images.photo(index, "JPEG", 48, 64))
    return folder


@pytest.fixture(scope="module")
def expected(place, photos) -> list[dict[str, float]]:
    return expected_answers(place, photos)[PLAIN]


def test_the_limit_and_marina_give_rows_that_become_a_figure(place, photos, expected):
    arguments = ["limit", str(place.models[PLAIN]), str(photos), "--threads", "1", "--seconds", "0.5"]
    limit = program(
        "benchmarks.inprocess",
        arguments,
        systems.clean_environment(PYTHONPATH=systems.python_path()),
        place.scratch,
        120,
    )
    assert limit["images_per_second"] > 0

    setup, layout = Setup("marina", "marina"), Layout(workers=1, threads=1, batch=4)
    bodies = [path.read_bytes() for path in sorted(photos.iterdir())]
    found = measure.visit(
        systems.launch(setup, layout, place),
        bodies,
        Plan((1, 32), seconds=1.0, warm_up=0.0),
        load.generator(),
        place.scratch / "marina.log",
        lambda got: answers.compare(expected, got, EQUAL),
    )
    assert found.verdict is not None and found.verdict.equal
    assert [row.connections for row in found.rows] == [1, 32]
    assert all(row.good > 0 and row.failed == 0 and row.pss_mib > 0 for row in found.rows)

    visit = {
        "setup": setup.key, "phase": "visit", "ready_seconds": found.ready_seconds, "ready_pss_mib": found.ready_pss_mib,
        "answers": {"equal": True}, "layout": dataclasses.asdict(layout),
        "rows": [dataclasses.asdict(row) for row in found.rows],
    }  # fmt: skip
    rows = {"rung": PLAIN, "lone_p50_ms": 1.0, **limit}
    record = {"visits": [visit], "limits": [rows], "echo": [], "text": [], "reasons": {}}
    ratio = figures.figures(record)[0]["throughput_at_32_over_limit"]
    assert ratio == round(found.rows[1].requests_per_second / limit["images_per_second"], 3)


def test_a_server_that_does_not_start_is_listed_with_its_last_words(place):
    command = (sys.executable, "-c", "raise SystemExit('no licence')")
    launch = Launch(command, dict(os.environ), place.scratch, "http://127.0.0.1:9/", systems.raw, systems.parse_flat)
    with pytest.raises(NotAvailable, match="no licence"):
        measure.visit(launch, [b"x"], Plan((1,), 1.0, 0.0), "wrk", place.scratch / "broken.log")


def test_another_model_behind_the_same_address_is_found_out(place, photos, expected, tmp_path):
    other = dataclasses.replace(place, scratch=tmp_path, models={PLAIN: write_artifact(tmp_path / "a", seed=1)})
    got = expected_answers(other, photos)[PLAIN]
    assert not answers.compare(expected, got, EQUAL).equal
    assert all(itertools.starmap(lambda one, two: one.keys() == two.keys(), zip(expected, got, strict=True)))
