"""A process that stops as at Ctrl-C, saving first, when the one that started it ends, even by a kill: it has the reading end
of a pipe as its standard input, to which nothing is ever written.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def held() -> Iterator[int]:
    """The reading end, a descriptor, for the children's standard input; it ends with the block or with this process."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def follow() -> None:
    """In the child: from now on the end of the standard input is Ctrl-C."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's background job has it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_wait, name="marina-lifeline", daemon=True).start()


def _wait() -> None:
    # Not through sys.stdin, whose lock would be held when this process wants to end.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
