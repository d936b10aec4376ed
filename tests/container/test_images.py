"""Where images come from when the registry does not have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from marina import images
from marina.engine import find_engine
from marina.errors import ServerError
from support.docker import ROOT, docker

GONE = "no-such-tag-of-marinas-tests"


def provide(wanted: tuple[str, ...] = (), root: Path = ROOT, **chosen: str) -> tuple[images.Provided, list[str]]:
    configured = {
        "gateway": {"image": f"haproxy:{GONE}"},
        "torchserve": {"image": "marina"},
        "grafana": {"image": f"grafana/grafana-oss:{GONE}"},
        "dcgm-exporter": {"image": f"dcgm:{GONE}", "profiles": ["gpu-metrics"]},
    }
    configured |= {name: {"image": image} for name, image in chosen.items()}
    said: list[str] = []
    return images.provide(find_engine(), configured, wanted, root, said.append), said


@pytest.mark.usefixtures("images")
def test_debian_takes_the_place_of_what_cannot_be_pulled_and_it_is_said() -> None:
    provided, said = provide()
    assert provided.services == ("gateway", "torchserve")
    assert provided.variables == {"HAPROXY_IMAGE": "marina-haproxy"}
    assert "haproxy" in docker("run", "--rm", "--network", "none", "marina-haproxy", "haproxy", "-v").lower()
    assert f"grafana/grafana-oss:{GONE} cannot be pulled: starting without grafana" in said


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(
    ("wanted", "chosen"), [(("grafana",), {}), ((), {"gateway": f"mine/proxy:{GONE}"})], ids=["asked for", "chosen"]
)
def test_what_a_user_asked_for_is_not_replaced(wanted: tuple[str, ...], chosen: dict[str, str]) -> None:
    with pytest.raises(ServerError, match="cannot be pulled") as caught:
        provide(wanted, **chosen)
    assert caught.value.remedy
