"""What a forked worker does before it becomes TorchServe's: import its archive's code without taking cores from others.

Importing a handler and loading its engine takes a fraction of a second of a core. Beside workers that answer, it would be
taken from them: clients would feel every deploy, every further worker, every worker that comes back. On Linux each thread
has a priority, which anybody may lower and only root may raise again; so a thread of its own imports and then ends, and
the worker keeps its priority. Where cores are idle it takes as long as without.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

NICE = 10
"""A tenth of the weight of a thread that answers (sched(7)): on cores that are busy without end, it gets on all the same."""


def import_gently(names: Sequence[str]) -> None:
    """Import modules at low priority; what goes wrong is for whoever imports them next."""

    def run() -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICE)
        for name in names:
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    thread = threading.Thread(target=run, name="import")
    thread.start()
    thread.join()


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
