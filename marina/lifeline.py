"""A command that is interrupted when the one that started it gives up or ends, even by a kill: its standard input stays
open as long as somebody waits for it. `docker exec` alone leaves what it has started running.

The input begins with its own length in bytes on a line, so that it has an end before the pipe has one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Sequence

_ENDS_SECONDS = 30.0
"""How long a command that is interrupted may take to put back what it holds."""
_CHUNK_BYTES = 1 << 16


def run(command: Sequence[str], given: str, *, within: float) -> subprocess.CompletedProcess[str]:
    """Run `command`, which calls `follow`, with this input. Whatever ends the waiting ends the command first.

    Raises subprocess.TimeoutExpired after `within` seconds, and OSError when it cannot be started.
    """
    data = given.encode()
    # In a session of its own, since Ctrl-C at a terminal is for us: what is inside learns of it from us, in order.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    with os.fdopen(os.dup(process.stdin.fileno()), "wb") as held:  # `communicate` closes its own when all is written
        try:
            out, err = process.communicate(b"%d\n%b" % (len(data), data), timeout=within)
        except BaseException:
            held.close()
            _let_end(process)
            raise
    return subprocess.CompletedProcess(
        command, process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")
    )


def _let_end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdin = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_ENDS_SECONDS)
    finally:
        process.kill()
        process.wait()


def follow() -> str:
    """In the command: what it was given; from now on the end of the standard input is Ctrl-C, as it is when that ends
    too early (KeyboardInterrupt)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may have it ignored
    # Not through sys.stdin, whose lock would be held when this process wants to end.
    size = b""
    while not size.endswith(b"\n"):
        size += _read(1)
    data = bytearray()
    while len(data) < int(size):
        data += _read(min(_CHUNK_BYTES, int(size) - len(data)))
    threading.Thread(target=_wait, name="marina-lifeline", daemon=True).start()
    return data.decode()


def _read(most: int) -> bytes:
    found = os.read(0, most)
    if not found:
        raise KeyboardInterrupt
    return found


def _wait() -> None:
    while os.read(0, _CHUNK_BYTES):
        pass
    # To the main thread itself: handed to another one, the signal would not end what the main thread waits for.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
