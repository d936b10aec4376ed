"""The handler that every entry derives from: one batch in, exactly one answer per request out.

A bad request becomes that request's own 4xx; a batch that fails is run again in halves until the one input at fault
stands alone. Nothing here raises towards TorchServe, because TorchServe would fail the whole batch.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from handlerlib import answers, engines, loading, parking, payload, protocol, quarantine, telemetry
from handlerlib.answers import Ranked
from handlerlib.cores import Cores
from handlerlib.errors import InferenceFailed, OutOfMemory, RequestError
from handlerlib.loading import LoadedModel
from handlerlib.recorder import Recorder
from handlerlib.spec import Architecture

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-marina-request-id"
"""Set by the gateway, which drops a client's own."""
CHUNK_VALUES = 8 * 3 * 224 * 224
"""Input values that go through the network at once on a CPU, but at least `CHUNK_ROWS` rows: beyond it a larger batch is
no faster there and only takes more memory."""
CHUNK_ROWS = 8
Headers = dict[str, str]
"""One request's, with names in lower case."""
Output = Ranked | RequestError
"""The most probable labels of one input, or its values; or why it has none."""
Result = tuple[payload.Request, list[Output]] | RequestError
"""One request with its outputs, or why it could not be read."""
_NO_MEMORY = ("can't allocate memory", "not enough memory")
"""How PyTorch's CPU allocator says it, which depends on the platform (c10/core/impl/alloc_cpu.cpp)."""
_SAFE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Context(Protocol):
    """What we use of TorchServe's context; `ts` itself is imported nowhere in the worker's own code."""

    system_properties: Mapping[str, Any]
    model_yaml_config: Mapping[str, Any] | None
    manifest: Mapping[str, Any] | None
    metrics: Any

    def get_request_id(self, idx: int = 0) -> str | None: ...
    def get_all_request_header(self, idx: int) -> Mapping[str, Any]: ...
    def set_response_content_type(self, idx: int, value: str) -> None: ...
    def set_response_header(self, idx: int, key: str, value: str) -> None: ...
    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None: ...


class ModelHandler(ABC):
    """TorchServe calls `initialize` once and `handle` per batch; an entry supplies the two steps between bytes and batch."""

    model: LoadedModel
    batch_size: int
    reporter: telemetry.Reporter
    cores: Cores
    decodes_in_threads: bool = True
    """Decoding releases the interpreter lock, so that several threads can do it at once."""

    def parse(self, row: Mapping[str, Any], headers: Headers) -> payload.Request:
        """A row and its headers -> the encoded inputs of one request. Raises RequestError."""
        return payload.parse(row, headers, self.model.spec.limits)

    @abstractmethod
    def decode(self, data: bytes | bytearray) -> Tensor:
        """One encoded input -> one tensor. Raises RequestError when the input is at fault. Called in several threads."""

    @abstractmethod
    def to_batch(self, items: Sequence[Tensor]) -> Tensor:
        """Decoded inputs -> the network's batch."""

    def initialize(self, context: Context) -> None:
        """Load, prove against the golden samples, warm up. Returning means ready.

        Raises RuntimeError, which TorchServe logs as the cause; one line for the supervisor is printed before.
        """
        try:
            self._start(context)
        except Exception as error:
            telemetry.announce_load_failure(error)
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    def handle(self, data: Sequence[Mapping[str, Any]], context: Context) -> list[bytes]:
        """Rows of one batch -> one body per row, in order; status and headers go through `context`."""
        if parking.is_describe(data, context.get_all_request_header(0)):
            return [parking.describe()]
        self.cores.begin()
        try:
            return self._handle(data, context)
        finally:
            self.cores.end()

    def _handle(self, data: Sequence[Mapping[str, Any]], context: Context) -> list[bytes]:
        stopwatch = telemetry.Stopwatch()
        headers = [_request_headers(context, index) for index in range(len(data))]
        requests = [self._parse(row, sent) for row, sent in zip(data, headers, strict=True)]
        encoded = [one for request in requests if isinstance(request, payload.Request) for one in request.instances]
        self._recorder.offer(encoded)
        top_k = max((request.top_k for request in requests if isinstance(request, payload.Request)), default=1)
        outputs = self._guard.run(encoded, lambda inputs: self._outputs(inputs, top_k, stopwatch))
        results = _per_request(requests, outputs)
        bodies = [self._answer(result, index, headers[index], context) for index, result in enumerate(results)]
        stopwatch.lap("postprocess")
        self.reporter.record(
            stopwatch,
            arrivals=[telemetry.arrival(sent) for sent in headers],
            outcomes=[
                telemetry.outcome([result] if isinstance(result, RequestError) else result[1]) for result in results
            ],
            answers=[self._renderer.first(output) for output in outputs if not isinstance(output, RequestError)],
        )
        return bodies

    def _outputs(
        self, encoded: Sequence[bytes | bytearray], top_k: int, stopwatch: telemetry.Stopwatch
    ) -> list[Output]:
        items = self._decode_all(encoded)
        stopwatch.lap("decode")
        return self._infer_all(items, top_k, stopwatch)

    def _start(self, context: Context) -> None:
        properties = context.system_properties
        folder = Path(properties["model_dir"])
        gpu = properties.get("gpu_id")
        device = torch.device(f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # compiled packages ask for streams of the current one
        self.batch_size = max(1, int(properties.get("batch_size") or 1))
        workers = max(1, int((context.model_yaml_config or {}).get("minWorkers", 1)))
        self.cores = Cores.of_server(workers)
        torch.set_num_threads(self.cores.count)
        self._pool = _decoders(self.cores.count) if self.decodes_in_threads else None
        self.cores.begin()
        try:
            self.model = loading.load(folder, device)
            spec = self.model.spec
            self._recorder = Recorder(spec.name, spec.version)
            self._guard = quarantine.guard()
            self._renderer = answers.renderer(spec)
            self._chunk = rows_at_once(self.batch_size, spec.architecture, device)
            worst = loading.self_test(
                self.model,
                self._answer_alone,
                folder,
                batch=self._chunk,
                prepare=lambda: self._warm_up(device),
            )
        finally:
            self.cores.end()
        self.reporter = telemetry.Reporter(spec, context.metrics, self.model.serving)
        if protocol.in_worker():
            # Loading leaves some 500,000 objects that stay for ever. A full garbage collection would look through them
            # all, for a third of a second in the middle of some batch.
            gc.freeze()
            protocol.speed_up(context)
        logger.info(
            "%s %s ready on %s: %d golden samples within %.1e, %d at once on up to %d cores",
            spec.name, spec.version, device, len(spec.golden.samples), worst, self._chunk, self.cores.count,
        )  # fmt: skip

    def _warm_up(self, device: torch.device) -> None:
        """Every batch size on a GPU. On a CPU a size's first batch takes some milliseconds longer, not more; there the
        largest makes room in memory, and the smallest prepares each number of threads that engines tell apart: whose
        workers will be busy beside this one, nobody knows at start.
        """
        if device.type == "cuda":
            loading.warm_up(self.model, dict.fromkeys([1, self._chunk, *range(2, self._chunk)]))
            return
        count = self.cores.count
        loading.warm_up(self.model, dict.fromkeys([1, self._chunk]), threads=(count,))
        steps = (engines.thread_step(share, count) for share in self.cores.shares())
        loading.warm_up(self.model, [1], threads=tuple(dict.fromkeys(steps)))

    def _answer_alone(self, data: bytes) -> Tensor:
        return self.model.probabilities(self.to_batch([self.decode(data)]), self.cores.count)[0]

    def _parse(self, row: Mapping[str, Any], headers: Headers) -> payload.Request | RequestError:
        try:
            return self.parse(row, headers)
        except RequestError as error:
            return error
        except Exception as error:  # noqa: BLE001 - logged with the answer
            return _caused(InferenceFailed("the request could not be read"), error)

    def _decode_all(self, encoded: Sequence[bytes | bytearray]) -> list[Tensor | RequestError]:
        """In order. This thread decodes too: alone unless it may use more cores and there is more than one input."""
        helpers = min(self.cores.share(), len(encoded)) - 1 if len(encoded) > 1 else 0
        torch.set_num_threads(1)  # each image by one thread: nothing that is done with one gains from more
        if helpers < 1 or self._pool is None:
            return [self._decode_one(data) for data in encoded]
        decoded: list[Tensor | RequestError | None] = [None] * len(encoded)
        pending = enumerate(encoded)  # every thread takes its next one from here

        def take() -> None:
            for index, data in pending:
                decoded[index] = self._decode_one(data)

        helping: list[Future[None]] = []
        with contextlib.suppress(RuntimeError):  # the system gives no more threads: this one does it all
            for _ in range(helpers):
                helping.append(self._pool.submit(take))
        take()
        for helper in helping:
            helper.result()
        # What was not taken on may still be begun by a thread that has become free; nobody would wait for that one.
        return [self._decode_one(data) if item is None else item for item, data in zip(decoded, encoded, strict=True)]

    def _decode_one(self, data: bytes | bytearray) -> Tensor | RequestError:
        try:
            return self.decode(data)
        except RequestError as error:
            return error
        except Exception as error:  # noqa: BLE001 - logged with the answer
            if _is_out_of_memory(error):
                return OutOfMemory("not enough memory to decode this input; try again later")
            return _caused(InferenceFailed("the input could not be decoded"), error)

    def _infer_all(
        self, items: Sequence[Tensor | RequestError], top_k: int, stopwatch: telemetry.Stopwatch
    ) -> list[Output]:
        """Run the good items in batches of at most `_chunk`; bad ones keep their error and their place."""
        good = [item for item in items if isinstance(item, Tensor)]
        rows: list[Output] = []
        for start in range(0, len(good), self._chunk):
            rows += self._infer(good[start : start + self._chunk], top_k, stopwatch)
        in_order = iter(rows)
        return [item if isinstance(item, RequestError) else next(in_order) for item in items]

    def _infer(self, items: Sequence[Tensor], top_k: int, stopwatch: telemetry.Stopwatch) -> list[Output]:
        try:
            batch = self.to_batch(items)
            stopwatch.lap("preprocess")
            rows = self.model.probabilities(batch, self.cores.share())
            stopwatch.lap("inference")
        except Exception as error:  # noqa: BLE001 - whatever one input does, the others get their answers
            stopwatch.lap("inference")
            out_of_memory = _is_out_of_memory(error)
            if len(items) == 1:
                return [_alone(error, out_of_memory)]
            logger.warning("a batch of %d failed (%s) and is run again in halves", len(items), type(error).__name__)
        else:
            return _ranked(rows, top_k, self._renderer)
        # Outside the handler above: the failed batch's tensors are held by the exception until it is gone.
        if out_of_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(items) // 2
        return self._infer(items[:middle], top_k, stopwatch) + self._infer(items[middle:], top_k, stopwatch)

    def _answer(self, result: Result, index: int, headers: Headers, context: Context) -> bytes:
        if isinstance(result, RequestError):
            return self._refuse(result, index, headers, context)
        request, outputs = result
        ranked: list[tuple[Ranked, int]] = []
        for position, output in enumerate(outputs):
            if isinstance(output, RequestError):
                where = f"instance {position}: " if len(outputs) > 1 else ""
                error = _caused(type(output)(where + str(output)), output.__cause__)
                return self._refuse(error, index, headers, context)
            ranked.append((output, self._renderer.wanted(request.top_k, request.given)))
        context.set_response_content_type(index, "application/json")
        return self._renderer.document(ranked)

    def _refuse(self, error: RequestError, index: int, headers: Headers, context: Context) -> bytes:
        request_id = _request_id(index, headers, context)
        if error.status >= 500:
            trace_id = telemetry.trace_id(headers)
            telemetry.log_failure(error, request_id=request_id, trace_id=trace_id, spec=self.model.spec)
        context.set_response_status(error.status, error.title, index)
        context.set_response_content_type(index, "application/problem+json")
        return error.problem(request_id)


def _per_request(requests: Sequence[payload.Request | RequestError], outputs: Iterable[Output]) -> list[Result]:
    """Outputs, flat and in order, put back to the requests that they belong to."""
    remaining = iter(outputs)
    return [
        request if isinstance(request, RequestError) else (request, [next(remaining) for _ in request.instances])
        for request in requests
    ]


def _ranked(rows_BK: Tensor, top_k: int, renderer: answers.Renderer) -> list[Output]:
    ranked: list[Output] = [*renderer.rank(rows_BK, top_k)]
    for row, fine in enumerate(answers.finite(rows_BK)):
        if not fine:
            ranked[row] = InferenceFailed("the model gave no finite answer for this input")
    return ranked


def rows_at_once(batch_size: int, shape: Architecture, device: torch.device) -> int:
    """Into how large parts a worker on `device` takes a batch of `batch_size` apart."""
    if device.type == "cuda":
        return batch_size
    rows = CHUNK_VALUES // (shape.channels * shape.height * shape.width)
    return min(batch_size, max(CHUNK_ROWS, rows))


def _decoders(cores: int) -> ThreadPoolExecutor | None:
    """Threads that decode beside the worker's own; None where it has one core. They start when they are needed."""
    if cores == 1:
        return None
    # torch's number of threads is a setting of each thread.
    return ThreadPoolExecutor(cores - 1, "decode", initializer=torch.set_num_threads, initargs=(1,))


def _request_headers(context: Context, index: int) -> Headers:
    """Lower-case names. TorchServe mixes the request's headers with one dict per form field; those are left out."""
    found = context.get_all_request_header(index)
    headers = {name.lower(): value for name, value in found.items() if isinstance(value, str)}
    if "content-type" not in headers:
        part = found.get("body")
        if isinstance(part, Mapping) and isinstance(part.get("content-type"), str):
            headers["content-type"] = part["content-type"]
    return headers


def _request_id(index: int, headers: Headers, context: Context) -> str:
    """The gateway's id where one stands in front, else TorchServe's: in both cases the one in the answer's X-Request-Id.

    TorchServe overwrites that header with its own id, so a client's own X-Request-Id counts only through the gateway.
    """
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _SAFE_REQUEST_ID.fullmatch(given) else (context.get_request_id(index) or "")


def _is_out_of_memory(error: BaseException) -> bool:
    """The CPU allocator raises a plain RuntimeError that only its text tells apart."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    return any(words in said for words in _NO_MEMORY)


def _alone(error: Exception, out_of_memory: bool) -> RequestError:
    if out_of_memory:
        return OutOfMemory("not enough memory for this input; try again later")
    return _caused(InferenceFailed("the model failed on this input"), error)


def _caused(error: RequestError, cause: BaseException | None) -> RequestError:
    """`error` as `raise error from cause` would make it: the cause goes to the log, never to the client."""
    error.__cause__ = cause
    return error
