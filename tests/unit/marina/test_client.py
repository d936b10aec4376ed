"""The clients against a real HTTP server in a thread, which answers what a test puts on its list."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from marina import client as module
from marina.client import InferenceClient, ManagementClient, Retries, Timeout
from marina.errors import ClientError, ConfigError, Refused, TimedOut, UnexpectedAnswer, Unreachable

GOOD = {"model": "m", "version": "1.0", "predictions": [[{"label": "a", "index": 0, "probability": 0.75}]]}
FAST = Retries(count=2, first_wait=0.01)
PROBLEM = {"Content-Type": "application/problem+json"}


@dataclass
class Reply:
    status: int = 200
    body: Any = field(default_factory=lambda: GOOD)
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False


@dataclass
class Backend:
    url: str
    replies: list[Reply] = field(default_factory=list)
    """The next answers; the last one is repeated."""
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def backend() -> Iterator[Backend]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found.seen.append((self.command, self.path, dict(self.headers), body))
            reply = found.replies.pop(0) if len(found.replies) > 1 else found.replies[0]
            stop.wait(reply.delay)
            self.close_connection = True
            if reply.drop:
                return
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

    stop = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Backend(f"http://127.0.0.1:{server.server_port}", [Reply()])
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield found
    stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def client(backend: Backend) -> Iterator[InferenceClient]:
    with InferenceClient(backend.url, retries=FAST, timeout=Timeout(connect=10, read=10)) as found:
        yield found


@pytest.fixture
def management(backend: Backend) -> Iterator[ManagementClient]:
    with ManagementClient(backend.url, retries=FAST, timeout=Timeout(connect=10, read=10)) as found:
        yield found


def refused_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


class TestPredict:
    def test_one_image_is_sent_as_it_is(self, backend: Backend, client: InferenceClient) -> None:
        backend.replies = [Reply(headers={"x-request-id": "r-1"})]
        answer = client.predict("m", b"\x00png", top_k=3)
        method, path, headers, body = backend.seen[0]
        assert (method, path, body) == ("POST", "/predictions/m", b"\x00png")
        assert (headers["Content-Type"], headers["x-top-k"]) == ("application/octet-stream", "3")
        assert (answer.model, answer.version, answer.request_id) == ("m", "1.0", "r-1")
        assert answer.predictions[0][0].label == "a" and answer.predictions[0][0].probability == 0.75

    def test_several_images_go_as_instances(self, backend: Backend, client: InferenceClient) -> None:
        client.predict("m", [b"one", b"two"], version="1.0")
        _, path, headers, body = backend.seen[0]
        assert (path, headers["Content-Type"]) == ("/predictions/m/1.0", "application/json")
        assert [base64.b64decode(item["b64"]) for item in json.loads(body)["instances"]] == [b"one", b"two"]

    def test_a_name_cannot_reach_another_route(self, backend: Backend, client: InferenceClient) -> None:
        client.predict("../models", b"x")
        assert backend.seen[0][1] == "/predictions/..%2Fmodels"

    def test_the_key_is_sent_as_a_bearer_token(self, backend: Backend) -> None:
        with InferenceClient(backend.url, key="k-1") as found:
            found.predict("m", b"x")
        assert backend.seen[0][2]["Authorization"] == "Bearer k-1"

    @pytest.mark.parametrize("proxied", [False, True])
    def test_netrc_does_not_take_the_place_of_the_key(
        self, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxied: bool
    ) -> None:
        (tmp_path / "netrc").write_text("default login me password secret\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        if proxied:
            monkeypatch.setenv("http_proxy", backend.url)
        # To connect to 0.0.0.0 is to connect to this machine, and it is no address of the loopback network.
        url = "http://gateway.invalid" if proxied else backend.url.replace("127.0.0.1", "0.0.0.0")
        with InferenceClient(url, key="k-1") as found:
            found.predict("m", b"x")
        _, path, headers, _ = backend.seen[0]
        assert path == ("http://gateway.invalid" if proxied else "") + "/predictions/m"
        assert headers["Authorization"] == "Bearer k-1"


class TestErrors:
    def test_a_problem_document(self, backend: Backend, client: InferenceClient) -> None:
        problem = {"title": "Unsupported media type", "status": 415, "detail": "a PDF", "instance": "id-7"}
        backend.replies = [Reply(415, problem, PROBLEM)]
        with pytest.raises(Refused) as caught:
            client.predict("m", b"x")
        error = caught.value
        assert (str(error), error.status, error.request_id) == ("Unsupported media type: a PDF", 415, "id-7")
        assert error.exit_code == 7

    @pytest.mark.parametrize(
        ("status", "kind", "title"),
        [
            (404, "ModelNotFoundException", "no such model"),
            (404, "ModelVersionNotFoundException", "no such version"),
            (503, "ServiceUnavailableException", "busy: the queue is full or no worker is left"),
            (503, "InternalServerException", "the model failed on this request"),
            (500, "InternalServerException", "the worker died or took too long"),
            (507, "InternalServerException", "the worker ran out of memory or was killed"),
            (405, "MethodNotAllowedException", "not allowed here"),
            (418, "Unheard", "refused with status 418"),
        ],
    )
    def test_torchserves_own_errors(
        self, backend: Backend, client: InferenceClient, status: int, kind: str, title: str
    ) -> None:
        backend.replies = [Reply(status, {"code": status, "type": kind, "message": "its words"})]
        with pytest.raises(Refused) as caught:
            client.predict("m", b"x")
        assert (caught.value.title, caught.value.detail, caught.value.status) == (title, "its words", status)

    @pytest.mark.parametrize("status", [413, 502])
    def test_an_error_without_words(self, backend: Backend, client: InferenceClient, status: int) -> None:
        backend.replies = [Reply(status, b"<html>")]
        with pytest.raises(Refused) as caught:
            client.predict("m", b"x")
        assert caught.value.status == status and "<html>" not in str(caught.value)

    @pytest.mark.parametrize("body", [b"not json", b"[]", b'{"predictions":[[{}]]}', b'{"predictions":1}'])
    def test_an_answer_that_breaks_the_contract(self, backend: Backend, client: InferenceClient, body: bytes) -> None:
        backend.replies = [Reply(200, body)]
        with pytest.raises(UnexpectedAnswer, match="something unexpected"):
            client.predict("m", b"x")

    def test_nothing_listens(self) -> None:
        with (
            InferenceClient(refused_port(), retries=FAST) as found,
            pytest.raises(Unreachable, match="nothing listens"),
        ):
            found.predict("m", b"x")

    def test_no_answer_in_time(self, backend: Backend) -> None:
        backend.replies = [Reply(delay=30)]
        short = Timeout(connect=10, read=0.3)
        with (
            InferenceClient(backend.url, retries=FAST, timeout=short) as impatient,
            pytest.raises(TimedOut, match="no answer from"),
        ):
            impatient.predict("m", b"x")
        assert len(backend.seen) <= 1  # waiting for longer is not helped by asking again

    @pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://x", "http://", ""])
    def test_a_wrong_address(self, url: str) -> None:
        with pytest.raises(ConfigError, match="is not a server's address"):
            InferenceClient(url)

    def test_every_error_of_requests_is_mapped(self) -> None:
        def subclasses(kind: type[BaseException]) -> Iterator[type[BaseException]]:
            yield kind
            for item in kind.__subclasses__():
                yield from subclasses(item)

        for kind in {item for item in subclasses(requests.RequestException) if item.__module__.startswith("requests")}:
            error = kind("x", "doc", 0) if issubclass(kind, ValueError) and "JSON" in kind.__name__ else kind("x")
            with pytest.raises((ClientError, ConfigError)), module._foreign_errors("http://x"):
                raise error


class TestRetries:
    @pytest.mark.parametrize(
        "first",
        [
            Reply(drop=True),
            Reply(429, b"", {"Retry-After": "0"}),
            Reply(503, b"", {"Retry-After": "0"}),
            Reply(503, {"code": 503, "type": "ServiceUnavailableException", "message": "full"}),
        ],
        ids=["dropped", "429", "503", "queue full"],
    )
    def test_a_prediction_is_repeated(self, backend: Backend, client: InferenceClient, first: Reply) -> None:
        backend.replies = [first, Reply()]
        assert client.predict("m", b"x").version == "1.0"
        assert len(backend.seen) == 2

    @pytest.mark.parametrize("status", [400, 404, 413, 422, 500, 507])
    def test_an_error_of_the_request_is_not(self, backend: Backend, client: InferenceClient, status: int) -> None:
        backend.replies = [Reply(status, {"title": "t", "status": status}, PROBLEM), Reply()]
        with pytest.raises(Refused):
            client.predict("m", b"x")
        assert len(backend.seen) == 1

    def test_a_failing_handler_is_not(self, backend: Backend, client: InferenceClient) -> None:
        backend.replies = [Reply(503, {"code": 503, "type": "InternalServerException", "message": "x"}), Reply()]
        with pytest.raises(Refused, match="the model failed"):
            client.predict("m", b"x")
        assert len(backend.seen) == 1

    def test_they_end(self, backend: Backend, client: InferenceClient) -> None:
        backend.replies = [Reply(429, b"")]
        with pytest.raises(Refused):
            client.predict("m", b"x")
        assert len(backend.seen) == 3

    def test_a_change_that_may_have_arrived_is_not_repeated(
        self, backend: Backend, management: ManagementClient
    ) -> None:
        backend.replies = [Reply(drop=True), Reply()]
        with pytest.raises(Unreachable):
            management.set_default("m", "1.0")
        assert len(backend.seen) == 1

    def test_waiting_grows_has_jitter_and_a_limit(self) -> None:
        waits = Retries(first_wait=0.1, longest_wait=1.0)
        for attempt in range(8):
            longest = min(0.1 * 2**attempt, 1.0)
            assert all(longest / 2 <= waits.wait(attempt, None) <= longest for _ in range(20))
        assert waits.wait(0, "3600") == 1.0
        assert waits.wait(0, "0") == 0.0


class TestManagement:
    def describe(self, version: str, *, ready: int = 1) -> dict[str, Any]:
        worker = {"id": "9000", "pid": 7, "status": "READY", "startTime": "t", "gpu": False, "memoryUsage": 5}
        workers = [{**worker, "status": "READY" if index < ready else "UNLOADING"} for index in range(2)]
        return {
            "modelName": "m",
            "modelVersion": version,
            "modelUrl": "m.mar",
            "minWorkers": 1,
            "maxWorkers": 2,
            "batchSize": 8,
            "maxBatchDelay": 1,
            "workers": workers,
            "jobQueueStatus": {"remainingCapacity": 90, "pendingRequests": 10},
        }

    def test_status_marks_the_default_version(self, backend: Backend, management: ManagementClient) -> None:
        backend.replies = [
            Reply(body={"models": [{"modelName": "m", "modelUrl": "m.mar"}]}),
            Reply(body=[self.describe("2.0")]),
            Reply(body=[self.describe("1.0"), self.describe("2.0", ready=2)]),
        ]
        found = management.status()
        assert [(item.version, item.default, item.ready_workers, item.pending) for item in found] == [
            ("1.0", False, 1, 10),
            ("2.0", True, 2, 10),
        ]

    def test_long_lists_are_read_to_the_end(self, backend: Backend, management: ManagementClient) -> None:
        backend.replies = [
            Reply(body={"nextPageToken": "100", "models": [{"modelName": "a", "modelUrl": "a.mar"}]}),
            Reply(body={"models": [{"modelName": "b", "modelUrl": "b.mar"}]}),
        ]
        assert [item.name for item in management.models()] == ["a", "b"]
        assert "next_page_token=100" in backend.seen[1][1]

    def test_scaling_gives_up_at_the_deadline(self, backend: Backend, management: ManagementClient) -> None:
        backend.replies = [Reply(202, {"status": "scaling"}), Reply(body=[self.describe("1.0", ready=1)])]
        started = time.monotonic()
        with pytest.raises(TimedOut, match="1 of 2 workers ready"):
            management.scale("m", 2, deadline=0.2)
        assert time.monotonic() - started < 2
        assert backend.seen[0][:2] == ("PUT", "/models/m?min_worker=2&max_worker=2&synchronous=false")

    def test_registering_always_says_the_delay(self, backend: Backend, management: ManagementClient) -> None:
        management.register("m-2.0.mar", workers=1, batch_size=8, max_batch_delay_ms=1)
        assert "max_batch_delay=1" in backend.seen[0][1] and "url=m-2.0.mar" in backend.seen[0][1]
