"""The handler that every entry derives from: one batch in, exactly one answer per request out.

A bad request becomes that request's own 4xx; a batch that fails is run again in halves until the one input at fault
stands alone. Nothing here raises towards TorchServe, because TorchServe would fail the whole batch.
"""

from __future__ import annotations

import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from handlerlib import loading, parking, payload, telemetry
from handlerlib.errors import InferenceFailed, OutOfMemory, RequestError
from handlerlib.loading import LoadedModel

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-marina-request-id"
"""Set by the gateway, which drops a client's own."""
Output = list[float] | RequestError
"""Probabilities of one input, or why it has none."""
Result = tuple[payload.Request, list[Output]] | RequestError
"""One request with its outputs, or why it could not be read."""
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
    """TorchServe calls `initialize` once and `handle` per batch; an entry supplies the three steps between them."""

    model: LoadedModel
    batch_size: int
    reporter: telemetry.Reporter

    @abstractmethod
    def decode(self, data: bytes) -> Tensor:
        """One encoded input -> one tensor. Raises RequestError when the input is at fault."""

    @abstractmethod
    def to_batch(self, items: Sequence[Tensor]) -> Tensor:
        """Decoded inputs -> the network's batch."""

    @abstractmethod
    def encode(self, probabilities: Sequence[float], top_k: int) -> list[dict[str, Any]]:
        """One row of outputs -> what the client reads for one input."""

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
        stopwatch = telemetry.Stopwatch()
        with stopwatch.stage("decode"):
            requests = [self._parse(row, index, context) for index, row in enumerate(data)]
            items = self._decode_all(requests)
        outputs = self._infer_all(items, stopwatch)
        with stopwatch.stage("postprocess"):
            results = _per_request(requests, outputs)
            bodies = [self._answer(result, index, context) for index, result in enumerate(results)]
        self.reporter.record(
            stopwatch,
            arrivals=[telemetry.arrival(context.get_all_request_header(index)) for index in range(len(data))],
            outcomes=[
                telemetry.outcome([result] if isinstance(result, RequestError) else result[1]) for result in results
            ],
            rows=[output for output in outputs if not isinstance(output, RequestError)],
        )
        return bodies

    def _start(self, context: Context) -> None:
        properties = context.system_properties
        folder = Path(properties["model_dir"])
        gpu = properties.get("gpu_id")
        device = torch.device(f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu")
        self.batch_size = max(1, int(properties.get("batch_size") or 1))
        self._use_share_of_cores(context.model_yaml_config or {})
        self.model = loading.load(folder, device)
        worst = loading.self_test(self.model, self._answer_alone, folder)
        sizes = loading.warm_up(self.model, _warm_up_order(self.batch_size))
        spec = self.model.spec
        self.reporter = telemetry.Reporter(spec, context.metrics)
        logger.info(
            "%s %s ready on %s: %d golden samples within %.1e, batch sizes warmed: %d of %d",
            spec.name, spec.version, device, len(spec.golden.samples), worst, len(sizes), self.batch_size,
        )  # fmt: skip

    def _use_share_of_cores(self, config: Mapping[str, Any]) -> None:
        """Workers of one model must not fight for cores: each takes its share (100x on CPU, pytorch/serve#1138)."""
        workers = max(1, int(config.get("minWorkers", 1)))
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        torch.set_num_threads(threads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def _answer_alone(self, data: bytes) -> Tensor:
        return self.model.probabilities(self.to_batch([self.decode(data)]))[0]

    def _parse(self, row: Mapping[str, Any], index: int, context: Context) -> payload.Request | RequestError:
        try:
            headers = _request_headers(context, index)
            return payload.parse(row, headers, self.model.spec.limits)
        except RequestError as error:
            return error
        except Exception as error:  # noqa: BLE001 - logged with the answer
            return _caused(InferenceFailed("the request could not be read"), error)

    def _decode_all(self, requests: Sequence[payload.Request | RequestError]) -> list[Tensor | RequestError]:
        """All inputs of all readable requests, flat and in order."""
        encoded = [data for request in requests if isinstance(request, payload.Request) for data in request.instances]
        return (
            list(self._pool.map(self._decode_one, encoded)) if len(encoded) > 1 else [*map(self._decode_one, encoded)]
        )

    def _decode_one(self, data: bytes) -> Tensor | RequestError:
        try:
            return self.decode(data)
        except RequestError as error:
            return error
        except MemoryError:
            return OutOfMemory("not enough memory to decode this input; try again later")
        except Exception as error:  # noqa: BLE001 - logged with the answer
            return _caused(InferenceFailed("the input could not be decoded"), error)

    def _infer_all(self, items: Sequence[Tensor | RequestError], stopwatch: telemetry.Stopwatch) -> list[Output]:
        """Run the good items in batches of at most `batch_size`; bad ones keep their error and their place."""
        good = [item for item in items if isinstance(item, Tensor)]
        rows: list[Output] = []
        for start in range(0, len(good), self.batch_size):
            rows += self._infer(good[start : start + self.batch_size], stopwatch)
        in_order = iter(rows)
        return [item if isinstance(item, RequestError) else next(in_order) for item in items]

    def _infer(self, items: Sequence[Tensor], stopwatch: telemetry.Stopwatch) -> list[Output]:
        try:
            with stopwatch.stage("preprocess"):
                batch = self.to_batch(items)
            with stopwatch.stage("inference"):
                rows = self.model.probabilities(batch)
        except Exception as error:  # noqa: BLE001 - whatever one input does, the others get their answers
            out_of_memory = _is_out_of_memory(error)
            if len(items) == 1:
                return [_alone(error, out_of_memory)]
            logger.warning("a batch of %d failed (%s) and is run again in halves", len(items), type(error).__name__)
        else:
            finite = rows.isfinite().all(dim=1).tolist()
            return [
                row if fine else InferenceFailed("the model gave no finite answer for this input")
                for row, fine in zip(rows.tolist(), finite, strict=True)
            ]
        # Outside the handler above: the failed batch's tensors are held by the exception until it is gone.
        if out_of_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(items) // 2
        return self._infer(items[:middle], stopwatch) + self._infer(items[middle:], stopwatch)

    def _answer(self, result: Result, index: int, context: Context) -> bytes:
        if isinstance(result, RequestError):
            return self._refuse(result, index, context)
        request, outputs = result
        predictions = []
        for position, output in enumerate(outputs):
            if isinstance(output, RequestError):
                where = f"instance {position}: " if len(outputs) > 1 else ""
                return self._refuse(_caused(type(output)(where + str(output)), output.__cause__), index, context)
            predictions.append(self.encode(output, request.top_k))
        spec = self.model.spec
        context.set_response_content_type(index, "application/json")
        document = {"model": spec.name, "version": spec.version, "predictions": predictions}
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()

    def _refuse(self, error: RequestError, index: int, context: Context) -> bytes:
        request_id = _request_id(index, context)
        if error.status >= 500:
            trace_id = telemetry.trace_id(_request_headers(context, index))
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


def _warm_up_order(largest: int) -> list[int]:
    """Every size from 1 to `largest`, the two that matter most first."""
    return list(dict.fromkeys([1, largest, *range(2, largest)]))


def _request_headers(context: Context, index: int) -> dict[str, str]:
    """Lower-case names. TorchServe mixes the request's headers with one dict per form field; those are left out."""
    found = context.get_all_request_header(index)
    headers = {str(name).lower(): value for name, value in found.items() if isinstance(value, str)}
    if "content-type" not in headers:
        part = found.get("body")
        if isinstance(part, Mapping) and isinstance(part.get("content-type"), str):
            headers["content-type"] = part["content-type"]
    return headers


def _request_id(index: int, context: Context) -> str:
    """The gateway's id where one stands in front, else TorchServe's: in both cases the one in the answer's X-Request-Id.

    TorchServe overwrites that header with its own id, so a client's own X-Request-Id counts only through the gateway.
    """
    given = _request_headers(context, index).get(REQUEST_ID_HEADER, "")
    return given if _SAFE_REQUEST_ID.fullmatch(given) else (context.get_request_id(index) or "")


def _is_out_of_memory(error: BaseException) -> bool:
    """The CPU allocator raises a plain RuntimeError that only its text tells apart."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)


def _alone(error: Exception, out_of_memory: bool) -> RequestError:
    if out_of_memory:
        return OutOfMemory("not enough memory for this input; try again later")
    return _caused(InferenceFailed("the model failed on this input"), error)


def _caused(error: RequestError, cause: BaseException | None) -> RequestError:
    """`error` as `raise error from cause` would make it: the cause goes to the log, never to the client."""
    error.__cause__ = cause
    return error
