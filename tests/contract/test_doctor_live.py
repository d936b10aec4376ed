"""The doctor at a real TorchServe: well, with a worker that cannot load, with a full queue, and gone."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from marina.client import NO_RETRIES, InferenceClient, ManagementClient
from marina.doctor import live, signatures
from marina.doctor.finding import Finding
from marina.errors import ClientError, Refused
from marina.server import Server
from support import torchserve
from support.torchserve import eventually


def addresses(server: Server) -> live.Addresses:
    return live.Addresses(
        supervisor=server.supervisor_url,
        management=server.management_url,
        management_port=server.settings.management_port,
    )


def examined(server: Server, project: Path) -> dict[str, Finding]:
    return {finding.code: finding for finding in live.check(addresses(server), project)}


def test_from_well_to_gone(tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "server.log"
    store.mkdir()
    good = torchserve.pack("obliging", store, batchSize=1, jobQueueSize=3)
    torchserve.pack("missing_import", store)
    with torchserve.running([good], log_file=log, log_level="info") as server:
        assert live.is_running(addresses(server))
        assert examined(server, tmp_path) == {}

        seen = threading.Event()

        def keep_asking() -> int:
            """So long that the queue stays full however slowly somebody looks."""
            answered = 0
            with InferenceClient(server.inference_url, retries=NO_RETRIES) as client:
                while not seen.wait(0.02):
                    with contextlib.suppress(Refused):
                        answered += client.predict("obliging", b"sleep 0.5").model == "obliging"
            return answered

        with ThreadPoolExecutor(6) as pool:
            asking = [pool.submit(keep_asking) for _ in range(6)]
            try:
                eventually(lambda: "queue-full" in examined(server, tmp_path), "the queue of three is full")
            finally:
                seen.set()
            assert sum(future.result() for future in asking) > 0

        with ManagementClient(server.management_url, retries=NO_RETRIES) as management, pytest.raises(ClientError):
            management.register("missing_import-1.0.mar", workers=1, batch_size=1, max_batch_delay_ms=1)
        eventually(lambda: "handler-import" in examined(server, tmp_path), "the worker's own cause")
        found = examined(server, tmp_path)["handler-import"]
        assert "missing_import" in found.cause
        assert "a_package_that_nobody_has" in found.cause
    assert not live.is_running(addresses(server))
    told = list(signatures.in_log(log.read_text().splitlines()))
    assert "handler-import" in {finding.code for finding in told}, told
