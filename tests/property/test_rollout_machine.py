"""serving.json through any sequence of rollouts, each of which may be killed at any moment of its writing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from marina import serving
from marina.serving import NotServed, Serving

NAMES = st.sampled_from(["digits", "tiny"])
VERSIONS = st.sampled_from(["1.0", "1.1", "2.0", "10"])
WORKERS = st.integers(1, 5)
CRASH = st.sampled_from([None, "open", "write", "sync", "replace", "sync folder"])


class Killed(BaseException):
    """The process is gone: nothing after this point runs, not even an except block's repair on disk."""


@contextmanager
def killed_at(point: str | None) -> Iterator[None]:
    """The write stops dead at this point, with what the earlier calls have left on disk."""
    seen: list[str] = []

    def die_before(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            if point == name or (point == "sync folder" and seen.count("sync") == 2):
                raise Killed
            return real(*arguments, **options)

        return call

    real_open = Path.open

    def half_written(self: Path, *arguments: Any, **options: Any) -> Any:
        stream = real_open(self, *arguments, **options)
        if point == "write":
            stream.write('{"schema_version": 1, "mod')
            stream.close()
            raise Killed
        return stream

    with (
        patch.object(Path, "open", die_before("open", half_written)),
        patch.object(os, "fsync", die_before("sync", os.fsync)),
        patch.object(Path, "replace", die_before("replace", Path.replace)),
    ):
        try:
            yield
        except Killed:
            if point is None:
                raise


class Rollouts(RuleBasedStateMachine):
    """The file against a plain model of it: name -> (default, versions, previous)."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Path(tempfile.mkdtemp(prefix="marina-serving-"))
        self.held: Serving = Serving()
        """What the last whole write said."""
        self.defaults: dict[str, list[str]] = {}
        """Name -> every default it ever had, the newest last."""

    def teardown(self) -> None:
        shutil.rmtree(self.store)

    def _write(self, after: Serving, crash: str | None) -> None:
        with killed_at(crash):
            serving.write(self.store, after)
        found = serving.read(self.store)
        assert found in (self.held if self.held.models else None, after)
        if crash is None:
            assert found == after
        self.held = found or Serving()
        for name, model in self.held.models.items():
            if self.defaults.setdefault(name, [model.default])[-1] != model.default:
                self.defaults[name].append(model.default)

    @rule(name=NAMES, version=VERSIONS, workers=WORKERS, crash=CRASH)
    def load(self, name: str, version: str, workers: int, crash: str | None) -> None:
        self._write(self.held.with_version(name, version, workers), crash)

    @rule(name=NAMES, version=VERSIONS, crash=CRASH)
    def switch(self, name: str, version: str, crash: str | None) -> None:
        model = self.held.models.get(name)
        if model is None or version not in model.versions:
            with pytest.raises(NotServed):
                self.held.with_default(name, version)
            return
        after = self.held.with_default(name, version)
        if version != model.default:
            previous = after.models[name].previous
            assert previous is not None
            assert (previous.version, previous.workers) == (model.default, model.versions[model.default])
        self._write(after, crash)

    @rule(name=NAMES, version=VERSIONS, crash=CRASH)
    def retire(self, name: str, version: str, crash: str | None) -> None:
        model = self.held.models.get(name)
        if model is None or version not in model.versions or version == model.default:
            with pytest.raises(NotServed):
                self.held.without(name, version)
            return
        after = self.held.without(name, version)
        assert after.models[name].previous == model.previous, "retiring must not forget where a rollback goes"
        self._write(after, crash)

    @rule(name=NAMES, crash=CRASH)
    def rollback(self, name: str, crash: str | None) -> None:
        model = self.held.models.get(name)
        if model is None or model.previous is None:
            return
        before = model.default
        loaded = self.held.with_version(name, model.previous.version, model.previous.workers)
        self._write(loaded, None)
        after = loaded.with_default(name, model.previous.version)
        back = after.models[name].previous
        assert back is not None and back.version == before, "a second rollback must come back"
        self._write(after, crash)

    @invariant()
    def the_file_holds_what_was_written_last(self) -> None:
        assert serving.read(self.store) == (self.held if self.held.models else None)

    @invariant()
    def the_default_is_served_and_the_previous_one_was_a_default(self) -> None:
        for name, model in self.held.models.items():
            assert model.default in model.versions
            assert all(workers >= 1 for workers in model.versions.values())
            if model.previous is not None:
                assert model.previous.version != model.default
                assert model.previous.version in self.defaults[name][:-1]

    @invariant()
    def only_one_partial_file_is_ever_left(self) -> None:
        left = {path.name for path in self.store.iterdir()} - {serving.SERVING_FILE}
        assert left <= {f".{serving.SERVING_FILE}.partial"}


TestRollouts = Rollouts.TestCase
