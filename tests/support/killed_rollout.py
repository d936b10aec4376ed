"""A deploy that is killed (SIGKILL) at one line of its journal: python killed_rollout.py JSON

JSON: `store`, `archive`, `urls` (inference, management, supervisor), `gateway` (its folder and log, or null), and when to
die: at the first line with this `event` and a `what` that starts with `step`, `after` seconds later.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from marina.archive import Archive, sha256_of
from marina.canary import FileLog, Front, Stages
from marina.gates import Gates
from marina.journal import Journal
from marina.replica import LocalReplica
from marina.rollout import Rollout, Trial


def main(text: str) -> int:
    wish = json.loads(text)
    path = Path(wish["archive"])
    verified = Archive(path, wish["name"], wish["version"], sha256_of(path), path.stat().st_size)
    _die_at(wish["event"], wish["step"], wish["after"])
    Rollout._verify = lambda self, given: verified  # type: ignore[method-assign] # verified once, by the test
    replica = LocalReplica(
        store=Path(wish["store"]),
        inference_url=wish["urls"]["inference"],
        management_url=wish["urls"]["management"],
        supervisor_url=wish["urls"]["supervisor"],
    )
    stages = Stages(percents=(10, 100), seconds=1, requests=2, longest_seconds=10)
    trial = Trial(gates=Gates(min_agreement=0, max_p99_ratio=1000), sample_seconds=0, stages=stages)
    front = None
    if wish["gateway"] is not None:
        folder, log = map(Path, wish["gateway"])
        front = Front(splits=folder / "splits", open_log=lambda: FileLog(log))
    Rollout([replica], Path(wish["store"]), python=sys.executable, trial=trial, front=front).deploy(path)
    return 0


def _die_at(event: str, step: str, after: float) -> None:
    real = Journal._append

    def append(self: Journal, written: Any, **fields: Any) -> None:
        real(self, written, **fields)
        if written == event and str(fields.get("what", "")).startswith(step):
            if after:
                threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    Journal._append = append  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
