"""What a forked worker does before it answers: import its archive's code and load its model, and take no cores from others.

Importing a handler and loading its engine takes a second or two of a core. Beside workers that answer, it would be taken
from them: clients would feel every deploy, every further worker, every worker that comes back. On Linux each thread has a
priority, which anybody may lower and only root, or whoever has the limit for it (RLIMIT_NICE, docker's `ulimits: nice`),
may raise again. So a thread of its own imports and then ends; and the model is loaded at low priority where that can be
raised again. Where cores are idle both take as long as without.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

NICE = 10
"""A tenth of the weight of a thread that answers (sched(7)): on cores that are busy without end, it gets on all the same."""
GENTLE_SECONDS = 10.0
"""For so long each of the two goes on so, where the priority can be raised again: on busy cores a worker must come back."""

P = ParamSpec("P")
T = TypeVar("T")


def import_gently(names: Sequence[str]) -> None:
    """Import modules at low priority; what goes wrong is for whoever imports them next."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)

    def run() -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), usual + NICE)
        for name in names:
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    thread = threading.Thread(target=run, name="import")
    thread.start()
    thread.join(GENTLE_SECONDS)
    _raise_all(usual)
    thread.join()


def gently(work: Callable[P, T]) -> Callable[P, T]:
    """`work` at low priority, for `GENTLE_SECONDS` at most; as it is where the priority could not be raised again.

    Threads that start meanwhile have it too, and are raised with the others.
    """

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        usual = os.getpriority(os.PRIO_PROCESS, 0)
        if not _may_return_to(usual):
            return work(*args, **kwargs)
        later = threading.Timer(GENTLE_SECONDS, _raise_all, (usual,))
        later.daemon = True
        later.start()
        os.setpriority(os.PRIO_PROCESS, 0, usual + NICE)
        try:
            return work(*args, **kwargs)
        finally:
            later.cancel()
            _raise_all(usual)

    return run


def _may_return_to(nice: int) -> bool:
    """Tried by a thread that ends."""
    found: list[bool] = []

    def attempt() -> None:
        own = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, own, nice + 1)
            os.setpriority(os.PRIO_PROCESS, own, nice)
            found.append(True)

    thread = threading.Thread(target=attempt, name="priority")
    thread.start()
    thread.join()
    return bool(found)


def _raise_all(nice: int) -> None:
    """Each thread that `gently` has lowered, and those that these start meanwhile; what a handler lowered itself stays."""
    lowered, found = min(19, nice + NICE), True
    while found:
        found = False
        for thread in [int(path.name) for path in Path("/proc/self/task").iterdir()]:
            with contextlib.suppress(OSError):  # it has ended
                if os.getpriority(os.PRIO_PROCESS, thread) == lowered:
                    os.setpriority(os.PRIO_PROCESS, thread, nice)
                    found = True


def handlers(folders: Sequence[str]) -> Iterator[str]:
    """The handler's module of each unpacked archive of ours among these folders.

    Other people's may set at import what holds for one thread only (`torch.set_grad_enabled`, `torch.cuda.set_device`), or
    start threads, which would keep the low priority.
    """
    for folder in folders:
        if not Path(folder, "handlerlib").is_dir():
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads(Path(folder, "MAR-INF", "MANIFEST.json").read_text(encoding="utf-8"))
            yield str(manifest["model"]["handler"]).removesuffix(".py")
