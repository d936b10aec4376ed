"""The whole way of a figure: worker, TorchServe, supervisor, gateway -> a real Prometheus -> dashboards and alerts.

Time runs 20 times faster in the rules; objectives, limits and expressions are those of the repository. Faults are real:
images that break the model, slow ones, a dark camera, killed workers, a spoilt clients file, a short-lived certificate.
Only the GPU is a text, because there is none here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch

from handlerlib import drift, imaging, loading
from marina import archive, gateway, store
from marina.gateway import Replica
from marina.server import Server
from support import images, prometheus
from support.artifacts import write_artifact
from support.gateway import Front, free_port, front
from support.prometheus import MONITORING, Prometheus, require_prometheus, scrape
from support.torchserve import eventually, running

FASTER = 20
EVERY_SECONDS = 0.25
RAISE, SLEEP = b"raise", b"sleep"
"""Behind the end of an image they break the model, or hold it up for 0.3 s."""
TRACE = "0af7651916cd43dd8448eb211c80319c"


class _Gpu:
    """What the DCGM exporter says about one GPU."""

    def __init__(self) -> None:
        self.used = 40_000
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                free = 80_000 - outer.used
                figures = {"DCGM_FI_DEV_FB_USED": outer.used, "DCGM_FI_DEV_FB_FREE": free, "DCGM_FI_DEV_GPU_UTIL": 50}
                body = "".join(f'{name}{{gpu="0",Hostname="h"}} {value}\n' for name, value in figures.items()).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()


@dataclass(frozen=True, slots=True)
class Stack:
    """Everything that runs, after some quiet traffic."""

    server: Server
    front: Front
    prometheus: Prometheus
    gpu: _Gpu
    folder: Path

    def send(self, bodies: list[bytes], *, at_once: int = 4, **headers: str) -> list[int]:
        """Statuses, in order."""
        with ThreadPoolExecutor(at_once) as pool:
            asked = pool.map(lambda body: self.front.ask("/predictions/tiny", body=body, **headers).status, bodies)
            return list(asked)

    def fires(self, *names: str, seconds: float = 30) -> None:
        """Wait until all these alerts fire, with their words filled in."""
        seen: dict[str, list[dict[str, Any]]] = {}

        def all_fire() -> bool:
            seen.update(self.prometheus.firing())
            return set(names) <= set(seen)

        with contextlib.suppress(AssertionError):
            eventually(all_fire, "alerts", seconds=seconds)
        missing = [name for name in names if name not in seen]
        assert not missing, f"not firing within {seconds} s: {missing}; firing: {seen}"
        for name in names:
            text = " ".join(seen[name][0]["annotations"].values())
            assert "<no value>" not in text and "<error" not in text and "{{" not in text, text

    def worker(self) -> int:
        """The process id of the only worker, ready."""
        found: list[int] = []

        def ready() -> bool:
            answer = requests.get(f"{self.server.management_url}/models/tiny", timeout=5).json()
            found[:] = [worker["pid"] for worker in answer[0]["workers"] if worker["status"] == "READY"]
            return found != [] and psutil.pid_exists(found[0])

        eventually(ready, "a ready worker", seconds=60)
        return found[0]


@contextlib.contextmanager
def whole_stack(folder: Path, handlers: Path, *, faster: float = FASTER) -> Iterator[Stack]:
    require_prometheus()
    packed = archive.pack(_artifact(folder), handlers=_fragile(handlers, folder), destination=folder / "store")
    store.publish(folder / "store", packed)
    gpu = _Gpu()
    certificate = gateway.create_certificate(folder / "certificate", days=60)
    with running(store.to_serve([packed]), log_file=folder / "server.log") as server:
        settings = server.settings
        replica = Replica(address=f"127.0.0.1:{settings.inference_port}", health_port=settings.supervisor_port)
        gateway_settings = {
            "tls_bind": f"127.0.0.1:{free_port()}",
            "certificate": certificate,
            "max_inflight": 4,
            "queue_timeout_ms": 60_000,
            "deadline_ms": 100_000,
        }
        supervisors = folder / "supervisors.json"
        supervisors.write_text(json.dumps([{"targets": [f"127.0.0.1:{settings.supervisor_port}"]}]))
        with front(folder / "gateway", [replica], **gateway_settings) as door:
            gateway.add_key(door.clients, "partner", expires_at=int(time.time()) + 60 * 86400)
            jobs = [
                scrape("gateway", f"127.0.0.1:{door.metrics_port}"),
                scrape("gateway-credentials", f"127.0.0.1:{door.metrics_port}"),
                {**scrape("supervisor"), "static_configs": [], "file_sd_configs": [{"files": [str(supervisors)]}]},
                scrape("torchserve", f"127.0.0.1:{settings.metrics_port}"),
                scrape("gpu", gpu.address),
            ]
            speed = {"factor": faster, "every_seconds": EVERY_SECONDS}
            with prometheus.running(folder / "prometheus", jobs, **speed) as watching:
                eventually(lambda: watching.number("sum(up)") == len(jobs), "all targets up")
                yield Stack(server, door, watching, gpu, folder)


def _artifact(folder: Path) -> Path:
    """The tiny model, with the baseline that export would have measured on these photos."""
    target = write_artifact(folder)
    document = json.loads((target / "model_spec.json").read_text())
    document["handler"] = "fragile"
    (target / "model_spec.json").write_text(json.dumps(document))
    model = loading.load(target, torch.device("cpu"))
    photos = [images.photo(seed) for seed in range(400)]
    best = model.probabilities(imaging.batch(photos, model.spec.preprocess, model.spec.limits)).max(dim=1)
    baseline = drift.measure(zip(best.indices.tolist(), best.values.tolist(), strict=True), len(images.LABELS))
    (target / "model_spec.json").write_text(dataclasses.replace(model.spec, baseline=baseline).to_json())
    return target


def _fragile(handlers: Path, folder: Path) -> Path:
    """The handlers' folder with one more: the image classifier that RAISE breaks and SLEEP slows down."""
    copy = folder / "handlers"
    shutil.copytree(handlers, copy, ignore=shutil.ignore_patterns("__pycache__"))
    misbehaving = f"""\\g<0>
        if data.endswith({SLEEP!r}):
            __import__("time").sleep(0.3)
        if data.endswith({RAISE!r}):
            raise ValueError("asked to")
"""
    text = (handlers / "image_classifier.py").read_text()
    changed, count = re.subn(r' +"""Encoded image -> .*"""\n', misbehaving, text)
    assert count == 1
    (copy / "fragile.py").write_text(changed)
    shutil.copy(handlers / "image_classifier.yaml", copy / "fragile.yaml")
    return copy


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, handlers: Path) -> Iterator[Stack]:
    with whole_stack(tmp_path_factory.mktemp("monitoring"), handlers) as found:
        yield found


def expressions() -> Iterator[tuple[str, str]]:
    for path in sorted((MONITORING / "grafana" / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                yield f"{board['title']}: {panel['title']} {target['refId']}", target["expr"].replace("$model", ".*")


def test_quiet_traffic_fills_every_panel_and_raises_nothing(stack: Stack) -> None:
    asked = dict(expressions())
    empty: list[str] = []

    def all_answer() -> bool:
        assert set(stack.send([images.photo(seed) for seed in range(40)])) == {200}
        empty[:] = [title for title, expression in asked.items() if not answers(stack.prometheus, expression)]
        return not empty

    deadline = time.monotonic() + 30
    while not all_answer():
        assert time.monotonic() < deadline, f"panels without data: {empty}"
    assert stack.prometheus.rule_errors() == []
    assert stack.prometheus.firing() == {}


def answers(watching: Prometheus, expression: str) -> bool:
    return any(sample["value"][1] != "NaN" for sample in watching.query(expression))


def test_figures_are_those_of_the_traffic(stack: Stack) -> None:
    def number(expression: str) -> float:
        return stack.prometheus.number(expression) or 0.0

    before = number('sum(marina_requests_total{outcome="ok"})')
    waited = number("sum(marina_queue_seconds_count)")
    assert stack.send([images.photo(1), b"hello", images.truncated(), b""]) == [200, 415, 422, 400]
    for outcome in ("ok", "unsupported-media-type", "unprocessable-input", "malformed-request"):
        least = before + 1 if outcome == "ok" else 1
        counted = f'sum(marina_requests_total{{model="tiny", version="1.0", outcome="{outcome}"}})'
        eventually(lambda counted=counted, least=least: number(counted) >= least, outcome)
    # Only a gateway says when a request came; every one of these came through it.
    eventually(lambda: number("sum(marina_queue_seconds_count)") >= waited + 4, "four more waits")
    # One answer is counted once per distribution, and an error is no answer.
    answered = number('sum(marina_answers_total{distribution="class"})')
    assert answered == number('sum(marina_answers_total{distribution="confidence"})')
    assert answered == number('sum(marina_requests_total{outcome="ok"})')
    assert number("sum(marina_baseline_answers)") == 2 * 400


def test_credentials_and_gpu(stack: Stack) -> None:
    soon = int(time.time()) + 5 * 86400
    gateway.add_key(stack.front.clients, "expiring", expires_at=soon)
    gateway.create_certificate(stack.folder / "certificate", days=5)
    stack.gpu.used = 78_000
    stack.fires("MarinaKeyExpiring", "MarinaCertificateExpiring", "MarinaGpuMemoryNearLimit")
    good = stack.front.clients.read_text()
    stack.front.clients.write_text(good + "this is no key\n")
    stack.fires("MarinaKeysRefused")
    stack.front.clients.write_text(good)
    stack.gpu.used = 40_000


def test_a_dark_camera_is_noticed_within_500_requests(stack: Stack) -> None:
    assert "MarinaDrift" not in stack.prometheus.firing()
    dark = [images.encode(images.pixels(seed) // 4) for seed in range(500)]
    sent = 0
    while sent < len(dark) and "MarinaDrift" not in stack.prometheus.firing():
        assert set(stack.send(dark[sent : sent + 50])) == {200}
        sent += 50
    stack.fires("MarinaDrift", seconds=5)


def test_failures_slowness_and_a_queue(stack: Stack) -> None:
    broken, slow = images.photo(1) + RAISE, images.photo(1) + SLEEP
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "X_Request_Id": "the-broken-one"}
    assert stack.send([broken] * 40, **headers) == [500] * 40
    stack.fires("MarinaErrorBudgetBurnsFast", "MarinaModelFails")
    # Four at a time get in; the others wait at the gateway, which makes the answers slower than 0.5 s.
    with ThreadPoolExecutor(1) as background:
        load = background.submit(stack.send, [slow] * 200, at_once=60)
        # Both end soon after the load, so they have to be seen while it lasts.
        stack.fires("MarinaQueueGrowing", "MarinaLatencyBudgetBurnsFast", seconds=60)
        assert set(load.result()) == {200}
    # The slow burns need the fault to last for 5 minutes, 15 seconds here.
    stack.fires("MarinaLatencyBudgetBurnsSlowly", "MarinaErrorBudgetBurnsSlowly")


def test_a_failed_request_has_one_line_with_its_ids(stack: Stack) -> None:
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "X_Request_Id": "just-one"}
    stack.send([images.photo(1) + RAISE], **headers)

    def lines() -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (stack.folder / "server.log").read_text().splitlines()]
        messages = [str(record.get("message", "")) for record in records]
        failed = [json.loads(text) for text in messages if text.startswith('{"event": "request failed"')]
        return [line for line in failed if line["request_id"] == "just-one"]

    eventually(lambda: len(lines()) > 0, "the worker's line")
    (line,) = lines()
    assert (line["trace_id"], line["status"], line["model"], line["version"]) == (TRACE, 500, "tiny", "1.0")
    assert "ValueError: asked to" in line["exception"]


@pytest.mark.timeout(300)  # five loads of a worker, on a machine that may be busy
def test_workers_that_die_and_targets_that_go(tmp_path: Path, handlers: Path) -> None:
    with whole_stack(tmp_path, handlers, faster=16) as stack:
        _kill_until_crash_loop(stack)
        # From here on it cannot load either.
        assert stack.server.folder is not None
        for weights in stack.server.folder.rglob("weights.safetensors"):
            weights.write_bytes(b"")
        psutil.Process(stack.worker()).send_signal(signal.SIGKILL)
        stack.fires("MarinaNoReadyWorker", "MarinaNoReplica", "MarinaWorkersMissing", seconds=60)
        (tmp_path / "supervisors.json").write_text("[]")
        psutil.Process(stack.server.pid).kill()
        stack.fires("MarinaTargetDown", "MarinaTargetMissing")


def _kill_until_crash_loop(stack: Stack) -> None:
    """Kill each worker as soon as it is ready. Three within 37 s are enough; a slow machine needs some more."""
    for _ in range(10):
        killed = stack.worker()
        psutil.Process(killed).send_signal(signal.SIGKILL)
        eventually(lambda killed=killed: stack.worker() != killed, "another worker", seconds=60)
        with contextlib.suppress(AssertionError):
            stack.fires("MarinaWorkerCrashLoop", seconds=1.5)
            return
    pytest.fail("MarinaWorkerCrashLoop does not fire")
