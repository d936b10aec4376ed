"""Each system gets the photo in its own wrapping, and its answer is read out of its own wrapping."""

import base64
import email
import json
from pathlib import Path

import pytest

from benchmarks import systems
from benchmarks.echo import systems as echo
from benchmarks.systems import PEERS, PLAIN, Layout, Place, Setup
from marina import model_config, store, tune_config
from marina.model_config import CONFIG_FILE
from marina.server import Server
from support.artifacts import write_artifact

pytestmark = pytest.mark.unit

MARINA_CAT = {"label": "cat", "index": 3, "probability": 0.9}
MARINA_DOG = {"label": "dog", "index": 5, "probability": 0.1}
PHOTO = b"\xff\xd8 a photo \r\n--with-a-boundary\x00"


def test_a_form_holds_the_photo_unchanged_under_its_field():
    body = systems.multipart("image")(PHOTO)
    message = email.message_from_bytes(b"Content-Type: " + body.content_type.encode() + b"\r\n\r\n" + body.data)
    (part,) = message.get_payload()
    assert part.get_param("name", header="Content-Disposition") == "image"
    assert part.get_payload(decode=True) == PHOTO


def test_the_open_inference_protocol_carries_base64():
    document = json.loads(systems.v2_json(PHOTO).data)
    assert base64.b64decode(document["inputs"][0]["data"][0]) == PHOTO


def test_its_binary_form_has_a_header_of_one_length_for_all_photos():
    small, large = systems.v2_binary(b"x"), systems.v2_binary(b"x" * 1_000_000)
    assert small.headers == large.headers  # wrk sends one set of headers
    length = int(large.headers["Inference-Header-Content-Length"])
    document = json.loads(large.data[:length])
    rest = large.data[length:]
    assert document["inputs"][0]["parameters"]["binary_data_size"] == len(rest)
    assert int.from_bytes(rest[:4], "little") == len(rest) - 4


@pytest.mark.parametrize(
    ("parse", "document"),
    [
        (systems.parse_flat, {"cat": 0.9, "dog": 0.1}),
        (systems.parse_flat, [{"cat": 0.9, "dog": 0.1}]),
        (
            systems.parse_marina,
            {"predictions": [[{"label": "cat", "probability": 0.9}, {"label": "dog", "probability": 0.1}]]},
        ),
        (systems.parse_v2, {"outputs": [{"data": ['{"cat": 0.9, "dog": 0.1}']}]}),
        (systems.parse_v2, {"outputs": [{"data": [['{"cat": 0.9, "dog": 0.1}']]}]}),
    ],
)
def test_answers_are_read_out_of_each_wrapping(parse, document):
    assert parse(json.dumps(document).encode()) == {"cat": 0.9, "dog": 0.1}


def test_optimised_peers_get_the_environment_that_marina_gives_its_workers():
    given = Server((), environment={})._child_environment(Path("/nowhere"))
    tuned = {name: value for name, value in given.items() if name.startswith(("OMP_", "KMP_", "MALLOC_", "LD_"))}
    ours = systems.worker_environment(1)
    assert tuned == {name: ours[name] for name in tuned}


def test_nothing_of_our_own_environment_tunes_a_server(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MALLOC_ARENA_MAX", "PYTHONPATH", "TS_CONFIG_FILE", "MARINA_ENGINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HARMLESS", "kept")
    found = systems.clean_environment(OMP_NUM_THREADS="4")
    assert found["OMP_NUM_THREADS"] == "4"
    assert found["HARMLESS"] == "kept"
    assert not {"MALLOC_ARENA_MAX", "PYTHONPATH", "TS_CONFIG_FILE", "MARINA_ENGINE"} & set(found)


@pytest.mark.parametrize("tuned", [False, True])
def test_the_archive_has_the_layout_that_is_measured_whatever_the_artifact_has(tmp_path, tuned):
    artifact = write_artifact(tmp_path / "artifacts")
    own = (systems.ROOT / "handlers" / "image_classifier.yaml").read_text().replace("batchSize: 32", "batchSize: 17")
    if tuned:
        (artifact / CONFIG_FILE).write_text(own.replace("minWorkers: 1", "minWorkers: 2").replace("ers: 1", "ers: 2"))
    assert systems.shipped_layout(artifact, 4) == (Layout(2, 2, 17) if tuned else Layout(1, 4, 32))
    packed = systems.pack(artifact, Layout(3, 1, 5), tmp_path / "store")
    found = model_config.read(tune_config.config_of(packed.path))
    assert (found["minWorkers"], found["maxWorkers"], found["batchSize"]) == (3, 3, 5)
    assert systems.shipped_layout(artifact, 4) == (Layout(2, 2, 17) if tuned else Layout(1, 4, 32)), "it is a copy"
    assert store.select(tmp_path / "store", []) == [packed]


def test_the_text_model_is_compared_with_echo_as_it_is_shipped():
    found = model_config.read((systems.ROOT / "handlers" / "text_classifier.yaml").read_text())
    assert {key: found[key] for key in ("minWorkers", "batchSize")} == {
        key: echo.MODEL_CONFIG[key] for key in ("minWorkers", "batchSize")
    }


def test_every_peer_has_pinned_requirements_and_a_server(monkeypatch, tmp_path):
    monkeypatch.setattr(systems.environments, "python_of", lambda cache, name: tmp_path / name / "bin" / "python")
    for name in PEERS:
        lines = (systems.environments.REQUIREMENTS / f"{name}.txt").read_text().splitlines()
        pinned = [line for line in lines if not line.startswith("#")]
        assert pinned and all("==" in line for line in pinned)
        place = Place(tmp_path, tmp_path, {PLAIN: tmp_path})
        for form in ("documented", "optimised"):
            launch = systems.launch(Setup(name, form), Layout(2, 1, 8), place)
            assert launch.url.startswith("http://127.0.0.1:")
            assert ("OMP_NUM_THREADS" in launch.environment) == (form == "optimised")
