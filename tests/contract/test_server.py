"""The supervisor around a real TorchServe: ready means ready, every failure names its cause, nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from marina.client import NO_RETRIES, InferenceClient, ManagementClient
from marina.errors import MarinaError, NoJava, NotReady, PortBusy, Refused, Unreachable
from marina.logs import LOAD_FAILED
from marina.server import ServedModel, Server
from marina.settings import CONFIG_FILE
from support import torchserve
from support.torchserve import Program, eventually, gone

BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def model(store: Path) -> ServedModel:
    return torchserve.pack("obliging", store)


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    log, config = folder / "server.log", folder / "config.properties"
    shipped = CONFIG_FILE.read_text()
    config.write_text(shipped.replace("blacklist_env_vars=", r"blacklist_env_vars=HIDDEN_\\d|"))
    models = [
        torchserve.pack("obliging", store, version="1.0", default=False, name="two", batchSize=2, maxBatchDelay=7),
        torchserve.pack("obliging", store, version="2.0", name="two", maxWorkers=2),
        torchserve.pack("obliging", store, name="narrow", batchSize=1, jobQueueSize=2),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", "/somewhere/else")
        patch.setenv("TS_CONFIG_FILE", "/not/ours")
        for name in ("SOME_SECRET", "HIDDEN_1", "HIDDEN_x"):
            patch.setenv(name, "x")
        with torchserve.running(models, log_file=log, config=config) as found:
            yield found


@pytest.fixture
def client(server: Server) -> Iterator[InferenceClient]:
    with InferenceClient(server.inference_url, retries=NO_RETRIES) as found:
        yield found


@pytest.fixture
def management(server: Server) -> Iterator[ManagementClient]:
    with ManagementClient(server.management_url) as found:
        yield found


class TestReady:
    def test_every_worker_is_ready_when_start_returns(self, server: Server, management: ManagementClient) -> None:
        assert {(item.name, item.version): item.ready_workers for item in management.status()} == {
            ("narrow", "1.0"): 1,
            ("two", "1.0"): 1,
            ("two", "2.0"): 1,
        }
        assert server.not_ready() == []

    def test_the_marked_version_is_the_default(self, client: InferenceClient) -> None:
        assert client.predict("two", b"abc").version == "2.0"
        assert client.predict("two", b"abc", version="1.0").version == "1.0"

    def test_batching_is_what_the_archive_says(self, management: ManagementClient) -> None:
        found = management.describe("two", "1.0")
        assert (found.batch_size, found.max_batch_delay_ms, found.max_workers) == (2, 7, 1)
        assert management.describe("two", "2.0").max_workers == 2

    def test_the_ready_line_names_what_is_served(self, server: Server) -> None:
        assert server.ready_line.startswith(
            f"ready {server.inference_url}/predictions (two 1.0, 1 worker; two 2.0 (default)"
        )

    def test_an_archive_that_does_not_answer_as_proved_is_not_ready(self, model: ServedModel) -> None:
        def prove(served: ServedModel, prover: InferenceClient) -> None:
            label = prover.predict(served.name, b"four").predictions[0][0].label
            raise MarinaError(f"golden: expected 5, got {label}", remedy="export it again")

        server = Server([model], torchserve.settings(), prove=prove)
        with pytest.raises(NotReady, match=r"obliging 1\.0 is loaded and does not answer.*expected 5, got 4"):
            server.start()
        assert server.folder is None and not server.alive()

    def test_it_starts_without_taking_cores_from_those_who_answer(self, model: ServedModel) -> None:
        """Other servers and the gateway of the same machine."""
        during: list[int] = []

        def priority() -> int:
            return int(Path(f"/proc/{server.pid}/autogroup").read_text().rpartition(" ")[2])

        server = Server([model], torchserve.settings(), prove=lambda *_: during.append(priority()))
        if not Path("/proc/self/autogroup").exists():
            pytest.skip("this kernel does not share cores out by session")
        with server:
            assert (during, priority()) == ([6], 0)


class TestWorkers:
    def test_the_environment_is_ours(self, client: InferenceClient) -> None:
        seen = json.loads(client.predict("two", b"environment").predictions[0][0].label)
        assert "/somewhere/else" not in seen["PYTHONPATH"]
        assert {"TS_CONFIG_FILE", "SOME_SECRET"}.isdisjoint(seen)
        # A backslash of the file has reached java's regular expression.
        assert "HIDDEN_x" in seen and "HIDDEN_1" not in seen
        assert seen["TMPDIR"] == seen["TEMP"]

    def test_a_worker_that_dies_is_seen_and_comes_back(self, server: Server, client: InferenceClient) -> None:
        with pytest.raises(Refused) as caught:
            client.predict("two", b"exit 3", version="1.0")
        assert caught.value.status == 500
        eventually(lambda: bool(server.not_ready()), "not ready after a worker's death")
        assert requests.get(f"{server.supervisor_url}/readyz").status_code == 503
        eventually(lambda: not server.not_ready(), "ready again")
        metrics = requests.get(f"{server.supervisor_url}/metrics").text
        assert 'marina_worker_restarts_total{model="two",version="1.0"} 1.0' in metrics

    def test_scaling_waits_for_the_workers(self, management: ManagementClient) -> None:
        assert management.scale("two", 2, version="2.0").ready_workers == 2
        assert len(management.scale("two", 1, version="2.0").workers) == 1

    def test_the_default_version_can_be_switched(self, management: ManagementClient, client: InferenceClient) -> None:
        management.set_default("two", "1.0")
        assert client.predict("two", b"x").version == "1.0"
        management.set_default("two", "2.0")
        assert client.predict("two", b"x").version == "2.0"

    def test_versions_come_and_go(self, store: Path, management: ManagementClient, client: InferenceClient) -> None:
        late = torchserve.pack("obliging", store, version="3.0", name="late")
        management.register(late.archive_file.name, workers=1, batch_size=1, max_batch_delay_ms=1)
        assert client.predict("late", b"x").version == "3.0"
        with pytest.raises(Refused, match="this version is registered already"):
            management.register(late.archive_file.name, workers=1, batch_size=1, max_batch_delay_ms=1)
        management.unregister("late", "3.0")
        with pytest.raises(Refused) as caught:
            client.predict("late", b"x")
        assert caught.value.status == 404
        assert late.archive_file.is_file()


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "version", "words"), [("nobody", None, "no such model"), ("two", "9.9", "no such version")]
    )
    def test_what_is_not_served(self, client: InferenceClient, name: str, version: str | None, words: str) -> None:
        with pytest.raises(Refused, match=words) as caught:
            client.predict(name, b"x", version=version)
        assert caught.value.status == 404 and caught.value.remedy

    def test_a_problem_document_keeps_its_words(self, client: InferenceClient) -> None:
        with pytest.raises(Refused) as caught:
            client.predict("two", b"problem 422")
        error = caught.value
        assert (error.status, error.title, error.detail, error.request_id) == (422, "Asked for", "as told", "id-1")

    def test_a_handler_that_raises(self, client: InferenceClient) -> None:
        with pytest.raises(Refused, match="the model failed on this request") as caught:
            client.predict("two", b"raise")
        assert caught.value.status == 503

    def test_a_request_beyond_the_limit(self, client: InferenceClient) -> None:
        with pytest.raises((Refused, Unreachable)) as caught:  # the connection may break while the body is still sent
            client.predict("two", bytes(68_000_000))
        assert not isinstance(caught.value, Refused) or caught.value.status == 413

    def test_a_full_queue_is_busy_and_in_flight_stays_true(self, server: Server, client: InferenceClient) -> None:
        def ask(_: int) -> str:
            try:
                return client.predict("narrow", b"sleep 0.5").model
            except Refused as error:
                assert error.status == 503
                return error.title

        with ThreadPoolExecutor(12) as pool:
            answers = pool.map(ask, range(12))
            eventually(lambda: (server.in_flight() or 0) >= 2, "requests in flight", seconds=5)
            outcomes = set(answers)
        assert outcomes == {"narrow", "busy: the queue is full or no worker is left"}
        eventually(lambda: server.in_flight() == 0, "nothing in flight", seconds=5)
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(client.predict, "narrow", b"sleep 1")
            eventually(lambda: server.in_flight() == 1, "exactly one in flight", seconds=5)
            late.result()


class TestSupervisorPort:
    def test_live_ready_and_metrics(self, server: Server) -> None:
        assert requests.get(f"{server.supervisor_url}/livez").json() == {"alive": True}
        eventually(lambda: requests.get(f"{server.supervisor_url}/readyz").status_code == 200, "ready")
        metrics = requests.get(f"{server.supervisor_url}/metrics").text
        for line in ("marina_ready 1.0", "marina_draining 0.0", 'marina_workers_ready{model="two",version="2.0"} 1.0'):
            assert line in metrics

    def test_anything_else_is_not_there(self, server: Server) -> None:
        assert requests.get(f"{server.supervisor_url}/models").status_code == 404
        assert requests.get(f"{server.supervisor_url}/drain").status_code == 404


class TestLog:
    def test_one_json_line_per_request(self, server: Server, client: InferenceClient) -> None:
        log = server.settings.log_file
        assert log is not None
        before = len(log.read_text().splitlines())
        client.predict("two", b"abc")
        with socket.create_connection(("127.0.0.1", server.settings.inference_port)) as raw:
            raw.sendall(b'POST /predictions/a"b\\c HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n')
            assert b"404" in raw.recv(1000)
        eventually(lambda: len(log.read_text().splitlines()) >= before + 2, "two lines")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        seen = [(line["method"], line["path"], line["status"]) for line in lines[before:] if line["logger"] == "access"]
        assert seen == [("POST", "/predictions/two", 200), ("POST", '/predictions/a"b\\c', 404)]
        assert lines[0]["message"] == "not passed on to TorchServe: PYTHONPATH, TS_CONFIG_FILE"

    def test_looking_at_the_state_is_not_logged(self, server: Server) -> None:
        log = server.settings.log_file
        assert log is not None and '"method":"GET"' not in log.read_text()


class TestRefusalToStart:
    @pytest.mark.parametrize(
        ("handler", "cause"),
        [
            ("missing_import", "ModuleNotFoundError: No module named 'a_package_that_nobody_has'"),
            ("odd_weights", "RuntimeError: size mismatch for fc.weight"),
            ("failed_self_test", "SelfTestFailed: golden/0.png: expected 'seven', got 'one'"),
            ("killed", "the worker ended without a"),
        ],
    )
    def test_a_worker_that_does_not_load_is_named_with_its_cause(
        self, store: Path, tmp_path: Path, handler: str, cause: str
    ) -> None:
        server = Server([torchserve.pack(handler, store)], torchserve.settings(log_file=tmp_path / "log"))
        with pytest.raises(NotReady) as caught:
            server.start()
        assert str(caught.value).startswith(f"{handler} 1.0 ({handler}-1.0.mar) did not load: {cause}")
        assert caught.value.log_tail and not server.alive() and server.folder is None
        assert LOAD_FAILED not in (tmp_path / "log").read_text()

    @pytest.mark.parametrize("kind", ["inference", "management", "metrics", "supervisor"])
    def test_a_busy_port_is_named(self, model: ServedModel, kind: str) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            server = Server([model], torchserve.settings(**{f"{kind}_port": port}))
            with pytest.raises(
                PortBusy, match=rf"the {kind} port {port} on 127\.0\.0\.1 is taken by pid {os.getpid()}"
            ) as caught:
                server.start()
        assert ("--port" if kind == "inference" else f"--{kind}-port") in caught.value.remedy

    def test_no_java(self, model: ServedModel, tmp_path: Path) -> None:
        server = Server([model], torchserve.settings(), environment={**os.environ, "JAVA_HOME": str(tmp_path)})
        with pytest.raises(NoJava, match=f"JAVA_HOME is {tmp_path}"):
            server.start()

    def test_a_broken_archive_file(self, store: Path) -> None:
        broken = torchserve.pack("obliging", store, name="broken")
        broken.archive_file.write_bytes(b"not a zip")
        with pytest.raises(NotReady, match="did not load"):
            Server([broken], torchserve.settings()).start()


class TestStop:
    def test_nothing_is_left_and_the_ports_can_be_used_again(self, model: ServedModel) -> None:
        chosen = torchserve.settings()
        threads = threading.active_count()
        for _ in range(2):
            server = Server([model], chosen)
            with server:
                assert server.pid is not None and server.folder is not None
                started = psutil.Process(server.pid).children(recursive=True)
                assert len(started) == 1
                folder = server.folder
                requests.post(
                    f"{server.inference_url}/predictions/obliging", data=b"x", headers=BINARY
                ).raise_for_status()
            assert gone(started) and not folder.exists()
            assert threading.active_count() == threads

    def test_it_may_be_started_from_a_thread_that_ends(self, model: ServedModel) -> None:
        server = Server([model], torchserve.settings())
        starter = threading.Thread(target=server.start)
        starter.start()
        starter.join()
        try:
            answer = requests.post(f"{server.inference_url}/predictions/obliging", data=b"x", headers=BINARY)
            assert answer.status_code == 200 and server.alive()
        finally:
            server.stop()

    @pytest.mark.parametrize(
        ("ask", "reason"),
        [
            (lambda found: found.process.send_signal(signal.SIGTERM), "SIGTERM"),
            (lambda found: found.process.send_signal(signal.SIGINT), "SIGINT"),
            (lambda found: requests.post(f"{found.settings.url('supervisor')}/drain").raise_for_status(), "drain"),
        ],
        ids=["SIGTERM", "Ctrl-C", "POST /drain"],
    )
    def test_requests_under_way_are_answered_first(
        self, model: ServedModel, tmp_path: Path, ask: Callable[[Program], None], reason: str
    ) -> None:
        with torchserve.program([model], tmp_path) as found, ThreadPoolExecutor(6) as pool:
            base, watch = found.settings.url("inference"), found.settings.url("supervisor")
            answers = [_ask(pool, base, "sleep 0.4") for _ in range(6)]
            eventually(lambda: "marina_in_flight 6.0" in requests.get(f"{watch}/metrics").text, "six in flight")
            started = found.descendants()
            ask(found)
            eventually(lambda: _not_ready(watch), "not ready", seconds=1)
            assert [answer.result().status_code for answer in answers] == [200] * 6
            assert found.process.wait(10) == 0
            assert found.text.count("\nready ") + found.text.startswith("ready ") == 1
            assert f"stopped by {reason}" in found.text
            assert gone(started) and list(found.temp.iterdir()) == []

    def test_a_drain_that_takes_too_long_is_cut_off_and_said(self, model: ServedModel, tmp_path: Path) -> None:
        with torchserve.program([model], tmp_path, drain_seconds=0.5) as found, ThreadPoolExecutor(1) as pool:
            cut = _ask(pool, found.settings.url("inference"), "sleep 30")
            eventually(
                lambda: "in_flight 1.0" in requests.get(f"{found.settings.url('supervisor')}/metrics").text, "begun"
            )
            found.process.terminate()
            assert found.process.wait(10) == 0
            assert isinstance(cut.exception(), requests.ConnectionError)
            assert "drain deadline of 0.5 s: 1 requests are cut off" in found.text

    def test_a_second_signal_stops_at_once(self, model: ServedModel, tmp_path: Path) -> None:
        with torchserve.program([model], tmp_path) as found, ThreadPoolExecutor(1) as pool:
            cut = _ask(pool, found.settings.url("inference"), "sleep 30")
            eventually(
                lambda: "in_flight 1.0" in requests.get(f"{found.settings.url('supervisor')}/metrics").text, "begun"
            )
            started = found.descendants()
            found.process.terminate()
            eventually(lambda: _not_ready(found.settings.url("supervisor")), "draining")
            found.process.terminate()
            assert found.process.wait(5) == 0
            assert isinstance(cut.exception(), requests.ConnectionError)
            assert gone(started) and list(found.temp.iterdir()) == []

    def test_a_stop_while_starting_leaves_nothing(self, model: ServedModel, tmp_path: Path) -> None:
        with torchserve.program([model], tmp_path, wait_ready=False) as found:
            eventually(lambda: any(item.name() == "java" for item in found.descendants()), "java")
            started = found.descendants()
            found.process.terminate()
            assert found.process.wait(10) == 0
            assert "ready " not in found.text and "stopped by SIGTERM" in found.text
            assert gone(started) and list(found.temp.iterdir()) == []


class TestDeath:
    def test_java_dying_is_an_error_with_an_exit_code(self, model: ServedModel, tmp_path: Path) -> None:
        with torchserve.program([model], tmp_path) as found:
            started = found.descendants()
            java = next(item for item in started if item.name() == "java")
            java.kill()
            assert found.process.wait(10) == 6
            assert "ServerDied: TorchServe's java was ended by signal 9 by itself" in found.text
            assert gone(started) and list(found.temp.iterdir()) == []

    def test_nothing_outlives_a_killed_supervisor(self, model: ServedModel, tmp_path: Path) -> None:
        with torchserve.program([model], tmp_path) as found:
            started = found.descendants()
            assert len(started) == 2
            found.process.kill()
            eventually(lambda: gone(started), "java and its worker end", seconds=15)


def _ask(pool: ThreadPoolExecutor, base: str, body: str) -> Future[requests.Response]:
    return pool.submit(requests.post, f"{base}/predictions/obliging", data=body.encode(), headers=BINARY)


def _not_ready(base: str) -> bool:
    """A port that is closed already is not ready either."""
    try:
        return requests.get(f"{base}/readyz").status_code == 503
    except requests.ConnectionError:
        return True
