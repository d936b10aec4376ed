"""One TorchServe on this machine: start it checked, know when it is ready, know why it is not, stop all of it.

The supervisor starts java itself, reads everything that java and the workers print, and watches the workers through the
management interface, because TorchServe's own `/ping` says healthy while models load, fail to load and crash in a loop.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TextIO

import requests

from marina import fork_server, fork_worker, frontend_patch, java, processes, properties
from marina.autoscale import Autoscale
from marina.autoscale_loop import Autoscaler
from marina.client import NO_RETRIES, InferenceClient, ManagementClient, Timeout
from marina.errors import ConfigError, MarinaError, NoDevice, NotReady, ServerDied, ServerError
from marina.logs import LoadFailure, ServerLog
from marina.settings import ENGINE_SWITCH, Kind, ServeSettings
from marina.watch import Port, Scaling, State, Watch, accepted
from marina.watchdog import Watchdog

Reason = Literal["SIGINT", "SIGTERM", "drain"]
_Event = Literal["SIGINT", "SIGTERM", "drain", "ended"]

_POLL_SECONDS = 0.1
_FORK_SOCKET = "fork.sock"
_READ_BYTES = 65536
"""As much as a pipe holds."""
_READ_PAUSE_SECONDS = 0.01
"""25,000 requests a second print 32 KiB meanwhile."""
_STARTING_NICE = 6
"""A quarter of the weight of a session that answers: on cores that are busy without end, a start gets on all the same."""
_REMOVED_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "CLASSPATH")
"""Each of them can put other code in front of an archive's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """One archive to serve."""

    name: str
    version: str
    archive_file: Path
    """Absolute; all archives of one server lie in one folder."""
    default: bool
    """Whether requests without a version go to this one: exactly one version of each name."""
    config: Mapping[str, Any]
    """The archive's model-config.yaml."""
    sha256: str = ""
    """Of the archive, for the metrics."""
    autoscale: Autoscale | None = None
    """Bounds between which the supervisor changes the number of workers; None: it stays."""
    scaled: int | None = None
    """Workers that the autoscaler means it to have."""
    scaled_required: int | None = None
    """Of them, those that must be ready."""

    @property
    def workers(self) -> int:
        """Workers that it is meant to have."""
        if self.scaled is not None:
            return self.scaled
        meant = self._whole("minWorkers", 1)
        return self.autoscale.clamped(meant) if self.autoscale is not None else meant

    @property
    def required(self) -> int:
        """Of them, those that must be ready for the server to be."""
        return self.workers if self.scaled_required is None else self.scaled_required

    def snapshot(self) -> dict[str, object]:
        """Its entry in TorchServe's `model_snapshot`. Raises ConfigError for a value that TorchServe would ignore."""
        return {
            "defaultVersion": self.default,
            "marName": self.archive_file.name,
            "minWorkers": self.workers,
            "maxWorkers": max(self.workers, self._whole("maxWorkers", self.workers)),
            "batchSize": self._whole("batchSize", 1),
            # 0 would mean batches of at most two here, and 100 ms in model-config.yaml.
            "maxBatchDelay": self._whole("maxBatchDelay", 1),
            "responseTimeout": self._whole("responseTimeout", 60),
            "startupTimeout": self._whole("startupTimeout", 300),
        }

    def _whole(self, key: str, default: int) -> int:
        value = self.config.get(key, default)
        if type(value) is not int or value < 1:
            raise ConfigError(
                f"{self.archive_file.name}: {key} in model-config.yaml must be a whole number of at least 1, got {value!r}",
                remedy="correct it and pack the archive again",
            )
        return value


Prove = Callable[[ServedModel, InferenceClient], None]
"""Sends a model's golden samples; raises MarinaError when an answer is not the stored one."""


def model_snapshot(models: Sequence[ServedModel]) -> str:
    """The one way of loading models at start that honours default version, several versions and batch delay; JSON."""
    named: dict[str, dict[str, dict[str, object]]] = {}
    for model in models:
        versions = named.setdefault(model.name, {})
        if model.version in versions:
            raise ConfigError(f"{model.name} {model.version} is given twice", remedy="leave one of the two out")
        versions[model.version] = model.snapshot()
    for name, versions in named.items():
        defaults = [version for version, entry in versions.items() if entry["defaultVersion"]]
        if len(defaults) != 1:
            raise ConfigError(
                f"{name}: {len(defaults)} of the versions {', '.join(versions)} are marked as default",
                remedy="mark exactly one",
            )
    return json.dumps({"name": "startup.cfg", "modelCount": len(models), "models": named}, separators=(",", ":"))


class Server:
    """TorchServe with the given models. `with Server(models, settings) as server:` starts it and waits until it is ready;
    leaving the block stops everything. `serve_forever` is the same for a command, with signals.

    `start` raises ConfigError, NoJava, NoDevice, PortBusy, NotReady or ServerDied, and then nothing is left running.
    A Server is started once.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        settings: ServeSettings | None = None,
        *,
        prove: Prove | None = None,
        expected: Callable[[], Sequence[ServedModel]] | None = None,
        environment: Mapping[str, str] | None = None,
        alone: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(True),
    ) -> None:
        """`expected` says what must be ready at any later moment, when rollouts change it; else always `models`.
        `alone` keeps rollouts away while the autoscaler changes something, and says False when one is at work."""
        self.settings = settings or ServeSettings()
        self.models = tuple(self._bounded(models))
        self._meant = expected or (lambda: self.models)
        self.folder: Path | None = None
        """The private temp folder while running."""
        self.seconds_to_ready: float = 0.0
        self._prove = prove
        self._environment = dict(os.environ if environment is None else environment)
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._output: TextIO | None = None
        self._lost = False
        """Whether a line of the log could not be written."""
        self._log = ServerLog(self._write, level=self.settings.log_level, requests=self.settings.log_requests)
        self._management = ManagementClient(
            self.settings.url("management"), timeout=Timeout(connect=1.0, read=5.0), retries=NO_RETRIES
        )
        self._watch = Watch(self._management, self.expected)
        self._watchdog: Watchdog | None = None
        self._autoscaler: Autoscaler | None = None
        self._alone = alone
        self._holds_requests = False
        self._port: Port | None = None
        self._proved = False
        self._draining = False
        self._lock: int | None = None
        self._forking: Path | None = None
        """What java starts in place of python, with a fork server."""
        self._hidden: list[str] = []
        """Environment variables that workers do not get."""

    @property
    def inference_url(self) -> str:
        """Base address of predictions."""
        return self.settings.url("inference")

    @property
    def management_url(self) -> str:
        """Base address of the management interface."""
        return self.settings.url("management")

    @property
    def metrics_url(self) -> str:
        """Base address of TorchServe's metrics."""
        return self.settings.url("metrics")

    @property
    def supervisor_url(self) -> str:
        """Base address of /livez, /readyz, /metrics, /failures and /drain."""
        return self.settings.url("supervisor")

    @property
    def pid(self) -> int | None:
        """java's process id while it runs."""
        return self._process.pid if self._process is not None else None

    def expected(self) -> Sequence[ServedModel]:
        """What is meant to be served at this moment, with the numbers of workers that the autoscaler has come to."""
        models = self._bounded(self._meant())
        numbers = self._autoscaler.numbers() if self._autoscaler is not None else {}
        return [_with_workers(model, numbers.get((model.name, model.version))) for model in models]

    def _bounded(self, models: Sequence[ServedModel]) -> list[ServedModel]:
        if self.settings.autoscale:
            return list(models)
        return [replace(model, autoscale=None) for model in models]

    def log_tail(self, lines: int = 40) -> str:
        """The last lines that java and the workers printed."""
        return self._log.tail(lines)

    @property
    def ready_line(self) -> str:
        """What the command prints once everything is ready."""
        names = list(dict.fromkeys(model.name for model in self.models))
        address = f"{self.inference_url}/predictions" + (f"/{names[0]}" if len(names) == 1 else "")
        several = {name for name in names if sum(model.name == name for model in self.models) > 1}
        parts = [
            f"{model.name} {model.version}{' (default)' if model.default and model.name in several else ''}, "
            f"{model.workers} worker{'s' if model.workers != 1 else ''}"
            for model in self.models
        ]
        return f"ready {address} ({'; '.join(parts)}) in {self.seconds_to_ready:.1f} s"

    def start(self) -> None:
        """Start java and return when every worker is ready and the golden samples are answered."""
        started = time.monotonic()
        if self.settings.log_file is not None:
            self._open_log(self.settings.log_file)
        try:
            command, environment = self._prepare()
            if self.settings.supervisor_port:
                self._port = Port(self.settings.supervisor_host, self.settings.supervisor_port, _Supervised(self))
            self._launch(command, environment)
            with self._gently():
                self._wait_ready(started + self.settings.startup_timeout)
                self._prove_all()
        except BaseException:
            self.stop(drain=False)
            raise
        self._watch.start(self.settings.watch_seconds)
        if self._watchdog is not None:
            self._watchdog.start()
        if self._autoscaler is not None:
            self._autoscaler.start()
        self.seconds_to_ready = time.monotonic() - started

    def stop(self, *, drain: bool = True) -> None:
        """Wait for the requests already accepted, at most `drain_seconds`, then stop java, its workers and ourselves."""
        if drain and self.alive():
            self._drain()
        self._draining = True
        if self._autoscaler is not None:
            self._autoscaler.stop()
        if self._watchdog is not None:
            self._watchdog.stop()
        self._watch.stop()
        if self._process is not None:
            # Not SIGTERM first: java would cut open connections at once as well, kill the workers, and take 2 s over it.
            processes.kill_session(self._process)
        if self._reader is not None:
            self._reader.join()
        self._management.close()
        if self._port is not None:
            self._port.close()
        if self.folder is not None and self._lock is not None:
            processes.remove_folder(self.folder, self._lock)
        if self._output is not None:
            with suppress(OSError):  # of what could not be written before
                self._output.close()
        self._process = self._reader = self._port = self.folder = self._lock = self._output = None

    def serve_forever(self, announce: Callable[[str], None] = print) -> Reason:
        """Start, `announce` the ready line, and return what asked for the stop when everything is stopped.

        Only for the main thread: SIGINT and SIGTERM drain and stop, a second one stops at once. Raises what `start`
        raises, and ServerDied when java ends by itself.
        """
        with self._signals():
            try:
                self.start()
            except _Interrupted as interrupted:
                return interrupted.reason
            try:
                announce(self.ready_line)
                # Polled: a signal that the system hands to another thread does not end this thread's waiting.
                while (event := self._next_event(_POLL_SECONDS)) is None:
                    processes.reap_orphans(self.pid)
            except BaseException:
                self.stop(drain=False)
                raise
            if event == "ended":
                death = self._death()
                self.stop(drain=False)
                raise death
            self._log.note(f"stopping: {event}")
            self.stop()
            return event

    def alive(self) -> bool:
        """Whether java runs."""
        return self._process is not None and self._process.poll() is None

    def require_alive(self) -> None:
        """Raises ServerDied with java's last words when it does not run."""
        if not self.alive():
            raise self._death()

    def not_ready(self) -> list[str]:
        """Why requests should not come here, one line each; empty when they may."""
        if self._draining:
            return ["draining"]
        if not self.alive():
            return ["java is not running"]
        if not self._proved:
            return ["starting"]
        state = self._watch.state
        if time.monotonic() - state.seen_at > 3 * self.settings.watch_seconds + 5:
            return ["the management interface has not answered lately", *state.missing()]
        return state.missing()

    def stuck(self) -> bool:
        """Whether requests that are here wait in vain: java is gone, or every worker."""
        return not self.alive() or (self._proved and self._watch.state.stuck)

    def in_flight(self) -> int | None:
        """Predictions accepted and not yet answered, never too few; None when TorchServe does not say."""
        finished = self._log.finished  # read first: what ends in between counts as still in flight
        try:
            return max(0, accepted(self.metrics_url) - finished)
        except (requests.RequestException, ValueError):
            return None

    def request_drain(self) -> None:
        """From now on not ready; `serve_forever` drains and returns."""
        self._draining = True
        self._events.put("drain")

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop(drain=kind is None)

    # ---- starting

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        """Everything that can be refused before a process starts, then the rendered configuration."""
        settings = self.settings
        found = java.find(self._environment)
        base = properties.check(
            properties.load(settings.config), environment=self._environment, expose=tuple(settings.expose)
        )
        snapshot = model_snapshot(self.models)
        store = self._model_store()
        self._check_device()
        for kind in settings.kinds():
            option = "--port" if kind == "inference" else f"--{kind}-port"
            processes.require_port(settings.host(kind), settings.port(kind), purpose=kind, option=option)
        self.folder, self._lock = processes.private_folder()
        changing = threading.Lock()
        self._watchdog = Watchdog(self.folder, settings, self.expected, self._watch, self._log, changing=changing)
        self._forking = fork_worker.program() if settings.fork_server else None
        if settings.fork_server and self._forking is None:
            self._log.note("each worker imports torch by itself: `marina-worker` is not beside `marina`; install again")
        file = self.folder / "config.properties"
        file.write_text(properties.render(base, self._overrides(snapshot)), encoding="ascii")
        command = java.command(
            found,
            config=file,
            model_store=store,
            temp=self.folder,
            vm_options=shlex.split(base.entries.get("vmargs", "")),
            in_front=self._patched_jars(self.folder),
            python=str(self._forking or sys.executable),
        )
        self._autoscaler = Autoscaler(
            self.folder, settings, lambda: self._bounded(self._meant()), self._log,
            may_sleep=self._holds_requests, changing=changing, alone=self._alone,
        )  # fmt: skip
        environment = self._child_environment(self.folder)
        if self._forking is not None:
            environment[fork_server.SOCKET_VARIABLE] = str(self.folder / _FORK_SOCKET)
            hidden = re.compile(base.entries.get("blacklist_env_vars", "(?!)"))
            self._hidden = [name for name in environment if hidden.fullmatch(name)]
        return command, environment

    def _patched_jars(self, folder: Path) -> list[Path]:
        if not self.settings.frontend_patches:
            return []
        patched = frontend_patch.write(java.torchserve_home(), folder)
        if patched.refused:
            self._log.note(f"TorchServe's front end stays as it is in part: {'; '.join(patched.refused)}", level="WARN")
        self._holds_requests = frontend_patch.HOLDING in patched.applied
        return [patched.jar] if patched.jar is not None else []

    def _model_store(self) -> Path:
        if not self.models:
            raise ConfigError("there is nothing to serve", remedy="pack a model first: marina pack ARTIFACT")
        folders = {model.archive_file.parent for model in self.models}
        if len(folders) > 1:
            named = ", ".join(sorted(str(folder) for folder in folders))
            raise ConfigError(f"the archives lie in several folders: {named}", remedy="put them into one model store")
        for model in self.models:
            if not model.archive_file.is_file():
                raise ConfigError(f"{model.archive_file} does not exist", remedy="pack it again: marina pack ARTIFACT")
        return folders.pop()

    def _check_device(self) -> None:
        if self.settings.device == "cpu":
            return
        visible = self._environment.get("CUDA_VISIBLE_DEVICES", "")
        if visible and not all(part.strip().isdigit() for part in visible.split(",")):
            raise NoDevice(
                f"CUDA_VISIBLE_DEVICES is '{visible}'; TorchServe understands numbers only and would not start",
                remedy="write GPU numbers, e.g. 0,1, or choose GPUs with NVIDIA_VISIBLE_DEVICES",
            )
        if self.settings.device == "gpu" and not _has_gpu(self._environment):
            raise NoDevice(
                "no GPU can be used here: nvidia-smi lists none", remedy="check the driver, or use --device cpu"
            )

    def _overrides(self, snapshot: str) -> dict[str, str]:
        """What differs per start."""
        own = [self.settings.port(kind) for kind in self.settings.kinds()]
        grpc = processes.free_ports(2, apart_from=own)
        addresses: tuple[Kind, ...] = ("inference", "management", "metrics")
        return {
            **{f"{kind}_address": _address(self.settings, kind) for kind in addresses},
            "grpc_inference_port": str(grpc[0]),
            "grpc_management_port": str(grpc[1]),
            "metrics_config": str(java.METRICS_CONFIG),
            "model_snapshot": snapshot,
            **({"number_of_gpu": "0"} if self.settings.device == "cpu" else {}),
        }

    def _child_environment(self, folder: Path) -> dict[str, str]:
        """Ours without what would change the server behind the configuration's back, which is noted."""
        removed = [
            name
            for name in self._environment
            if name in _REMOVED_VARIABLES or (name.startswith(("TS_", "MARINA_")) and name != ENGINE_SWITCH)
        ]
        noted = [name for name in removed if not name.startswith("MARINA_")]
        if noted:
            self._log.note(f"not passed on to TorchServe: {', '.join(sorted(noted))}", level="WARN")
        kept = {name: value for name, value in self._environment.items() if name not in removed}
        # Unbuffered: a worker's last words must arrive although it dies.
        kept |= {"TEMP": str(folder), "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1"}
        kept |= {"LOG_LOCATION": str(folder), "METRICS_LOCATION": str(folder)}
        # Idle OpenMP threads that spin take the cores from other workers' busy ones; asleep they cost a wake-up.
        kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        return kept | ({"CUDA_VISIBLE_DEVICES": ""} if self.settings.device == "cpu" else {})

    def _launch(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start java in the thread that reads it: its life follows that thread's."""
        assert self.folder is not None
        folder = self.folder
        beside = fork_server.command(folder / _FORK_SOCKET) if self._forking is not None else ()
        spawned: queue.SimpleQueue[subprocess.Popen[bytes] | OSError] = queue.SimpleQueue()

        def run() -> None:
            try:
                process = processes.spawn(
                    command, environment=environment, folder=folder, beside=beside, hidden=self._hidden
                )
            except OSError as error:
                spawned.put(error)
                return
            spawned.put(process)
            assert process.stdout is not None
            try:
                with process.stdout:
                    _feed(process.stdout.read1, self._hear)  # type: ignore[attr-defined]
            finally:
                process.wait()
                self._events.put("ended")

        self._reader = threading.Thread(target=run, name="marina-java", daemon=True)
        self._reader.start()
        outcome = spawned.get()
        if isinstance(outcome, OSError):
            raise ServerError(f"java cannot be started: {outcome}", remedy="check JAVA_HOME") from outcome
        self._process = outcome

    @contextmanager
    def _gently(self) -> Iterator[None]:
        """Meanwhile java and its workers leave the cores to those who answer requests: other servers, and the gateway."""
        assert self._process is not None
        processes.set_priority(self._process.pid, _STARTING_NICE)
        try:
            yield
        finally:
            processes.set_priority(self._process.pid, 0)

    def _wait_ready(self, deadline: float) -> None:
        while True:
            event = self._next_event(_POLL_SECONDS)
            if event == "ended":
                raise self._death()
            if event is not None:
                raise _Interrupted(event)
            failure = self._log.failure()
            if failure is not None:
                raise self._load_failed(failure)
            missing = self._watch.look().missing()
            if not missing:
                return
            if time.monotonic() > deadline:
                raise NotReady(
                    f"not ready after {self.settings.startup_timeout:.0f} s: {'; '.join(missing)}",
                    remedy="allow more with --startup-timeout, or look at the last lines of the log",
                    log_tail=self._log.tail(),
                )

    def _prove_all(self) -> None:
        if self._prove is not None:
            with InferenceClient(self.inference_url, retries=NO_RETRIES) as client:
                for model in self.models:
                    self._prove_one(model, client, self._prove)
        self._log.forget_failures()
        self._proved = True

    def _prove_one(self, model: ServedModel, client: InferenceClient, prove: Prove) -> None:
        try:
            prove(model, client)
        except MarinaError as error:
            raise NotReady(
                f"{model.name} {model.version} is loaded and does not answer as it should: {error}",
                remedy=error.remedy,
                log_tail=self._log.tail(),
            ) from error

    # ---- stopping

    def _drain(self) -> None:
        """Returns when two looks in a row find nothing queued and nothing in flight, or at the deadline."""
        self._draining = True
        deadline = time.monotonic() + self.settings.drain_seconds
        idle_looks = 0
        while self.alive() and not self._asked_again():
            left = self._unfinished()
            idle_looks = idle_looks + 1 if left == 0 else 0
            if idle_looks == 2:
                return
            if time.monotonic() > deadline:
                self._log.note(
                    f"drain deadline of {self.settings.drain_seconds:g} s: {left} requests are cut off", level="WARN"
                )
                return
            time.sleep(_POLL_SECONDS)

    def _unfinished(self) -> int:
        """Requests accepted and not yet answered; at least 1 while TorchServe does not say."""
        in_flight = self.in_flight()
        state = self._watch.look()
        if in_flight is None or state.unanswered:
            return 1
        own = self._autoscaler.own_requests() if self._autoscaler is not None else 0
        return max(in_flight, state.pending - own)

    def _asked_again(self) -> bool:
        """Whether a signal came since the stop began."""
        while (event := self._next_event(0.0)) is not None:
            if event in ("SIGINT", "SIGTERM"):
                self._events.put(event)  # every later step sees it too
                return True
        return False

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, _: FrameType | None) -> None:
            # SimpleQueue.put may interrupt itself; an Event's set may not, and would hang.
            self._events.put("SIGINT" if number == signal.SIGINT else "SIGTERM")

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup` means a lost terminal to change nothing
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    # ---- words

    def _next_event(self, timeout: float) -> _Event | None:
        try:
            return self._events.get(timeout=timeout) if timeout != 0.0 else self._events.get_nowait()
        except queue.Empty:
            return None

    def _load_failed(self, failure: LoadFailure) -> NotReady:
        model = next((item for item in self.models if failure.label == f"{item.name}_{item.version}"), None)
        who = f"{model.name} {model.version} ({model.archive_file.name})" if model is not None else failure.label
        return NotReady(
            f"{who} did not load: {failure.cause}",
            remedy="check the archive: marina verify MAR",
            log_tail=self._log.tail(),
        )

    def _death(self) -> ServerDied:
        status = self._process.poll() if self._process is not None else None
        how = f"was ended by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
        tail = self._log.tail()
        last = tail.rpartition("\n")[2]
        return ServerDied(
            f"TorchServe's java {how} by itself" + (f"; its last words: {last}" if last else ""),
            remedy="look at the last lines of the log; out of memory asks for a larger -Xmx in config.properties",
            log_tail=tail,
            status=status,
        )

    def _open_log(self, path: Path) -> None:
        try:
            self._output = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConfigError(
                f"the log file {path} cannot be written: {error}", remedy="choose another --log-file"
            ) from error

    def _hear(self, lines: bytes) -> None:
        try:
            self._log.feed(lines)
        except Exception as error:  # noqa: BLE001 - java gets SIGTERM when the thread that reads it ends
            self._log.note(f"lines of java's are left out: {type(error).__name__}: {error}", level="ERROR")

    def _write(self, line: str) -> None:
        """A line that cannot be written is lost; the first such is told on stderr."""
        try:
            stream = self._output or sys.stderr
            stream.write(line + "\n")
            stream.flush()
        except (OSError, ValueError) as error:
            if self._output is not None and not self._lost:
                with suppress(OSError, ValueError):
                    sys.stderr.write(f"marina: the log cannot be written: {error}\n")
            self._lost = True


def serve(
    models: Sequence[ServedModel],
    settings: ServeSettings,
    *,
    prove: Prove | None = None,
    announce: Callable[[str], None] = print,
) -> Reason:
    """Serve until a signal or `POST /drain`; see `Server.serve_forever`."""
    return Server(models, settings, prove=prove).serve_forever(announce)


class _Interrupted(Exception):
    """A stop was asked for before the server was ready."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class _Supervised:
    """The server as the small port sees it."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def alive(self) -> bool:
        return self._server.alive()

    def not_ready(self) -> list[str]:
        return self._server.not_ready()

    def stuck(self) -> bool:
        return self._server.stuck()

    def draining(self) -> bool:
        return self._server._draining

    def in_flight(self) -> int | None:
        return self._server.in_flight()

    def state(self) -> State:
        return self._server._watch.state

    def models(self) -> Sequence[ServedModel]:
        return self._server.expected()

    def scaling(self) -> Sequence[Scaling]:
        found = self._server._autoscaler
        return found.scaling() if found is not None else ()

    def failures(self) -> dict[str, str]:
        return {failure.label: failure.cause for failure in self._server._log.failures()}

    def request_drain(self) -> None:
        self._server.request_drain()


def _with_workers(model: ServedModel, numbers: tuple[int, int] | None) -> ServedModel:
    return model if numbers is None else replace(model, scaled=numbers[0], scaled_required=numbers[1])


def _feed(read: Callable[[int], bytes], take: Callable[[bytes], None]) -> None:
    """Hand over whole lines, as many as there are, until the end.

    Pauses after each reading: java writes a line per request, and to wake up for each of them costs more than the line.
    """
    rest: list[bytes] = []
    while chunk := read(_READ_BYTES):
        lines, newline, begun = chunk.rpartition(b"\n")
        if newline:
            take(b"".join((*rest, lines, newline)))
            rest = []
        if begun:
            rest.append(begun)
        if len(chunk) < _READ_BYTES // 2:
            time.sleep(_READ_PAUSE_SECONDS)
    if rest:
        take(b"".join(rest))


def _address(settings: ServeSettings, kind: Kind) -> str:
    host = settings.host(kind)
    return f"http://[{host}]:{settings.port(kind)}" if ":" in host else f"http://{host}:{settings.port(kind)}"


def _has_gpu(environment: Mapping[str, str]) -> bool:
    program = shutil.which("nvidia-smi", path=environment.get("PATH", os.defpath))
    if program is None:
        return False
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout
