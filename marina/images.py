"""Where the stack's images come from: a registry, and Debian's packages where none can be reached.

A host without a registry needs one image only, debian:bookworm-slim. HAProxy and Prometheus are then Debian's, built in
seconds from deploy/debian-images, and our own image is built on it. Grafana is not packaged by Debian: the stack starts
without it and says so.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marina.engine import Engine
from marina.errors import ConfigError, ServerError

DEBIAN_BASE = "debian:bookworm-slim"
DEBIAN_IMAGES = Path("deploy") / "debian-images"
"""In the project folder; one folder per service that can be built from Debian's packages."""

_PULL_SECONDS = 900
_OFFICIAL = {"haproxy": "HAPROXY_IMAGE", "prom/prometheus": "PROMETHEUS_IMAGE"}
"""Repository of an official image -> the variable that names another one. What a user chose is never replaced."""
_OFFICIAL_BASE = "python"
_OPTIONAL = frozenset({"grafana"})


@dataclass(frozen=True, slots=True)
class Provided:
    """What can be started, and the variables that say from which images."""

    services: tuple[str, ...]
    variables: Mapping[str, str]


def provide(
    engine: Engine,
    configured: Mapping[str, Mapping[str, Any]],
    wanted: Sequence[str],
    root: Path,
    say: Callable[[str], None],
) -> Provided:
    """Have the images of the `wanted` services (all without a profile when none are) but our own on the engine.

    Raises ConfigError for one that is not configured, ServerError for one that cannot be pulled and has no substitute.
    """
    unknown = [name for name in wanted if name not in configured]
    if unknown:
        raise ConfigError(f"there is no service '{unknown[0]}'", remedy=f"services: {', '.join(configured)}")
    chosen = tuple(wanted) or tuple(name for name, service in configured.items() if not service.get("profiles"))
    services: list[str] = []
    variables: dict[str, str] = {}
    for name in chosen:
        image = str(configured[name]["image"])
        variable = _OFFICIAL.get(image.partition(":")[0])
        if name == "torchserve" or _present(engine, image, say):
            services.append(name)
        elif variable is not None and _present(engine, DEBIAN_BASE, say):
            variables[variable] = _build_debian(engine, image, root, say)
            services.append(name)
        elif name in _OPTIONAL and name not in wanted:
            say(f"{image} cannot be pulled: starting without {name}")
        else:
            raise ServerError(
                f"the image {image} of {name} cannot be pulled",
                remedy=f"connect to its registry, or have {image} or {DEBIAN_BASE} on the engine (docker load)",
            )
    return Provided(tuple(services), variables)


def base_image(engine: Engine, configured: Mapping[str, Any], say: Callable[[str], None]) -> Mapping[str, str]:
    """The variables for building our own image: another base where the official Python image cannot be pulled."""
    base = str(dict(configured["build"]["args"])["BASE_IMAGE"])
    if (
        base.partition(":")[0] != _OFFICIAL_BASE
        or _present(engine, base, say)
        or not _present(engine, DEBIAN_BASE, say)
    ):
        return {}  # the build itself says what is wrong
    say(f"{base} cannot be pulled: building on {DEBIAN_BASE}")
    return {"BASE_IMAGE": DEBIAN_BASE}


def _build_debian(engine: Engine, image: str, root: Path, say: Callable[[str], None]) -> str:
    name = image.partition(":")[0].rpartition("/")[2]
    tag = f"marina-{name}"
    say(f"{image} cannot be pulled: building {tag} from Debian's packages")
    engine.ask("build", "--quiet", "--tag", tag, str(root / DEBIAN_IMAGES / name))
    return tag


def _present(engine: Engine, image: str, say: Callable[[str], None]) -> bool:
    """Whether the engine has the image, after trying to pull it when it has not."""
    if _succeeds(engine, "image", "inspect", image):
        return True
    say(f"pulling {image}")
    return _succeeds(engine, "pull", "--quiet", image)


def _succeeds(engine: Engine, *arguments: str) -> bool:
    try:
        done = subprocess.run([engine.docker, *arguments], capture_output=True, timeout=_PULL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
