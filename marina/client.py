"""Clients of TorchServe's two REST interfaces. Typed results, explicit timeouts, one error tree (`marina.errors`)."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

from handlerlib.spec import Task
from marina.errors import ClientError, ConfigError, Refused, TimedOut, UnexpectedAnswer, Unreachable
from marina.properties import is_loopback

HOLDING = -1
"""Fewest workers of a version that has none and whose requests are held: marina.frontend_patch.HOLDING."""
TOP_K_HEADER = "x-top-k"
"""TorchServe drops query parameters on /predictions, so the handlers read it from a header."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeout:
    """Seconds a client waits."""

    connect: float = 3.0
    """For the connection."""
    read: float = 60.0
    """For each part of the answer, the time in the server's queue included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retries:
    """How often and how soon a request that is safe to repeat is repeated."""

    count: int = 3
    """Repetitions after the first try; 0: none."""
    first_wait: float = 0.1
    """Seconds before the first repetition; each later one waits twice as long. A random half of it is left out."""
    longest_wait: float = 5.0
    """Seconds, also for a longer Retry-After."""

    def wait(self, attempt: int, retry_after: str | None) -> float:
        """Seconds to wait after failure number `attempt`, from 0; the server's own Retry-After wins."""
        if retry_after is not None and retry_after.isdigit():
            return min(float(retry_after), self.longest_wait)
        return float(min(self.first_wait * 2**attempt, self.longest_wait) * random.uniform(0.5, 1.0))


NO_RETRIES = Retries(count=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """One guess about one image; of a regression a target's name and, in the place of the probability, its value."""

    label: str
    index: int
    probability: float
    threshold: float | None = None
    """Of a multi-label model: from which probability on it answers this label unasked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model said about the images of one request."""

    model: str
    version: str
    request_id: str
    predictions: tuple[tuple[Label, ...], ...]
    """Per image in the order sent, most probable label first; of a multi-label model possibly none, of a regression all
    targets in their own order."""
    task: Task = "multi-class"
    """What the model answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedName:
    """A model that TorchServe knows, by its default version."""

    name: str
    archive: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStatus:
    """One worker of a model version, as TorchServe sees it."""

    id: str
    pid: int
    """Process id; -1 while none runs."""
    ready: bool
    """Whether the model is loaded."""
    started: str
    """ISO 8601 in UTC."""
    gpu: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStatus:
    """One model version, as TorchServe sees it."""

    name: str
    version: str
    archive: str
    min_workers: int
    max_workers: int
    batch_size: int
    max_batch_delay_ms: int
    workers: tuple[WorkerStatus, ...]
    pending: int
    """Requests waiting in its queue."""
    remaining_capacity: int
    """Requests its queue still takes before TorchServe answers 503."""
    default: bool | None = None
    """Whether requests without a version come here; None when only this version was asked about."""
    autoscale: Mapping[str, Any] | None = None
    """What the supervisor says about its scaling (marina/autoscale_loop.py); None: its number is not changed by itself."""

    @property
    def asleep(self) -> bool:
        """Whether it has no workers on purpose: a request waits in its queue until there is one."""
        return not self.workers and self.min_workers == HOLDING

    @property
    def ready_workers(self) -> int:
        """Workers that can answer now."""
        return sum(worker.ready for worker in self.workers)


def read_key(path: Path) -> str:
    """A client's key for the gateway. Raises ConfigError."""
    try:
        return path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {path} cannot be read: {error}", remedy="make up writes one") from error


class InferenceClient:
    """Predictions over HTTP, straight from TorchServe or through the gateway. Safe to share between threads.

    A prediction changes nothing on the server, so it is repeated when the connection fails, and on 429 and 503.
    """

    def __init__(
        self, base_url: str, *, key: str | None = None, timeout: Timeout = Timeout(), retries: Retries = Retries()
    ) -> None:
        """`base_url`, e.g. `http://127.0.0.1:8080`; `key` is sent as a bearer token, which the gateway asks for."""
        self._http = _Http(base_url, timeout=timeout, retries=retries, key=key)

    def predict(
        self,
        name: str,
        image: bytes | Sequence[bytes],
        *,
        version: str | None = None,
        top_k: int | None = None,
        content_type: str = "application/octet-stream",
    ) -> Answer:
        """Encoded image or images -> labels with probabilities. Raises ClientError; Refused holds the status.

        One image is sent as it is, several as JSON instances in one request.
        """
        headers = {"Content-Type": content_type}
        body: bytes
        if isinstance(image, bytes | bytearray | memoryview):
            body = bytes(image)
        else:
            instances = [{"b64": base64.b64encode(item).decode("ascii")} for item in image]
            body = json.dumps({"instances": instances}).encode()
            headers = {"Content-Type": "application/json"}
        if top_k is not None:
            headers[TOP_K_HEADER] = str(top_k)
        response = self._http.request(
            "POST", _path("predictions", name, version), pure=True, data=body, headers=headers
        )
        with _contract(response):
            return _answer(response.json(), response.headers.get("x-request-id", ""))

    def close(self) -> None:
        """Close the kept connections."""
        self._http.close()

    def __enter__(self) -> InferenceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ManagementClient:
    """TorchServe's management interface. Looking is repeated when the connection fails; changing something is repeated
    only when the request cannot have arrived.
    """

    def __init__(self, base_url: str, *, timeout: Timeout = Timeout(), retries: Retries = Retries()) -> None:
        """`base_url`, e.g. `http://127.0.0.1:8081`."""
        self._http = _Http(base_url, timeout=timeout, retries=retries)

    def status(self) -> tuple[ModelStatus, ...]:
        """Every version of every model, by name and as TorchServe orders the versions."""
        return tuple(item for name in sorted({model.name for model in self.models()}) for item in self.versions(name))

    def models(self) -> tuple[ServedName, ...]:
        """Every model, by its default version, in the server's order."""
        found: list[ServedName] = []
        token: str | None = None
        while True:
            parameters = {"limit": "100"} | ({"next_page_token": token} if token else {})
            response = self._http.request("GET", "/models", pure=True, params=parameters)
            with _contract(response):
                page = response.json()
                found += [ServedName(name=item["modelName"], archive=item["modelUrl"]) for item in page["models"]]
                token = page.get("nextPageToken")
            if not token:
                return tuple(found)

    def describe(self, name: str, version: str | None = None) -> ModelStatus:
        """The version, or the default one. Raises Refused with status 404 when there is none."""
        found = self._describe(name, version)[0]
        return dataclasses.replace(found, default=True) if version is None else found

    def versions(self, name: str) -> tuple[ModelStatus, ...]:
        """Every version of a model, the default one marked."""
        default = self.describe(name).version
        return tuple(dataclasses.replace(item, default=item.version == default) for item in self._describe(name, "all"))

    def scale(
        self, name: str, workers: int, version: str | None = None, *, wait: bool = True, deadline: float = 300.0
    ) -> ModelStatus:
        """Set the number of workers; with `wait` until exactly so many are ready.

        Raises TimedOut when they are not within `deadline` seconds.
        """
        parameters = {"min_worker": str(workers), "max_worker": str(workers), "synchronous": "false"}
        self._set_workers(name, version, parameters)
        ends = time.monotonic() + deadline
        while True:
            status = self.describe(name, version)
            if not wait or status.ready_workers == len(status.workers) == workers:
                return status
            if time.monotonic() > ends:
                raise TimedOut(
                    f"{name} has {status.ready_workers} of {workers} workers ready after {deadline:.0f} s",
                    remedy="look at the server's log for the cause",
                )
            time.sleep(0.1)

    def grow(self, name: str, workers: int, version: str) -> None:
        """Have so many workers at least, without taking any away; returns before they are ready."""
        parameters = {"min_worker": str(workers), "max_worker": str(_ANY_NUMBER), "synchronous": "false"}
        self._set_workers(name, version, parameters)

    def sleep(self, name: str, version: str) -> None:
        """Take all workers away and hold the requests that come from now on, until there are workers again.

        Only where TorchServe is patched for it, or those are refused; workers must have nothing in hand.
        """
        parameters = {"min_worker": str(HOLDING), "max_worker": "0", "synchronous": "false"}
        self._set_workers(name, version, parameters)

    def _set_workers(self, name: str, version: str | None, parameters: Mapping[str, str]) -> None:
        """TorchServe 0.12 answers 500 when a worker answers a describe request at the moment in which it is taken away
        (BatchAggregator.handleErrorJob looks for the job twice): the entry is gone then, its process may stay, and
        asking again does the rest.
        """
        for attempt in range(_SCALE_TRIES):
            try:
                self._http.request("PUT", _path("models", name, version), pure=False, params=parameters)
                return
            except Refused as error:
                if error.status != 500 or _TAKEN_AWAY not in str(error) or attempt == _SCALE_TRIES - 1:
                    raise

    def set_default(self, name: str, version: str) -> None:
        """Let requests without a version go to `version`. TorchServe does not check that it has workers."""
        self._http.request("PUT", f"{_path('models', name, version)}/set-default", pure=False)

    def register(
        self,
        archive: str,
        *,
        workers: int,
        batch_size: int,
        max_batch_delay_ms: int,
        response_timeout: int = 60,
        startup_timeout: int = 300,
        name: str | None = None,
    ) -> None:
        """Load the file `archive` of the model store and start its workers; returns when they are ready.

        Its model-config.yaml, where there is one, wins over the workers and timeouts given here. `name` serves it under
        another name than its own.
        """
        parameters = {
            "url": archive,
            "initial_workers": str(workers),
            "synchronous": "true",
            "batch_size": str(batch_size),
            "max_batch_delay": str(max_batch_delay_ms),  # always said: left out of a JSON body it becomes -10000
            "response_timeout": str(response_timeout),
            "startup_timeout": str(startup_timeout),
        } | ({"model_name": name} if name is not None else {})
        self._http.request("POST", "/models", pure=False, params=parameters, read_timeout=startup_timeout + 30.0)

    def unregister(self, name: str, version: str) -> None:
        """Kill the version's workers and forget it. Queued requests are never answered: empty the queue first."""
        self._http.request("DELETE", _path("models", name, version), pure=False, read_timeout=150.0)

    def close(self) -> None:
        """Close the kept connections."""
        self._http.close()

    def __enter__(self) -> ManagementClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _describe(self, name: str, version: str | None) -> tuple[ModelStatus, ...]:
        response = self._http.request("GET", _path("models", name, version), pure=True)
        with _contract(response):
            return tuple(_model_status(item) for item in response.json())


_SCALE_TRIES = 3
_TAKEN_AWAY = "isControlCmd"
_ANY_NUMBER = 1000


class _Http:
    """One server: a session, the retry rule, and the mapping of foreign errors."""

    def __init__(self, base_url: str, *, timeout: Timeout, retries: Retries, key: str | None = None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"'{base_url}' is not a server's address", remedy="write it like http://127.0.0.1:8080")
        self._base = base_url.rstrip("/")
        self._timeout = timeout
        self._retries = retries
        self._session = requests.Session()
        self._session.trust_env = not is_loopback(parts.hostname)  # a proxy cannot reach our own loopback
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=64))
        if key is not None:
            self._session.headers["Authorization"] = f"Bearer {key}"
            # Where a session has no auth, requests puts what ~/.netrc has for the host in the place of this header.
            self._session.auth = lambda request: request

    def request(
        self, method: str, path: str, *, pure: bool, read_timeout: float | None = None, **arguments: Any
    ) -> requests.Response:
        """A complete answer with a status below 400; ClientError otherwise. `pure`: repeating it changes nothing."""
        timeout = (self._timeout.connect, self._timeout.read if read_timeout is None else read_timeout)
        for attempt in range(self._retries.count + 1):
            last = attempt == self._retries.count
            retry_after: str | None = None
            try:
                with _foreign_errors(self._base):
                    response = self._session.request(method, self._base + path, timeout=timeout, **arguments)
            except (Unreachable, TimedOut) as error:
                if last or not (_never_sent(error) or (pure and isinstance(error, Unreachable))):
                    raise
            else:
                if response.status_code < 400:
                    return response
                refused = _refused(response)
                if last or not (pure and _worth_repeating(response)):
                    raise refused
                retry_after = response.headers.get("Retry-After")
            time.sleep(self._retries.wait(attempt, retry_after))
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        self._session.close()


@contextmanager
def _foreign_errors(server: str) -> Iterator[None]:
    """What requests raises -> our tree, most specific first."""
    try:
        yield
    except requests.ConnectTimeout as error:
        raise TimedOut(
            f"no connection to {server} in time", remedy="is the address right and the server up?"
        ) from error
    except requests.Timeout as error:
        raise _no_answer(server) from error
    except requests.ConnectionError as error:
        if error.args and isinstance(error.args[0], urllib3.exceptions.ReadTimeoutError):
            raise _no_answer(server) from error
        what = "nothing listens at" if _was_refused(error) else "the connection broke to"
        raise Unreachable(f"{what} {server}", remedy="is the server up? `marina serve` starts one") from error
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidHeader, UnicodeError) as error:
        raise ConfigError(
            f"a request to {server} cannot be written: {error}", remedy="correct the address or the key"
        ) from error
    except requests.RequestException as error:
        raise Unreachable(f"the connection broke to {server}: {type(error).__name__}", remedy="try again") from error


def _no_answer(server: str) -> TimedOut:
    return TimedOut(
        f"no answer from {server} in time", remedy="is the server overloaded? A longer timeout waits longer"
    )


def _was_refused(error: requests.ConnectionError) -> bool:
    """Whether no connection came about, so that nothing was sent."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(reason, urllib3.exceptions.NewConnectionError)


def _never_sent(error: ClientError) -> bool:
    cause = error.__cause__
    if isinstance(cause, requests.ConnectTimeout):
        return True
    return isinstance(cause, requests.ConnectionError) and _was_refused(cause)


def _worth_repeating(response: requests.Response) -> bool:
    """429, and 503 for want of room; not the 503 with which TorchServe reports that a handler failed."""
    if response.status_code == 429:
        return True
    return response.status_code == 503 and _torchserve_error(response).get("type") != "InternalServerException"


_CAUSES: Mapping[tuple[int, str], tuple[str, str]] = {
    (404, "ModelNotFoundException"): ("no such model", "`marina status` lists what is served"),
    (404, "ModelVersionNotFoundException"): ("no such version", "`marina status` lists what is served"),
    (503, "ServiceUnavailableException"): ("busy: the queue is full or no worker is left", "try again later"),
    (503, "InternalServerException"): ("the model failed on this request", "look at the server's log"),
    (500, "InternalServerException"): ("the worker died or took too long", "look at the server's log"),
    (507, "InternalServerException"): ("the worker ran out of memory or was killed", "send smaller requests"),
    (405, "MethodNotAllowedException"): ("not allowed here", "config.properties needs enable_model_api=true for this"),
    (409, "ConflictStatusException"): ("this version is registered already", "unregister it first"),
}


def _refused(response: requests.Response) -> Refused:
    """A Refused from a problem document, from TorchServe's own error object, or from the bare status."""
    status = response.status_code
    request_id = response.headers.get("x-request-id", "")
    if response.headers.get("Content-Type", "").startswith("application/problem+json"):
        problem = _json_object(response)
        return Refused(
            str(problem.get("title", response.reason)),
            status=status,
            detail=str(problem.get("detail", "")),
            request_id=str(problem.get("instance", request_id)),
        )
    own = _torchserve_error(response)
    if own:
        title, remedy = _CAUSES.get((status, str(own.get("type"))), (f"refused with status {status}", ""))
        return Refused(title, status=status, detail=str(own.get("message", "")), request_id=request_id, remedy=remedy)
    if status == 413:
        return Refused("the request is too large", status=413, request_id=request_id, remedy="see max_request_size")
    return Refused(f"refused with status {status}", status=status, detail=response.reason or "", request_id=request_id)


def _torchserve_error(response: requests.Response) -> Mapping[str, Any]:
    value = _json_object(response)
    return value if {"code", "type", "message"} <= set(value) else {}


def _json_object(response: requests.Response) -> Mapping[str, Any]:
    try:
        value = response.json()
    except requests.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def _contract(response: requests.Response) -> Iterator[None]:
    """A body that is not what the interface promises -> UnexpectedAnswer with its beginning."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        beginning = response.content[:80].decode("utf-8", "replace")
        raise UnexpectedAnswer(
            f"{response.url} answered {response.status_code} with something unexpected: {beginning!r}",
            remedy="is the address the right one, and the model one of Marina's?",
        ) from error


def _path(collection: str, name: str, version: str | None) -> str:
    """Names are quoted: a slash in one must not reach another route."""
    parts = [collection, name] + ([version] if version is not None else [])
    return "/" + "/".join(quote(part, safe="") for part in parts)


def _cut(item: Mapping[str, Any]) -> dict[str, float]:
    return {"threshold": float(item["threshold"])} if "threshold" in item else {}


def _answer(value: Any, request_id: str) -> Answer:
    task: Task = value.get("task", "multi-class")
    name, number = ("target", "value") if task == "regression" else ("label", "probability")
    predictions = tuple(
        tuple(
            Label(label=str(item[name]), index=int(item["index"]), probability=float(item[number]), **_cut(item))
            for item in labels
        )
        for labels in value["predictions"]
    )
    return Answer(
        model=str(value["model"]),
        version=str(value["version"]),
        request_id=request_id,
        predictions=predictions,
        task=task,
    )


def _model_status(value: Mapping[str, Any]) -> ModelStatus:
    queue = value["jobQueueStatus"]
    return ModelStatus(
        name=value["modelName"],
        version=value["modelVersion"],
        archive=value["modelUrl"],
        min_workers=value["minWorkers"],
        max_workers=value["maxWorkers"],
        batch_size=value["batchSize"],
        max_batch_delay_ms=value["maxBatchDelay"],
        workers=tuple(_worker_status(worker) for worker in value["workers"]),
        pending=queue["pendingRequests"],
        remaining_capacity=queue["remainingCapacity"],
    )


def _worker_status(value: Mapping[str, Any]) -> WorkerStatus:
    return WorkerStatus(
        id=value["id"],
        pid=value["pid"],
        ready=value["status"] == "READY",
        started=value["startTime"],
        gpu=value["gpu"],
    )
