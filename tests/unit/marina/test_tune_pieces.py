"""What the tuner keeps and writes: measurements on disk, `model-config.yaml`, the next version."""

from __future__ import annotations

import dataclasses
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from marina import model_config
from marina.errors import ArchiveError, ConfigError
from marina.load_payloads import Load
from marina.load_stats import Interval
from marina.loadgen import Closed, Payload
from marina.tune import Candidate, Record, Stand, Task, default_workers, only_one
from marina.tune_config import next_version, tuned_text
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


def test_a_line_cut_off_by_a_crash_is_left_out_and_damage_is_told(tmp_path: Path) -> None:
    record = Record(tmp_path, task())
    record.add(MACHINE.probe(START, 4, 0))
    with record.path.open("a") as stream:
        stream.write('{"probe": {"setting": {"arch')
    assert Record(tmp_path, task()).remembered == 1
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
        result = stand._run(dataclasses.replace(task(), probe_seconds=0.1), Closed(connections=2), 1.0)
    finally:
        server.shutdown()
        server.server_close()
    assert result.latency is not None and result.good >= 1 and result.failed == 0
