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

from marina.client import WorkerStatus
from marina.errors import ClientError, TimedOut, Unreachable

ASKED = "park-"
PARKED = "parked-"
"""Files in the worker's temp folder, followed by its process id: asked for by us, renamed by the worker."""
RUN_THERE = "run the command where the workers run, as the user that serves: ssh HOST marina ... (hosts.X.ssh)"
_NOT_ASKED = (b'"ServiceUnavailableException"', b'"Worker died')
"""In TorchServe's answer when no handler has given one: the queue is full, or that worker has just ended."""
_FULL_SECONDS = 0.1
"""Until a full queue is asked for room again."""
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

    def supported(self, *, within: float) -> bool:
        """Whether the version's handler knows how to park.

        Raises TimedOut when it is too busy to say so in time, and Unreachable when the server is not there.
        """
        deadline = time.monotonic() + within
        while (left := deadline - time.monotonic()) > 0:
            answer = self._described(left)
            if answer and not any(words in answer for words in _NOT_ASKED):
                return _parks(answer)
            time.sleep(min(left, _FULL_SECONDS))
        raise TimedOut(
            f"{self._what} did not say within {within:.0f} s whether its workers can be emptied: it is too busy",
            remedy="its queue is long or a worker hangs: see marina status, and try again later",
        )

    def _described(self, seconds: float) -> bytes:
        """TorchServe's answer; empty when there was none in time."""
        connection = HTTPConnection(*self._address, timeout=seconds)
        try:
            connection.request("GET", self._path)
            return connection.getresponse().read()
        except TimeoutError:
            return b""
        except (OSError, HTTPException) as error:
            raise Unreachable(
                f"the connection broke to {':'.join(map(str, self._address))}", remedy="is the server up?"
            ) from error
        finally:
            connection.close()

    def park(self, pids: Sequence[int], *, within: float) -> None:
        """Return when each of these workers holds nothing but a request of ours. One that has ended holds nothing.

        Raises TimedOut, and ClientError when one of them is a process that we cannot ask.
        """
        deadline = time.monotonic() + within
        parked = [self._ask(folder, pid) for pid in pids if (folder := _temp_folder(pid)) is not None]
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


def _parks(body: bytes) -> bool:
    try:
        (found,) = json.loads(body)
        return bool(found["customizedMetadata"].get("parks"))
    except (ValueError, LookupError, AttributeError, TypeError):
        return False


def folder_of(worker: WorkerStatus) -> Path | None:
    """The temp folder of a worker that is a process of this machine and this user; None of every other, and of one that
    has ended.

    The management interface's process ids may be another machine's, or another container's: the same number is some other
    process here. A worker's own process has its number in the name of its socket, or listens at that port
    (use_native_io=false).
    """
    try:
        folder = _temp_folder(worker.pid)
        found = folder is not None and ((folder / f".ts.sock.{worker.id}").exists() or _listens(worker))
    except (ClientError, psutil.Error, OSError):
        return None
    return folder if found else None


def _listens(worker: WorkerStatus) -> bool:
    connections = psutil.Process(worker.pid).net_connections("tcp")
    return any(item.status == psutil.CONN_LISTEN and str(item.laddr.port) == worker.id for item in connections)


def _temp_folder(pid: int) -> Path | None:
    """Where a worker keeps its temporary files; None when it runs no more. Raises ClientError when it does not say."""
    try:
        return Path(psutil.Process(pid).environ()["TMPDIR"])
    except (psutil.NoSuchProcess, ValueError):  # no process has a negative number
        return None
    except (psutil.AccessDenied, KeyError) as error:
        raise ClientError(f"process {pid} is not a worker that this user can reach", remedy=RUN_THERE) from error
