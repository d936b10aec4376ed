"""Replicas that stop, die and come back while clients keep asking: nobody gets a failed answer."""

from __future__ import annotations

import time

from support import images
from support.docker import Deployment, Load, docker, eventually, inspect

TINY = "/predictions/tiny"


def test_stopping_a_replica_fails_no_request(two_ready: Deployment) -> None:
    victim = two_ready.replicas()[0].id
    with Load(two_ready, TINY, images.photo(0)) as load:
        began = time.monotonic()
        docker("stop", victim)
        took = time.monotonic() - began
        load.wait_for(50)
    assert load.failures() == []
    assert inspect(victim)["State"]["ExitCode"] == 0
    assert took < 30, "it drained and ended by itself, and was not killed after the grace period"


def test_killing_a_replica_fails_no_request(two_ready: Deployment) -> None:
    with Load(two_ready, TINY, images.photo(0)) as load:
        docker("kill", "-s", "KILL", two_ready.replicas()[1].id)
        load.wait_for(100)
    assert load.failures() == []


def test_a_replica_whose_java_dies_is_restarted_and_serves_again(two_ready: Deployment) -> None:
    victim = two_ready.replicas()[0].id
    find = "import os, psutil; [os.kill(p.pid, 9) for p in psutil.process_iter() if p.name() == 'java']"
    with Load(two_ready, TINY, images.photo(0)) as load:
        docker("exec", victim, "python", "-c", find)
        eventually(lambda: inspect(victim)["RestartCount"] == 1, "the engine's restart", two_ready)
        two_ready.wait_ready(2)
        load.wait_for(50)
    assert load.failures() == []


def test_scaling_down_and_up_fails_no_request(two_ready: Deployment) -> None:
    with Load(two_ready, TINY, images.photo(0)) as load:
        two_ready.scale(1)
        assert len(two_ready.replicas()) == 1
        load.wait_for(50)
        two_ready.scale(2)
        two_ready.wait_ready(2)
        load.wait_for(50)
    assert load.failures() == []


def test_the_supervisor_reaps_what_other_processes_leave(two_ready: Deployment) -> None:
    replica = two_ready.replicas()[0].id
    docker("exec", replica, "/bin/sh", "-c", "sleep 0.1 &")
    count = "import psutil; print(sum(p.status() == 'zombie' for p in psutil.process_iter()))"
    eventually(lambda: docker("exec", replica, "python", "-c", count) == "0", "the end of the zombie", two_ready)
