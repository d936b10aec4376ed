"""Unique requests to an identity model through the gateway, batching, cancels and killed workers: no answer is mixed up."""

from __future__ import annotations

import pytest

from benchmarks.chaos import identity, resources
from support.gateway import require_haproxy

REQUESTS = 12_000


@pytest.mark.timeout(600)
def test_no_answer_is_somebody_elses() -> None:
    require_haproxy()
    with resources.temp_folder() as folder, identity.echo_stack(folder) as stack:
        found = identity.ask(stack, REQUESTS, kill_every=0.3)
    assert found["mixed"] == 0, found["examples"]
    assert found["unanswered"] == 0, found["retried"]
    assert found["right"] == REQUESTS
    assert found["cancelled"] > 0 and found["kills"] > 0
