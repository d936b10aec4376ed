"""A version that is too busy to answer is none that cannot be emptied: nothing of it is ended."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from marina import replica as replica_module
from marina import watchdog as watchdog_module
from marina.autoscale import Autoscale
from marina.autoscale_loop import Autoscaler, _Version
from marina.client import ManagementClient
from marina.errors import TimedOut, Unreachable
from marina.logs import ServerLog
from marina.parking import Parking
from marina.processes import free_port
from marina.replica import LocalReplica
from marina.settings import ServeSettings
from marina.watch import Watch
from marina.watchdog import Watchdog

KEY = ("m", "1.0")
FULL = {
    "code": 503,
    "type": "ServiceUnavailableException",
    "message": "Model m has no worker to serve describe request.",
}
DIED = {"code": 500, "type": "InternalServerException", "message": "Worker died."}
FAILED = {"code": 503, "type": "InternalServerException", "message": "Prediction failed"}
FAILED_WITH_500 = {"code": 500, "type": "InternalServerException", "message": "what a handler says"}
PARKS = [{"customizedMetadata": {"parks": True}}]
OTHER = [{"customizedMetadata": {"anything": "else"}}]
PLAIN = [{"modelName": "m"}]


@dataclass
class Busy:
    """A management interface whose version has one ready worker, with these answers to what is asked of its handler; the
    last one again and again. None: it does not answer."""

    answers: list[object] = field(default_factory=list)
    port: int = 0
    asked: int = 0
    scalings: int = 0
    closed: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def next(self) -> object:
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def describe(self) -> object:
        worker = {"id": "9000", "pid": -1, "status": "READY", "startTime": "", "gpu": False}
        return [{
            "modelName": "m", "modelVersion": "1.0", "modelUrl": "m.mar", "minWorkers": 1, "maxWorkers": 1,
            "batchSize": 1, "maxBatchDelay": 1, "workers": [worker],
            "jobQueueStatus": {"pendingRequests": 0, "remainingCapacity": 0},
        }]  # fmt: skip


@pytest.fixture
def busy() -> Iterator[Busy]:
    found = Busy()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = found.next() if "customized" in self.path else found.describe()
            if answer is None:
                found.closed.wait(20)
                return
            self._answer(int(answer["code"]) if isinstance(answer, dict) else 200, answer)

        def do_PUT(self) -> None:
            found.scalings += 1
            self._answer(202, {"status": "Processing worker updates..."})

        def _answer(self, status: int, answer: object) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.port = server.server_port
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield found
        found.closed.set()
        server.shutdown()


@pytest.mark.parametrize(
    ("answers", "parks"),
    [
        ([PARKS], True),
        ([FULL, DIED, PARKS], True),
        ([FULL, OTHER], False),
        ([PLAIN], False),
        ([FAILED], False),
        ([FAILED_WITH_500], False),
    ],
    ids=["parks", "parks, once there is room", "other handler", "no handler's words", "failed", "failed with 500"],
)
def test_the_handlers_own_answer_counts(busy: Busy, answers: list[object], parks: bool) -> None:
    busy.answers = answers
    with Parking(busy.url, *KEY) as parking:
        assert parking.supported(within=20.0) is parks


@pytest.mark.parametrize("answer", [FULL, DIED, None], ids=["full", "died", "silent"])
def test_without_one_nobody_knows(busy: Busy, answer: object) -> None:
    busy.answers = [answer]
    with Parking(busy.url, *KEY) as parking, pytest.raises(TimedOut, match=r"m 1\.0 did not say .* it is too busy"):
        parking.supported(within=0.3)


def test_a_server_that_is_not_there_is_not_waited_for() -> None:
    with Parking(f"http://127.0.0.1:{free_port()}", *KEY) as parking, pytest.raises(Unreachable):
        parking.supported(within=60.0)


def test_a_busy_version_is_not_scaled_down_by_hand(busy: Busy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "DRAIN_SECONDS", 0.3)
    monkeypatch.setattr(replica_module, "folder_of", lambda worker: tmp_path)
    busy.answers = [FULL]
    replica = LocalReplica(store=tmp_path, inference_url="", management_url=busy.url, supervisor_url="")
    with pytest.raises(TimedOut, match="too busy"):
        replica.scale("m:1.0", 0)
    assert busy.scalings == 0


def test_the_watchdog_tries_a_busy_version_at_another_time(
    busy: Busy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog_module, "_PARK_SECONDS", 0.2)
    monkeypatch.setattr(watchdog_module, "_TRY_SECONDS", 60.0)
    busy.answers = [None]
    watch = Watch(ManagementClient(busy.url), lambda: ())
    log = ServerLog(lambda _: None, level="info", requests=False)
    dog = Watchdog(tmp_path, ServeSettings(management_port=busy.port), lambda: (), watch, log)
    try:
        for _ in range(3):
            with contextlib.ExitStack() as held:
                assert not dog._emptied(held, KEY, -1), "it may have work in hand"
        assert busy.asked == 1
        monkeypatch.setattr(watchdog_module, "_TRY_SECONDS", 0.0)
        busy.answers = [OTHER]
        with contextlib.ExitStack() as held:
            assert dog._emptied(held, KEY, -1)
    finally:
        dog.stop()


def test_the_autoscaler_goes_on_trying_a_busy_version(busy: Busy, tmp_path: Path) -> None:
    lines: list[str] = []
    scaler = Autoscaler(
        tmp_path, ServeSettings(management_port=busy.port, metrics_port=1), list,
        ServerLog(lines.append, level="info", requests=False),
        may_sleep=True, changing=threading.Lock(), alone=lambda: contextlib.nullcontext(True),
    )  # fmt: skip
    known = _Version(Autoscale(min=1, max=4))
    try:
        busy.answers = [FULL]
        began = time.monotonic()
        assert not scaler._shrunk(KEY, known, 1)
        assert time.monotonic() - began < 20
        assert scaler._cannot_park == set()
        assert busy.scalings == 0
        busy.answers = [PARKS]
        assert scaler._shrunk(KEY, known, 1)
        busy.answers = [OTHER]
        assert not scaler._shrunk(KEY, known, 1)
        assert not scaler._shrunk(KEY, known, 1)
    finally:
        scaler.stop()
    assert sum("is never scaled down" in line for line in lines) == 1
