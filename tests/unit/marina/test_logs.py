"""What the supervisor makes of java's output: recorded lines of TorchServe 0.12 in, causes and counts out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import pytest

from marina import logs
from marina.logs import LoadFailure, ServerLog

CHAINED = [
    "Backend worker process died.",
    "Traceback (most recent call last):",
    '  File "/x/ts/model_loader.py", line 108, in load',
    "    module, function_name = self._load_handler_file(handler)",
    "ModuleNotFoundError: No module named 'not_there'",
    "",
    "During handling of the above exception, another exception occurred:",
    "",
    "Traceback (most recent call last):",
    '  File "/x/ts/model_service_worker.py", line 301, in <module>',
    "ModuleNotFoundError: No module named 'ts.torch_handler.bad'",
]
RUNTIME = [
    "Failed to load model rt, exception odd",
    "Traceback (most recent call last):",
    "    initialize_fn(service.context)",
    "RuntimeError: odd",
    "Backend worker process died.",
    "Traceback (most recent call last):",
    "    worker.run_server()",
    "RuntimeError: 500 - Unknown exception",
]


def line(message: str, *, level: str = "INFO", logger: str = "MODEL_LOG", thread: str = "W-9000-m_1.0-stdout") -> bytes:
    record = {
        "time": "2026-01-01T00:00:00.000Z",
        "level": level,
        "logger": logger,
        "thread": thread,
        "message": message,
    }
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def request(path: str, status: int = 200, *, method: str = "POST", client: str = "/127.0.0.1:1") -> bytes:
    """As java prints it: see marina/torchserve/log4j2.xml."""
    return (
        '{"time":"2026-01-01T00:00:00.000Z","level":"INFO","logger":"access"} '
        f'{client} "{method} {path} HTTP/1.1" {status} 3\n'
    ).encode()


@pytest.fixture
def written() -> list[str]:
    return []


@pytest.fixture
def log(written: list[str]) -> ServerLog:
    return ServerLog(written.append, level="warning", requests=True)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_QUIET_SECONDS", -1.0)


@pytest.mark.parametrize(
    ("messages", "cause"),
    [
        (CHAINED, "ModuleNotFoundError: No module named 'not_there'"),
        (RUNTIME, "RuntimeError: odd"),
        (["Backend worker process died.", *CHAINED[8:]], "ModuleNotFoundError: No module named 'ts.torch_handler.bad'"),
        (["Backend worker process died."], "the worker ended without a word"),
    ],
    ids=["import", "runtime", "only the second try", "nothing"],
)
def test_the_cause_is_the_workers_own(log: ServerLog, messages: Sequence[str], cause: str) -> None:
    for message in messages:
        log.feed(line(message))
    found = log.failure()
    assert found is not None and found.label == "m_1.0" and found.cause.startswith(cause)


def test_an_announced_cause_is_taken_word_by_word(log: ServerLog, written: list[str]) -> None:
    log.feed(
        line('MARINA_LOAD_FAILED {"error": "one: two", "type": "SpecError"}', level="WARN", thread="W-9-m_1.0-stderr")
    )
    assert log.failure() == LoadFailure(label="m_1.0", cause="SpecError: one: two")
    assert written == []


def test_last_words_on_stderr_explain_a_killed_worker(log: ServerLog) -> None:
    log.feed(line("terminate called", level="WARN", thread="W-9000-m_1.0-stderr"))
    log.feed(
        line(
            "Load model failed: m, error: Worker died.", level="WARN", logger="x.BatchAggregator", thread="W-9000-m_1.0"
        )
    )
    found = log.failure()
    assert found is not None and "its last words: terminate called" in found.cause


def test_words_are_waited_for(log: ServerLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_QUIET_SECONDS", 60.0)
    log.feed(line("Backend worker process died."))
    assert log.failure() is None
    monkeypatch.setattr(time, "monotonic", lambda: float("inf"))
    assert log.failure() is not None


def test_an_archive_that_cannot_be_registered(log: ServerLog) -> None:
    log.feed(
        line("Error while registering model. Details: x", level="ERROR", logger="o.SnapshotManager", thread="main")
    )
    found = log.failure()
    assert found is not None and found.cause == "Error while registering model. Details: x"


def test_a_healthy_worker_is_no_failure(log: ServerLog) -> None:
    for message in ("Torch worker started.", "Connection accepted", "UserWarning: slow"):
        log.feed(line(message))
    assert log.failure() is None


def test_only_lines_of_the_level_are_passed_on_and_all_are_remembered(log: ServerLog, written: list[str]) -> None:
    log.feed(line("quiet"))
    log.feed(line("loud", level="WARN"))
    log.feed(b"Exception in thread main\n")
    log.feed(b"WARNING: sun.reflect.Reflection.getCallerClass is not supported.\n")
    assert [json.loads(text)["message"] for text in written] == ["loud", "Exception in thread main"]
    assert [text.split()[-1] for text in log.tail().splitlines()] == ["quiet", "loud", "main"]


@pytest.mark.parametrize(
    ("path", "status", "counted"),
    [
        ("/predictions/m", 200, 1),
        ("/predictions/m/1.0", 503, 1),
        ("/predictions/nobody", 404, 0),
        ("/ping", 200, 0),
        ("/models/m", 200, 0),
    ],
)
def test_answered_predictions_are_counted(log: ServerLog, path: str, status: int, counted: int) -> None:
    log.feed(request(path, status))
    assert log.finished == counted


def test_requests_can_be_left_out_of_the_log_and_still_count(written: list[str]) -> None:
    log = ServerLog(written.append, level="debug", requests=False)
    log.feed(request("/predictions/m", 200))
    assert written == [] and log.finished == 1


@pytest.mark.parametrize(
    "path",
    [
        "/predictions/m",
        "/predictions/m/1.0?top_k=3",
        '/predictions/"status":404,',
        "/a b c",
        "/\\x",
        "/é",
        "/\t",
        "/a\rb",
    ],
)
def test_a_request_is_one_record_whatever_its_path(log: ServerLog, written: list[str], path: str) -> None:
    log.feed(request(path, 418))
    (text,) = written
    assert json.loads(text) == {
        "time": "2026-01-01T00:00:00.000Z",
        "level": "INFO",
        "logger": "access",
        "client": "127.0.0.1:1",
        "method": "POST",
        "path": path,
        "protocol": "HTTP/1.1",
        "status": 418,
        "ms": 3,
    }


def test_the_gateways_ids_become_fields(log: ServerLog, written: list[str]) -> None:
    log.feed(request("/predictions/m?request_id=a-1&trace_id=0af7", client="/[0:0:0:0:0:0:0:1%0]:5"))
    record = json.loads(written[0])
    assert (record["path"], record["request_id"], record["trace_id"]) == ("/predictions/m", "a-1", "0af7")
    assert record["client"] == "[0:0:0:0:0:0:0:1%0]:5"


def test_many_lines_at_once_keep_their_order(log: ServerLog, written: list[str]) -> None:
    odd = request('/predictions/"')
    log.feed(request("/predictions/a") * 2 + odd + line("between", level="WARN") + request("/predictions/nobody", 404))
    lines = [json.loads(text) for text in "\n".join(written).splitlines()]
    assert [item.get("path", item.get("message")) for item in lines] == [
        "/predictions/a",
        "/predictions/a",
        '/predictions/"',
        "between",
        "/predictions/nobody",
    ]
    assert log.finished == 3


def test_looks_at_the_state_are_not_worth_a_line(log: ServerLog, written: list[str]) -> None:
    paths = ("/models/m/1.0", "/metrics?name[]=x", "/ping")
    log.feed(b"".join(request(path, method="GET") for path in paths))
    assert written == []
    log.feed(
        request("/ping", 500, method="GET") + request("/models/m", method="DELETE") + request("/pinger", method="GET")
    )
    assert [json.loads(text)["path"] for text in "\n".join(written).splitlines()] == ["/ping", "/models/m", "/pinger"]


def test_an_access_line_of_another_form_stays_a_record(log: ServerLog, written: list[str]) -> None:
    log.feed(b'{"time":"2026-01-01T00:00:00.000Z","level":"INFO","logger":"access"} gRPC says "hello"\n')
    assert json.loads(written[0])["message"].endswith('gRPC says "hello"')
