"""What all tiers share: the tier of a test is its folder, and no test sees the developer's own settings."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest

TIERS = ("unit", "property", "archive", "contract", "container")
ROOT = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("dev", max_examples=50, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=200, deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_configure() -> None:
    # A shell's background job and nohup start it with these ignored, and so would be every program that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in TIERS:
            item.add_marker(getattr(pytest.mark, folder))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("MARINA_", "TS_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def handlers() -> Path:
    """The folder that archives take their code from."""
    return ROOT / "handlers"
