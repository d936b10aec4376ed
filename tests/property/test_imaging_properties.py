from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handlerlib import imaging
from handlerlib.errors import RequestError
from handlerlib.spec import Limits, Preprocess
from support import images

LIMITS = Limits()
RGB = Preprocess(channels=3, height=16, width=16, mean=(0.5,) * 3, std=(0.5,) * 3)
JPEGS = [
    images.encode(images.pixels(seed, 40 + seed, 56), "JPEG", quality=85, **options)
    for seed in range(3)
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 1})
]
damages = st.one_of(
    st.integers(4, 2000),  # cut off there
    st.lists(st.tuples(st.integers(2, 2000), st.integers(0, 255)), min_size=1, max_size=3),  # bytes changed
)


def outcome(data: bytes) -> torch.Tensor | str:
    try:
        return imaging.decode(data, RGB, LIMITS)
    except RequestError as error:
        return str(error)


@given(jpeg=st.sampled_from(JPEGS), damage=damages)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_jpeg_is_the_same_to_both_decoders(
    jpeg: bytes, damage: int | list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(jpeg)
    if isinstance(damage, int):
        data = data[: min(damage, len(data) - 1)]
    else:
        for place, value in damage:
            data[min(place, len(data) - 1)] = value
    found = outcome(data)
    with monkeypatch.context() as without:
        without.setattr(imaging, "_decode_jpeg", None)
        expected = outcome(data)
    if isinstance(expected, str):
        assert found == expected
    else:
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, expected)
