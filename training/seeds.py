"""Random numbers by position: every draw comes from (seed, what for, where), so nothing has to be remembered."""

from __future__ import annotations

import hashlib

from torch import Generator


def derive(seed: int, *position: object) -> int:
    """An independent seed for one purpose and position."""
    digest = hashlib.sha256(repr((seed, *position)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *position: object) -> Generator:
    """A generator of its own for one purpose and position, on the CPU."""
    return Generator().manual_seed(derive(seed, *position))
