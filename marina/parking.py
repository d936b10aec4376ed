"""Emptying one worker from outside: it finishes what it has, takes no new batch, and waits to be ended.

TorchServe hands batches to workers by itself, and ends a worker together with the batch it has in hand. But its describe
request goes through the same queue and is always a batch of its own: a worker that holds one of ours holds no client's
request. A handler of Marina's (handlerlib.parking) that gets one while a file asks its process to park does not answer
until the file is gone. So the file is laid down, describe requests are sent until that worker has got one, and then it
can be ended.
"""

from __future__ import annotations

import contextlib
import json
import select
import time
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import quote, urlsplit

import psutil

from marina.errors import TimedOut

ASKED = "park-"
PARKED = "parked-"
"""Files in the worker's temp folder, followed by its process id: asked for by us, renamed by the worker."""
_SUPPORTED_SECONDS = 10.0
_POLL_SECONDS = 0.005


class Parking:
    """The workers of one model version that we hold. Leaving the block lets go of those that still run."""

    def __init__(self, management_url: str, name: str, version: str) -> None:
        parts = urlsplit(management_url)
        self._address = parts.hostname or "", parts.port or 80
        self._path = f"/models/{quote(name, safe='')}/{quote(version, safe='')}?customized=true"
        self._what = f"{name} {version}"
        self._files: list[Path] = []
        self._sent: list[HTTPConnection] = []

    def supported(self) -> bool:
        """Whether the version's handler knows how to park; False also when it does not say so in time."""
        connection = HTTPConnection(*self._address, timeout=_SUPPORTED_SECONDS)
        try:
            connection.request("GET", self._path)
            (found,) = json.loads(connection.getresponse().read())
            return bool(found["customizedMetadata"].get("parks"))
        except (OSError, HTTPException, ValueError, LookupError, AttributeError, TypeError):
            return False
        finally:
            connection.close()

    def park(self, pids: Sequence[int], *, within: float) -> None:
        """Return when each of these workers holds nothing but a request of ours. Raises TimedOut."""
        deadline = time.monotonic() + within
        parked = [self._ask(folder, pid) for pid in pids if (folder := temp_folder(pid)) is not None]
        while waiting := [path for path in parked if not path.exists()]:
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"{self._what}: {len(waiting)} of {len(pids)} workers did not come free within {within:.0f} s",
                    remedy="its queue is long or a worker hangs: see marina status, and try again later",
                )
            # One under way at a time: a parked worker keeps its own, any other answers at once.
            if self.unanswered() <= len(parked) - len(waiting):
                self._send()
            time.sleep(_POLL_SECONDS)

    def unanswered(self) -> int:
        """Requests of ours that a parked worker holds, or that went back into the queue when it was ended."""
        for connection in self._sent[:]:
            if connection.sock is None or select.select([connection.sock], [], [], 0)[0]:
                connection.close()
                self._sent.remove(connection)
        return len(self._sent)

    def __enter__(self) -> Parking:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._files:
            with contextlib.suppress(OSError):
                path.unlink()
        for connection in self._sent:
            connection.close()

    def _ask(self, folder: Path, pid: int) -> Path:
        asked, parked = folder / f"{ASKED}{pid}", folder / f"{PARKED}{pid}"
        self._files += [asked, parked]
        asked.touch()
        return parked

    def _send(self) -> None:
        connection = HTTPConnection(*self._address, timeout=3.0)
        with contextlib.suppress(OSError):  # then the next round tries again
            connection.request("GET", self._path)
            self._sent.append(connection)


def temp_folder(pid: int) -> Path | None:
    """Where a worker of this machine keeps its temporary files; None when it runs no more."""
    try:
        return Path(psutil.Process(pid).environ()["TMPDIR"])
    except (psutil.Error, KeyError, ValueError):
        return None
