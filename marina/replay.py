"""Runs inside `marina verify`, as a process of its own: load an unpacked archive as a TorchServe worker would, answer its
golden samples, print what happened as one JSON line.

    python replay.py MODEL_DIR BATCH_SIZE

The module search path is a worker's: TorchServe's own folder first, then PYTHONPATH, which holds the archive. Nothing of
Marina's own is imported, so that what passes here passes on a machine that has only the archive.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

REAL_STDOUT = sys.stdout
POISON = bytes(range(256))
"""No format's first bytes and no UTF-8: a handler must refuse it, and it alone."""
NICE = 10
"""A tenth of the weight of what serves on this machine (sched(7)): a deploy must not be felt by those who are answered."""


def give_way() -> None:
    """Lower this process's priority and, where the kernel shares the cores out by session, its session's."""
    with contextlib.suppress(OSError):
        os.nice(NICE)
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(NICE))


def main(model_dir: Path, batch_size: int) -> dict[str, Any]:
    """The report: `stage` reached, `error` if one stopped it, which engine answered, and each golden sample's answers."""
    handler = json.loads((model_dir / "MAR-INF" / "MANIFEST.json").read_text())["model"]["handler"]
    try:
        # TorchServe's loader turns every ImportError into "No module named ts.torch_handler...": import first ourselves.
        importlib.import_module(handler.removesuffix(".py"))
        service = load(model_dir, handler, batch_size)
    except BaseException as error:  # noqa: BLE001 - SystemExit in a handler is a finding as well
        return {"stage": "import", "error": describe(error, model_dir)}
    try:
        return {"stage": "golden", **engine(service), **replay(service, model_dir, batch_size)}
    except BaseException as error:  # noqa: BLE001 - as above
        return {"stage": "golden", "error": describe(error, model_dir)}


def load(model_dir: Path, handler: str, batch_size: int) -> Any:
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
    from ts.model_loader import TsModelLoader

    spec = importlib.util.find_spec("ts")
    assert spec is not None and spec.origin is not None
    metrics = MetricsCacheYamlImpl(str(Path(spec.origin).parent / "configs" / "metrics.yaml"))
    metrics.initialize_cache()
    metrics.model_name = "verify"
    return TsModelLoader().load("verify", str(model_dir), handler, None, batch_size, None, True, metrics)


def engine(service: Any) -> dict[str, Any]:
    """Which engine the worker chose, and why not the packed one. Archives from before there were engines do not say."""
    worker = getattr(service._entry_point, "__self__", None)
    serving = getattr(getattr(worker, "model", None), "serving", None)
    if serving is None:
        return {"engine": "plain", "reason": None, "fallback": ""}
    return {"engine": serving.engine, "reason": serving.fallback, "fallback": serving.detail}


def replay(service: Any, model_dir: Path, batch_size: int) -> dict[str, Any]:
    """Each golden sample alone, then a full batch of them with one poison in the middle. `unasked`, of a model with
    thresholds: each sample again, without a number of labels."""
    spec = json.loads((model_dir / "model_spec.json").read_text(encoding="utf-8"))
    samples = [(model_dir / sample["file"]).read_bytes() for sample in spec["golden"]["samples"]]
    classes = min(len(spec["labels"]), spec["limits"]["max_top_k"])
    kind = "text/plain" if spec.get("text") else "application/octet-stream"
    alone = [answer(service, [sample], classes, kind)[0] for sample in samples]
    unasked = [answer(service, [sample], None, kind)[0] for sample in samples] if "thresholds" in spec else []
    poison_at = batch_size // 2
    order = [index % len(samples) for index in range(batch_size)]
    bodies = [POISON if position == poison_at else samples[index] for position, index in enumerate(order)]
    together = answer(service, bodies, classes, kind)
    return {"alone": alone, "unasked": unasked, "batch": together, "order": order, "poison_at": poison_at}


def answer(service: Any, bodies: list[bytes], top_k: int | None, content_type: str) -> list[dict[str, Any]]:
    """What a client of each body would get: status, content type, body. `top_k` None: it does not say how many labels."""
    from ts.service import Service

    headers = [{"name": b"Content-Type", "value": content_type.encode()}]
    if top_k is not None:
        headers.append({"name": b"X-Top-K", "value": str(top_k).encode()})
    batch = [
        {
            "requestId": f"verify-{index}".encode(),
            "headers": headers,
            "parameters": [{"name": "body", "contentType": content_type, "value": bytearray(body)}],
        }
        for index, body in enumerate(bodies)
    ]
    context = service.context
    processors, rows, ids = Service.retrieve_data_for_inference(batch)
    context.request_processor, context.request_ids, context.metrics.request_ids = processors, ids, ids
    returned = service._entry_point(rows, context)  # what Service.predict calls, without its catch-all
    if not isinstance(returned, list) or len(returned) != len(rows):
        raise ValueError(f"handle() must return a list of {len(rows)} answers, got {type(returned).__name__}")
    return [
        {
            "status": context.get_response_status(index)[0],
            "content_type": context.get_response_content_type(index),
            "body": bytes(body).decode("utf-8", "replace") if isinstance(body, bytes | bytearray) else json.dumps(body),
        }
        for index, body in enumerate(returned)
    ]


def describe(error: BaseException, model_dir: Path) -> str:
    """The last frame inside the archive and the exception: what its author needs to find the line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if str(model_dir) in frame.filename]
    where = f" ({Path(frames[-1].filename).relative_to(model_dir)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


if __name__ == "__main__":
    give_way()
    # A handler that prints must not disturb the report.
    sys.stdout = sys.stderr
    found = importlib.util.find_spec("ts")
    if found is None or found.origin is None:
        sys.exit("torchserve is not installed for this interpreter")
    sys.path[0] = str(Path(found.origin).parent)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))), file=REAL_STDOUT)
