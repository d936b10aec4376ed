"""How a worker is emptied before it is ended: TorchServe ends workers with the batch they have in hand.

TorchServe's describe request reaches a handler as a batch of its own. While a file in the temp folder asks this process
to park, such a request is not answered: the worker then holds nothing else, takes nothing new, and can be ended
(`marina.parking` is the other side).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LONGEST_SECONDS = 600.0
"""Then the worker goes back to work: whoever asked has gone away."""


def is_describe(data: Sequence[Any], headers: Mapping[str, Any]) -> bool:
    """Whether this batch is TorchServe's `GET /models/NAME/VERSION?customized=true`."""
    return len(data) == 1 and headers.get("describe") == "True"


def describe() -> bytes:
    """What this handler says of itself; when asked to park, only after it was let go."""
    folder, pid = Path(tempfile.gettempdir()), os.getpid()
    asked, parked = folder / f"park-{pid}", folder / f"parked-{pid}"
    if asked.exists():
        asked.replace(parked)
        deadline = time.monotonic() + LONGEST_SECONDS
        while parked.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    return json.dumps({"parks": True}).encode()
