"""Each injected fault is named, with a remedy; a sound machine, store and log give nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from marina import doctor_cli, gateway, processes
from marina.archive import sha256_of
from marina.doctor import examine, host, signatures, stored
from marina.doctor.finding import CODES, Finding, Repair
from marina.errors import ConfigError
from marina.home import Home
from marina.screen import Screen
from support.artifacts import write_artifact
from support.commands import environment, marina, project
from support.engines import write_torch_engine

SOUND = """\
minWorkers: 1
maxWorkers: 1
batchSize: 4
maxBatchDelay: 1
responseTimeout: 60
startupTimeout: 60
jobQueueSize: 100
maxRetryTimeoutInSec: 86400
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Home(project(tmp_path / "p"))
    found.store.mkdir()
    return found


def surroundings(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MARINA_", "CUDA_", "JAVA_"))}
    return {**kept, **changes}


def on_host(home: Home, **changes: str) -> dict[str, Finding]:
    machine = host.Host(home=home, environment=surroundings(**changes), serving=True)
    return {finding.code: finding for finding in host.check(machine)}


def put(home: Home, name: str, version: str, config: str = SOUND, *, file: str = "", engine: str = "") -> Path:
    """An archive with its line in the index."""
    path = home.store / (file or f"{name}-{version}.mar")
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("model-config.yaml", config)
        packed.writestr("weights.safetensors", b"0" * 4096)
        if engine:
            packed.writestr("engine.json", engine)
    index = home.store / "index.json"
    value = json.loads(index.read_text()) if index.exists() else {"schema": 1, "archives": {}}
    value["archives"][path.name] = {
        "name": name, "version": version, "sha256": sha256_of(path), "bytes": path.stat().st_size,
    }  # fmt: skip
    index.write_text(json.dumps(value))
    return path


def in_store(home: Home) -> dict[str, Finding]:
    return {finding.code: finding for finding in stored.check(home.store)}


# ------------------------------------------------------------------------------------------------------------- machine


def test_this_machine_is_sound(home: Home) -> None:
    assert on_host(home) == {}


@pytest.mark.parametrize("broken", ["/nowhere", "old"])
def test_java(home: Home, tmp_path: Path, broken: str) -> None:
    java_home = Path(broken)
    if broken == "old":
        java_home = tmp_path / "jdk"
        (java_home / "bin").mkdir(parents=True)
        (java_home / "release").write_text('JAVA_VERSION="1.8.0_292"\n')
        (java_home / "bin" / "java").write_text("#!/bin/sh\n")
        (java_home / "bin" / "java").chmod(0o755)
    found = on_host(home, JAVA_HOME=str(java_home))
    code = "java-too-old" if broken == "old" else "java-missing"
    assert list(found) == [code]
    assert str(java_home) in found[code].cause
    assert found[code].exit_code == 6


def test_configuration(home: Home) -> None:
    home.config.write_text(home.config.read_text() + "job_queue_sise=3\n")
    found = on_host(home)
    assert "job_queue_size" in found["configuration"].cause
    assert re.search(r"config\.properties:\d+", found["configuration"].cause)
    assert "MARINA_PROT" in on_host(home, MARINA_PROT="1")["configuration"].cause


def test_a_public_management_address(home: Home) -> None:
    text = home.config.read_text().replace("management_address=http://127.0.0.1", "management_address=http://0.0.0.0")
    home.config.write_text(text)
    finding = on_host(home)["public-address"]
    assert "0.0.0.0" in finding.cause
    assert "127.0.0.1" in finding.remedy


def test_a_taken_port(home: Home) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        machine = host.Host(home=home, environment=surroundings(MARINA_INFERENCE_PORT=str(port)), serving=False)
        found = [finding for finding in host.check(machine) if finding.code == "port-taken"]
    assert any(str(port) in finding.cause and "--port" in finding.remedy for finding in found)


def test_temp_folders(home: Home, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    assert str(processes.SOCKET_PATH_LIMIT) in on_host(home, TMPDIR=str(long))["socket-path-too-long"].evidence
    assert "temp-folder-unusable" in on_host(home, TMPDIR=str(tmp_path / "absent"))


def test_full_disks(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SMALLEST_FREE_BYTES", 2**62)  # no disk has as much
    found = on_host(home)
    assert {"disk-full", "temp-folder-full"} <= set(found)
    assert "MiB left" in found["disk-full"].cause


def test_memory(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "WORKER_BYTES", 2**60)
    machine = host.Host(home=home, environment=surroundings(), serving=False)
    assert "host-memory" in {finding.code for finding in host.check(machine)}
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 2\n")
    assert host._killed_by_kernel(events) == 2
    assert host._killed_by_kernel(tmp_path / "absent") == 0


def test_gpus(home: Home, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: Some GPU (UUID: GPU-1234)'\n")
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert "numbers only" in on_host(home, CUDA_VISIBLE_DEVICES="GPU-1234")["gpu-visibility"].cause
    assert "GPU 3" in on_host(home, CUDA_VISIBLE_DEVICES="0,3", PATH=path)["gpu-visibility"].cause
    assert on_host(home, CUDA_VISIBLE_DEVICES="0", PATH=path) == {}
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch' >&2; exit 18\n")
    assert list(on_host(home, PATH=path)) == ["gpu-driver"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert list(on_host(home, PATH=path, MARINA_DEVICE="gpu")) == ["gpu-missing"]


def test_keys(home: Home) -> None:
    made = gateway.create_keys(home.root / "secrets")
    assert on_host(home) == {}
    made.key.chmod(0o644)
    finding = on_host(home)["keys"]
    assert finding.severity == "warning"
    assert finding.repair is not None
    finding.repair.run()
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    gateway.revoke_keys(made.clients, "first")
    assert "does not know the key" in on_host(home)["keys"].cause
    made.clients.write_text("nonsense\n")
    assert "line 1" in on_host(home)["keys"].cause


def test_permissions(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = put(home, "m", "1.0")
    allowed = os.access
    # Asked of the system for every other path; root, as whom the tests may run, may read anything.
    monkeypatch.setattr(host.os, "access", lambda path, mode: path != archive and allowed(path, mode))
    assert "m-1.0.mar" in on_host(home)["file-permissions"].cause


# --------------------------------------------------------------------------------------------------------------- store


def test_a_sound_store(home: Home) -> None:
    put(home, "m", "1.0")
    assert in_store(home) == {}


def test_an_empty_store(home: Home) -> None:
    assert list(in_store(home)) == ["store-empty"]


def test_a_flipped_byte_and_a_cut_file(home: Home) -> None:
    path = put(home, "m", "1.0")
    whole = path.read_bytes()
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr("extra.py", "import os\n")
    assert "m-1.0.mar" in in_store(home)["archive-tampered"].cause
    path.write_bytes(whole.replace(b"0" * 4096, b"0" * 2000 + b"1" + b"0" * 2095))
    assert "weights.safetensors" in in_store(home)["archive-corrupt"].cause
    path.write_bytes(whole[:-30])
    assert "archive-corrupt" in in_store(home)
    path.unlink()
    assert in_store(home)["model-not-in-store"].severity == "warning"


def test_an_engine_that_was_built_for_another_machine(home: Home) -> None:
    built = write_torch_engine(write_artifact(home.root / "artifacts"))
    put(home, "m", "1.0", engine=built.to_json())
    assert in_store(home) == {}
    elsewhere = dataclasses.replace(built, built_for=dataclasses.replace(built.built_for, machine="riscv64"))
    put(home, "m", "1.0", engine=elsewhere.to_json())
    found = in_store(home)["engine-elsewhere"]
    assert "m-1.0.mar" in found.cause and "riscv64" in found.cause and found.severity == "warning"


def test_what_is_to_be_served_must_be_there(home: Home) -> None:
    put(home, "m", "1.0")
    wanted = {"models": {"m": {"default": "1.1", "versions": {"1.0": 1, "1.1": 1}, "previous": None}}}
    (home.store / "serving.json").write_text(json.dumps(wanted))
    finding = in_store(home)["model-not-in-store"]
    assert "m 1.1" in finding.cause
    assert finding.severity == "fault"


def test_strangers_clashes_and_a_damaged_index(home: Home) -> None:
    put(home, "m", "1.0")
    put(home, "m", "1.0", file="copy.mar")
    put(home, "another", "1.0")
    (home.store / "other.mar").write_bytes(b"")
    found = in_store(home)
    assert found["version-clash"].cause.endswith("are m 1.0: copy.mar, m-1.0.mar")
    assert "--publish" in found["archive-not-indexed"].remedy
    (home.store / "index.json").write_text('{"archives": {"a": 1}}')
    assert list(in_store(home)) == ["index-damaged"]


@pytest.mark.parametrize(
    ("code", "before", "after"),
    [
        ("batch-delay", "maxBatchDelay: 1\n", "maxBatchDelay: 0\n"),
        ("batch-delay", "maxBatchDelay: 1\n", "maxBatchDelay: 5000\n"),
        ("workers-min-max", "maxWorkers: 1\n", ""),
        ("implicit-timeout", "responseTimeout: 60\n", ""),
        ("implicit-timeout", "startupTimeout: 60\n", ""),
        ("queue-too-small", "jobQueueSize: 100\n", "jobQueueSize: 5\n"),
        ("model-configuration", "batchSize: 4\n", "batchSize: 4\nuseJobTicket: true\n"),
    ],
)
def test_traps_of_a_model_configuration(home: Home, code: str, before: str, after: str) -> None:
    assert before in SOUND
    put(home, "m", "1.0", SOUND.replace(before, after))
    assert list(in_store(home)) == [code]


# ----------------------------------------------------------------------------------------------------------------- log

DIED = (  # of a worker that is killed
    "2026-11-21T20:51:08,205 [DEBUG] W-9000-m_1.0 org.pytorch.serve.wlm.WorkerThread - Backend worker monitoring thread "
    "interrupted or backend worker process died., responseTimeout:5sec"
)
STOCK = "2026-11-21T09:00:00,123 [INFO ] W-9000-m_1.0-stdout MODEL_LOG - "
WATCHDOG = "worker 9001 (pid 22645) of m 1.0 is recycled: "
MESSAGES = [
    ("java-too-old", "java.lang.UnsupportedClassVersionError: org/pytorch/serve/ModelServer has been compiled by"),
    ("java-missing", "error: no java: JAVA_HOME is not set"),
    ("torchserve-missing", STOCK + "ModuleNotFoundError: No module named 'ts'"),
    ("handler-import", STOCK + "ModuleNotFoundError: No module named 'yaml'"),
    ("handler-import", STOCK + "ImportError: cannot import name 'pydantic_core' from 'x'"),
    ("handler-import", STOCK + "SyntaxError: invalid syntax"),
    ("shared-library-missing", STOCK + "ImportError: libGL.so.1: cannot open shared object file: No such file"),
    ("archive-corrupt", "org.pytorch.serve.archive.model.InvalidModelException: Failed to unzip"),
    ("archive-corrupt", STOCK + "_pickle.UnpicklingError: Weights only load failed. In PyTorch 2.6"),
    ("model-not-in-store", "org.pytorch.serve.archive.model.ModelNotFoundException: Model not found at: m.mar"),
    ("version-clash", "ConflictStatusException: Model version 1.0 is already registered for model m"),
    ("port-taken", "Caused by: java.net.BindException: Address already in use"),
    ("disk-full", STOCK + "OSError: [Errno 28] No space left on device"),
    ("socket-path-too-long", STOCK + "OSError: AF_UNIX path too long"),
    ("too-few-file-descriptors", "java.io.IOException: Too many open files"),
    ("java-memory", "java.lang.OutOfMemoryError: Java heap space"),
    ("java-memory", "java.lang.OutOfMemoryError: Cannot reserve 16384 bytes of direct buffer memory"),
    ("host-memory", STOCK + "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ("worker-killed", "torchserve-1 exited with code 137"),
    ("worker-killed", '[INFO ] W-9000-m_1.0 ACCESS_LOG - /127.0.0.1:46880 "POST /predictions/m HTTP/1.1" 507 56'),
    ("worker-killed", WATCHDOG + "died: the kernel ended it for want of memory"),
    ("worker-killed", WATCHDOG + "died: ended from outside, or crashed in native code: it left no word"),
    ("worker-killed", "an input has ended a second worker and is refused with 422 from now on: sha256 87d7c5bc"),
    ("worker-dead", WATCHDOG + "died: the worker ended without a Python error; its last words: bye"),
    ("worker-dead", WATCHDOG + "stopped: the process was stopped by a signal (SIGSTOP)"),
    ("worker-dead", WATCHDOG + "waiting: TorchServe waits before it starts this one again, or has given up"),
    ("handler-import", WATCHDOG + "died: ModuleNotFoundError: No module named 'yaml'"),
    ("gpu-error", WATCHDOG + "gpu: CUDA error: device-side assert triggered"),
    ("answer-timeout", WATCHDOG + "hung: no answer for 2.2 s to 1 input; the longest batch before took 0.00 s"),
    ("host-memory", "the memory limit of 400 MB is not kept for m 1.0: a worker that has just loaded takes 512 MB"),
    ("host-memory", WATCHDOG + "memory: 900 MB resident, the limit is 500 MB"),
    ("gpu-memory", STOCK + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
    ("gpu-driver", STOCK + "RuntimeError: CUDA error: no kernel image is available for execution on the device"),
    ("gpu-driver", STOCK + "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)"),
    ("gpu-visibility", STOCK + "RuntimeError: CUDA error: invalid device ordinal"),
    ("gpu-error", STOCK + "RuntimeError: CUDA error: device-side assert triggered"),
    ("load-timeout", "org.pytorch.serve.wlm.WorkerInitializationException: Backend worker startup time out."),
    ("answer-timeout", "[ERROR] W-9000-m_1.0 WorkerThread - Number or consecutive unsuccessful inference 1"),
    ("response-too-large", "io.netty.handler.codec.TooLongFrameException: response is too large"),
    ("request-too-large", "io.netty.handler.codec.http.TooLongHttpContentException: HTTP/1.1 413 entity too large"),
    ("tokens", "InvalidKeyException: Token Authorization failed. Token either incorrect, expired, or not provided"),
    ("queue-full", 'ServiceUnavailableException: Model "m" has no worker to serve inference request. Please use scale'),
    ("file-permissions", "java.nio.file.AccessDeniedException: /srv/model_store/m.mar"),
    ("model-refused", 'MARINA_LOAD_FAILED {"type": "SelfTestFailed", "error": "golden sample golden/0.png: expected"}'),
    ("configuration", "config.properties:3: job_queue_sise: TorchServe 0.12 knows no such key and would ignore it"),
    ("handler-error", STOCK + "KeyError: 'body'"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "line"), MESSAGES)
def test_a_line_of_a_log_betrays_its_cause(code: str, line: str) -> None:
    found = list(signatures.in_log(["all is well\n", line + "\n", DIED + "\n"]))
    finding = found[0]
    assert finding.code == code, finding
    # What is only in danger does not explain a death.
    assert [item.code for item in found[1:]] == ([] if finding.severity == "fault" else ["worker-dead"])
    assert finding.remedy
    assert "{" not in finding.cause


@pytest.mark.parametrize(("code", "line"), MESSAGES)
def test_the_same_inside_a_log_of_ours(code: str, line: str) -> None:
    record = {"time": "t", "level": "WARN", "logger": "MODEL_LOG", "message": line.removeprefix(STOCK)}
    (finding,) = signatures.in_log([json.dumps(record)])
    assert finding.code == code, finding


def test_an_engine_that_does_not_fit_is_told_and_one_that_is_switched_off_is_not() -> None:
    line = (
        STOCK + "x 1.0: the plain weights answer instead of the engine openvino-int8: "
        "this processor lacks avx512_vnni ({reason})"
    )
    (found,) = signatures.in_log([line.format(reason="cpu-feature")])
    assert (found.code, found.severity) == ("engine-elsewhere", "warning")
    assert "openvino-int8" in found.cause and "this processor lacks avx512_vnni" in found.cause
    assert list(signatures.in_log([line.format(reason="switched-off")])) == []


def test_worker_died_is_never_the_last_word() -> None:
    (alone,) = signatures.in_log([DIED])
    assert (alone.code, alone.evidence) == ("worker-dead", DIED)
    (failed,) = signatures.in_log(["[WARN ] W-9001-m_1.0 BatchAggregator - Load model failed: m, error: Worker died."])
    assert failed.code == "worker-dead"
    traceback = [
        STOCK + "Traceback (most recent call last):",
        STOCK + '  File "/tmp/models/x/handler.py", line 1, in <module>',
        STOCK + "    import cv3",
        STOCK + "ModuleNotFoundError: No module named 'cv3'",
        STOCK + "During handling of the above exception, another exception occurred:",
        STOCK + "ModuleNotFoundError: No module named 'ts.torch_handler.handler'",
        STOCK + "RuntimeError: 500 - Unknown exception",
        DIED,
    ]
    (explained,) = signatures.in_log(traceback)
    assert explained.code == "handler-import"
    assert "'cv3'" in explained.cause


def test_deaths_that_the_watchdog_tells_of_hide_behind_no_warning_and_count_once() -> None:
    refused = 'Model "m" has no worker to serve inference request. Please use scale workers API to add workers.'
    died = "worker 900{0} (pid 2264{0}) of m 1.0 is recycled: died: the worker ended without a Python error"
    found = list(signatures.in_log([refused, *(died.format(number) for number in range(3))]))
    assert [(item.code, item.severity) for item in found] == [("queue-full", "warning"), ("worker-dead", "fault")]


def test_a_quiet_log_betrays_nothing() -> None:
    access = '{"time":"t","level":"INFO","logger":"access","path":"/predictions/m","status":200,"ms":4}'
    assert list(signatures.in_log([access, "Model server started.", ""])) == []


def test_an_unreadable_log_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        examine.examine_log(tmp_path / "absent.log")


@pytest.mark.parametrize("signature", signatures.SIGNATURES, ids=lambda signature: signature.code)
@hypothesis.settings(max_examples=25, derandomize=True, deadline=None, database=None)
@hypothesis.given(data=hypothesis.strategies.data())
def test_no_line_that_fits_a_pattern_is_passed_over(signature: signatures.Signature, data: Any) -> None:
    assert signatures._may_tell(data.draw(hypothesis.strategies.from_regex(signature.pattern)))


LINES = (  # what TorchServe writes per request
    "2026-11-21T14:59:58,703 [INFO ] W-9001-m_1.0 TS_METRICS - QueueTime.Milliseconds:{0}.0|#Level:Host|#hostname:vm",
    "2026-11-21T14:59:58,840 [INFO ] W-9001-m_1.0-stdout MODEL_METRICS - HandlerTime.ms:132.48|#ModelName:m|#id:{0}",
    "2026-11-21T14:59:58,841 [INFO ] W-9001-m_1.0 org.pytorch.serve.wlm.WorkerThread - Backend response time: {0}",
    "2026-11-21T14:59:58,841 [DEBUG] W-9001-m_1.0 org.pytorch.serve.job.RestJob - Waiting time ns: {0}, Backend time",
    '2026-11-21T14:59:58,842 [INFO ] W-9001-m_1.0 ACCESS_LOG - /127.0.0.1:4475 "POST /predictions/m HTTP/1.1" 200 {0}',
    '{{"time":"2026-11-21T14:59:58.842Z","level":"INFO","logger":"access","path":"/predictions/m","ms":{0}}}',
)
ILL = STOCK + "RuntimeError: CUDA error: an illegal memory access was encountered\n"


def long_log(path: Path, first: str, size: int) -> Path:
    block = "".join(LINES[number % len(LINES)].format(number) + "\n" for number in range(30_000))
    with path.open("w") as log:
        log.write(first)
        while log.tell() < size:
            log.write(block)
    return path


def test_a_log_of_ordinary_size_is_read_within_the_limit(tmp_path: Path) -> None:
    (found,) = examine.examine_log(long_log(tmp_path / "log", ILL, 50 << 20))
    assert (found.code, "illegal memory access" in found.evidence) == ("gpu-error", True)


def test_of_a_long_log_the_end_is_read_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "LOG_BYTES", 1 << 20)
    log = long_log(tmp_path / "log", ILL, 3 << 20)
    (cut,) = examine.examine_log(log)
    assert (cut.code, cut.severity) == ("log-partly-read", "warning")
    assert f"only the last 1 MB of {log.stat().st_size >> 20} MB" in cut.cause
    with log.open("a") as more:
        more.write(ILL)
    assert {found.code for found in examine.examine_log(log)} == {"gpu-error", "log-partly-read"}


def test_what_was_found_until_the_limit_is_told() -> None:
    """The clock's limit comes while the log is read."""
    ends = time.monotonic() + 0.2

    def lines() -> Iterator[str]:
        yield ILL
        while time.monotonic() < ends + 30.0:
            yield "all is well\n"

    found, late = signatures.in_log(lines(), ends=ends)
    assert found.code == "gpu-error"
    assert (late.code, late.severity) == ("log-partly-read", "warning")
    assert re.search(r"read to line [1-9]\d*,", late.cause)


def test_a_log_alone_that_nobody_writes_to_does_not_hang_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "log")
    monkeypatch.setattr(examine, "SECONDS", 0.2)
    (found,) = examine.examine_log(tmp_path / "log")
    assert "did not end" in found.cause
    os.close(os.open(tmp_path / "log", os.O_WRONLY | os.O_NONBLOCK))  # lets the thread go


def test_at_least_twenty_five_faults_have_a_name() -> None:
    named = {code for code, _ in MESSAGES}
    assert len(named) >= 25
    assert named <= set(CODES)


# --------------------------------------------------------------------------------------------------------------- whole


def test_what_hangs_is_named_and_keeps_neither_the_others_nor_the_process(home: Home) -> None:
    """A server that takes connections and never answers, and a log that nobody writes to."""
    log = home.root / "log"
    os.mkfifo(log)
    with socket.create_server(("127.0.0.1", 0)) as supervisor, socket.create_server(("127.0.0.1", 0)) as management:
        ports = [str(item.getsockname()[1]) for item in (supervisor, management)]
        ran = marina(
            home.root, "doctor", "--json", "--log", log, timeout=60,
            MARINA_SUPERVISOR_PORT=ports[0], MARINA_MANAGEMENT_PORT=ports[1],
        )  # fmt: skip
    causes = [item["cause"] for item in ran.json["findings"]]
    for port in ports:
        assert any(f"127.0.0.1:{port} hangs" in cause for cause in causes), causes
        assert not any(f"port {port}" in cause for cause in causes), "nobody is told to stop it as a stranger"
    assert any("checks of the log did not end" in cause for cause in causes)
    assert "store-empty" in {item["code"] for item in ran.json["findings"]}


@pytest.mark.parametrize(
    ("error", "code"), [(PermissionError(13, "denied", "/x"), "file-permissions"), (ValueError("odd"), "check-failed")]
)
def test_a_check_that_breaks_hides_none_of_the_others(
    home: Home, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    def broken(_: object) -> Iterator[Finding]:
        yield Finding(code="disk-full", cause="seen before", remedy="r")
        raise error

    monkeypatch.setattr(examine.host, "check", broken)
    found = {finding.code for finding in examine.examine(home, surroundings())}
    assert {"store-empty", "disk-full", code} <= found


def test_keys_of_another_user_are_a_finding(home: Home) -> None:
    (home.root / "secrets").mkdir(mode=0)
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from marina.doctor import host\n"
        "from marina.home import Home\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "print(*(found.code for found in host._allowed(host._keys(Home(Path(sys.argv[1]))))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(home.root)], env=environment(home.root), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "file-permissions\n"), done.stderr


def test_a_repair_that_is_not_allowed_is_said_and_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = Path("/proc/self/status")  # not even root may change its mode
    finding = Finding(
        code="keys", cause="c", remedy="r", repair=Repair(what="close it", run=lambda: theirs.chmod(0o600))
    )
    assert doctor_cli._repair([finding], Screen(False)) == []
    assert "not done: close it: Operation not permitted" in capsys.readouterr().out
