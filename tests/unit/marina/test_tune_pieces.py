"""What the tuner keeps and writes: measurements on disk, `model-config.yaml`, the next version."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import zipfile
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from marina import model_config, store
from marina.archive import Archive
from marina.errors import ArchiveError, ConfigError
from marina.load_payloads import Load
from marina.load_stats import Interval, Latency
from marina.loadgen import Closed, Open, Payload, Result
from marina.tune import Candidate, Record, Stand, Task, Tuned, default_workers, only_one, tune
from marina.tune_config import candidates, next_version, tuned_text
from marina.tune_search import Outcome, OutOfTime, Probe, Setting, Space, search
from support.simulated_server import Machine

HANDLERS = Path(__file__).resolve().parents[3] / "handlers"
SPACE = Space(archives=("m:1.0",), workers=(1, 2), batch_sizes=(1, 8, 32), delays_ms=(1, 10), most_in_flight=64)
START = Setting(archive="m:1.0", workers=1, batch_size=32, delay_ms=1)
MACHINE = Machine(cores=2, per_batch=3.0, per_item=5.0, efficiency=0.5, contention=0.1, noise=0.01, requests=100)


def task(body: bytes = b"x", digest: str = "0") -> Task:
    return Task(
        name="m",
        candidates=(Candidate(key="m:1.0", file="m-1.0.mar", sha256=digest),),
        start=START,
        space=SPACE,
        objective_ms=100.0,
        budget=60.0,
        load=Load(payloads=(Payload(body=body),)),
    )


def remembering(record: Record, most: int = 10_000) -> tuple[Outcome, int]:
    """A search on the simulated server with what the record knows; the number of new measurements."""
    fresh = 0

    def measure(setting: Setting, in_flight: int, turn: int) -> Probe:
        nonlocal fresh
        known = record.find(setting, in_flight, turn)
        if known is not None:
            return known
        if fresh == most:
            raise OutOfTime
        fresh += 1
        found = MACHINE.probe(setting, in_flight, turn)
        record.add(found)
        return found

    return search(SPACE, START, measure, 100.0), fresh


def test_an_interrupted_search_goes_on_to_the_same_result(tmp_path: Path) -> None:
    whole, measured = remembering(Record(tmp_path / "a", task()))
    part, first = remembering(Record(tmp_path / "b", task()), most=measured // 2)
    assert whole.complete and not part.complete and part.best is not None
    record = Record(tmp_path / "b", task())
    assert record.remembered == first
    rest, second = remembering(record)
    assert rest.best == whole.best and first + second == measured
    again, none = remembering(Record(tmp_path / "b", task()))
    assert again.best == whole.best and none == 0


def test_other_bytes_or_other_payloads_are_other_measurements(tmp_path: Path) -> None:
    folders = {Record(tmp_path, item).folder for item in (task(), task(body=b"y"), task(digest="1"), task())}
    assert len(folders) == 3


def test_another_archive_leaves_the_rest_remembered_and_is_known_by_its_bytes(tmp_path: Path) -> None:
    def with_rung(digest: str) -> Task:
        rung = Candidate(key="m:1.1", file="m-1.1.mar", sha256=digest, offered=True)
        return dataclasses.replace(task(), candidates=(*task().candidates, rung))

    Record(tmp_path, task()).add(MACHINE.probe(START, 4, 0))
    record = Record(tmp_path, with_rung("1"))
    assert record.remembered == 1
    record.add(MACHINE.probe(dataclasses.replace(START, archive="m:1.1"), 4, 0))
    remembered = [Record(tmp_path, item).remembered for item in (with_rung("1"), with_rung("2"), task())]
    assert remembered == [2, 1, 1]


class Simulated(Stand):
    """The stand on the simulated server: it loads nothing, and says what it would have loaded."""

    def __init__(self, worker_bytes: int = 0, *, broken: str = "", interrupted_at: int = 10_000) -> None:
        super().__init__("http://127.0.0.1:9", "http://127.0.0.1:9", "m", print)
        self.loaded: list[Setting] = []
        self._bytes_each = worker_bytes
        self._broken = broken
        self._interrupted_at = interrupted_at

    def prepare(self, setting: Setting, candidate: Candidate) -> None:
        assert candidate.key == setting.archive
        self.require_room(setting, setting.workers - 1)
        self.loaded.append(setting)
        if len(self.loaded) == self._interrupted_at:
            raise KeyboardInterrupt
        if setting.archive == self._broken:
            raise ArchiveError("it does not load", remedy="none")

    def worker_bytes(self) -> int:
        return self._bytes_each

    def probe(self, setting: Setting, in_flight: int, turn: int, task: Task) -> Probe:
        self.prepare(setting, next(item for item in task.candidates if item.key == setting.archive))
        return MACHINE.probe(setting, in_flight, turn)

    def open_loop(self, task: Task, setting: Setting, rate: float) -> Result:
        self.prepare(setting, next(item for item in task.candidates if item.key == setting.archive))
        late = Interval(2 * task.objective_ms, None, None)
        slow = Latency(count=1, mean_ms=1, p50=late, p90=late, p95=late, p99=late, p999=late, max_ms=1)
        return Result(
            url="", loop=Open(rate=rate), seconds=1, planned=1, good=1, errors={}, throughput=late, latency=slow,
            service=None, by_outcome={}, timeline=(), failures=(), warm_up_seconds=0, steady=True, interrupted=False,
            behind=None, connects=1, client_cpu_us=1, server=None,
        )  # fmt: skip


def run_again(folder: Path, stand: Stand, wanted: Task) -> tuple[Tuned, Record]:
    record = Record(folder, wanted)
    return tune(wanted, stand, record, print), record


def test_a_resumed_run_loads_no_more_workers_than_there_is_memory_for(tmp_path: Path) -> None:
    wanted = dataclasses.replace(task(), budget=600.0)
    first, resumed = Simulated(worker_bytes=1 << 60, interrupted_at=3), Simulated(worker_bytes=1 << 60)
    with pytest.raises(KeyboardInterrupt):
        run_again(tmp_path, first, wanted)
    tuned, record = run_again(tmp_path, resumed, wanted)
    assert record.remembered == 2 and {setting.workers for setting in first.loaded + resumed.loaded} == {1}
    assert tuned.outcome.best is not None and tuned.outcome.complete
    assert {item.setting.workers for item in tuned.outcome.values} == {1}


def test_a_run_that_had_ended_loads_nothing_again(tmp_path: Path) -> None:
    whole = dataclasses.replace(task(), budget=600.0)
    first, record = run_again(tmp_path, Simulated(), whole)
    assert first.outcome.complete and list(record.sustained.values()) == [None], "no rate held, and that is known"
    stand = Simulated()
    again, _ = run_again(tmp_path, stand, whole)
    assert stand.loaded == [] and again.outcome.best == first.outcome.best and again.sustained == first.sustained


def test_a_rung_that_nobody_named_and_that_does_not_load_is_left_out(tmp_path: Path) -> None:
    rung = Candidate(key="m:1.1", file="m-1.1.mar", sha256="1", offered=True)
    space = dataclasses.replace(SPACE, archives=("m:1.0", "m:1.1"))
    wanted = dataclasses.replace(task(), candidates=(*task().candidates, rung), space=space, budget=600.0)
    stand, said = Simulated(broken="m:1.1"), list[str]()
    tuned = tune(wanted, stand, Record(tmp_path / "a", wanted), said.append)
    assert tuned.outcome.best is not None and {item.setting.archive for item in tuned.outcome.values} == {"m:1.0"}
    assert [item.archive for item in stand.loaded].count("m:1.1") == 1 and "left out: it does not load" in said
    named = dataclasses.replace(wanted, candidates=(*task().candidates, dataclasses.replace(rung, offered=False)))
    with pytest.raises(ArchiveError, match="it does not load"):
        tune(named, Simulated(broken="m:1.1"), Record(tmp_path / "b", named), print)


def stored(folder: Path, version: str, weights: str, engine: Mapping[str, str], **spec: object) -> None:
    """An archive of the store, as far as its records go."""
    files = {"weights.safetensors": weights, "model-config.yaml": version, **engine}
    with zipfile.ZipFile(folder / f"m-{version}.mar", "w") as packed:
        packed.writestr("build.json", json.dumps({"files": {name: {"sha256": of} for name, of in files.items()}}))
        packed.writestr("model_spec.json", json.dumps({"version": version, "labels": ["a"], **spec}))
    store.publish(folder, Archive(folder / f"m-{version}.mar", "m", version, f"sha-{version}", 1))


def test_other_engines_of_the_same_weights_are_tried_unasked(tmp_path: Path) -> None:
    stored(tmp_path, "1.0", "w", {})
    stored(tmp_path, "1.1", "w", {"engine.json": "int8", "engine/model.bin": "1"})
    stored(tmp_path, "1.2", "w", {"engine.json": "int8", "engine/model.bin": "1"})
    stored(tmp_path, "1.3", "w", {})  # tuned: its model-config.yaml differs
    stored(tmp_path, "1.4", "other", {"engine.json": "bf16"})
    stored(tmp_path, "1.5", "w", {"engine.json": "bf16"}, labels=["b"])
    found = candidates(tmp_path, "m:1.0", [], rungs=True)
    assert [(item.key, item.offered) for item in found] == [("m:1.0", False), ("m:1.2", True)]
    also = candidates(tmp_path, "m:1.0", ["m:1.4", "m:1.1"], rungs=True)
    assert [(item.key, item.offered) for item in also] == [("m:1.0", False), ("m:1.4", False), ("m:1.1", False)]
    assert [item.key for item in candidates(tmp_path, "m:1.0", ["m:1.4"], rungs=False)] == ["m:1.0", "m:1.4"]
    assert [item.key for item in candidates(tmp_path, "m:1.2", [], rungs=True)] == ["m:1.2", "m:1.3"]


def test_a_line_cut_off_by_a_crash_is_left_out_and_damage_is_told(tmp_path: Path) -> None:
    record = Record(tmp_path, task())
    record.add(MACHINE.probe(START, 4, 0))
    with record.path.open("a") as stream:
        stream.write('{"probe": {"setting": {"arch')
    later = Record(tmp_path, task())
    assert later.remembered == 1
    later.add(MACHINE.probe(START, 8, 0))
    assert Record(tmp_path, task()).remembered == 2, "what is written after the cut has a line of its own"
    record.path.write_text('{"probe": {"setting": 3}}\n')
    with pytest.raises(ConfigError, match=r"line 1 is damaged"):
        Record(tmp_path, task())
    assert Record(tmp_path, task(), fresh=True).remembered == 0


def test_one_tuner_per_model(tmp_path: Path) -> None:
    with only_one(tmp_path, "m"), pytest.raises(ConfigError, match="another tuner"), only_one(tmp_path, "m"):
        pass
    with only_one(tmp_path, "m"):
        pass


@pytest.mark.parametrize("path", sorted(HANDLERS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_configuration_takes_the_settings_and_keeps_all_else(path: Path) -> None:
    text = path.read_text()
    setting = Setting(archive="m:1.0", workers=3, batch_size=16, delay_ms=5)
    tuned = tuned_text(text, setting, "because")
    values, before = model_config.read(tuned), model_config.read(text)
    changed = {"minWorkers": 3, "maxWorkers": max(3, before["maxWorkers"]), "batchSize": 16, "maxBatchDelay": 5}
    assert values == {**before, **changed}
    assert list(model_config.check(tuned)) == []
    assert [line for line in tuned.splitlines() if "#" in line][1:] != []
    twice = tuned_text(tuned, setting, "because")
    assert twice == tuned


def test_a_configuration_that_cannot_be_edited_is_refused() -> None:
    text = (HANDLERS / "image_classifier.yaml").read_text().replace("batchSize: 32", "? batchSize\n: 32\n#")
    with pytest.raises(ArchiveError, match="batchSize is not on a line of its own"):
        tuned_text(text, START, "because")


@pytest.mark.parametrize(
    ("version", "taken", "following"),
    [
        ("1.0", set(), "1.1"),
        ("1.2", {"1.9", "1.0"}, "1.10"),
        ("2", {"1.5", ".partial"}, "3"),
        ("1.0", {"2.0.3"}, "2.0.4"),
    ],
)
def test_the_next_version_is_above_all(version: str, taken: set[str], following: str) -> None:
    assert next_version(version, taken) == following


def test_workers_to_try() -> None:
    assert default_workers(2, 1) == [1, 2]
    assert default_workers(6, 3) == [1, 2, 3, 4, 6]


def test_a_setting_that_fails_requests_is_never_chosen() -> None:
    def measure(setting: Setting, in_flight: int, turn: int) -> Probe:
        found = MACHINE.probe(setting, in_flight, turn)
        if setting.batch_size != 32:
            return found
        rate = Interval(9e9, 9e9, 9e9)
        return Probe(
            setting=setting,
            in_flight=in_flight,
            turn=turn,
            throughput=rate,
            p50_ms=0.1,
            p99_ms=rate,
            failed=1,
            seconds=1,
        )

    outcome = search(SPACE, START, measure, 100.0)
    assert outcome.best is not None and outcome.best.setting.batch_size != 32


def test_where_nothing_meets_the_objective_there_is_no_best() -> None:
    outcome = search(SPACE, START, MACHINE.probe, 0.5)
    assert outcome.best is None and outcome.complete


class _Slow(BaseHTTPRequestHandler):
    """Every answer takes longer than the measurement is meant to."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(1.5)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_measurement_lasts_until_there_is_an_answer() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        stand = Stand(url, url, "m", print)
        stand._warm = True  # no long search for steadiness
        wanted = dataclasses.replace(task(), probe_seconds=0.1)
        result = stand._run(wanted, wanted.candidates[0], Closed(connections=2), 1.0)
    finally:
        server.shutdown()
        server.server_close()
    assert result.latency is not None and result.good >= 1 and result.failed == 0
