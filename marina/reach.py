"""Which servers a command means, where their model store is, and which gateway stands in front of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from marina import remote
from marina.canary import FileLog, Front
from marina.errors import ConfigError
from marina.gateway import SPLITS_FILE
from marina.home import find_home
from marina.remote import ContainerReplica, Target
from marina.replica import LocalReplica, Replica
from marina.settings import OTHER_VARIABLES, ServeSettings

Interface = Literal["inference", "supervisor"]
"""What a command may need of a server beside its management address."""


@dataclass(frozen=True, slots=True)
class Reached:
    """Servers with one model store."""

    replicas: Sequence[Replica]
    store: Path
    front: Front | None
    """The gateway; None: clients ask the server itself."""


def reach(
    target: Target = "auto",
    *,
    url: str | None = None,
    inference_url: str | None = None,
    supervisor_url: str | None = None,
    store: Path | None = None,
    gateway_folder: Path | None = None,
    gateway_log: Path | None = None,
    needs: Interface | None = None,
) -> Reached:
    """An address that was given means that server, whatever else runs. Raises Unreachable when there is none, and
    ConfigError when the command `needs` an address of a server of which only the management address was given."""
    home = find_home()
    folder = store or home.store
    settings = ServeSettings.load({"config": home.config}, os.environ, other_variables=OTHER_VARIABLES)
    needs = None if target == "compose" else needs
    management_url = url or settings.url("management")
    local = LocalReplica(
        store=folder,
        inference_url=address_of("inference", inference_url, url, settings, needed=needs == "inference"),
        management_url=management_url,
        supervisor_url=address_of("supervisor", supervisor_url, url, settings, needed=needs == "supervisor"),
    )
    chosen: Target = "local" if target == "auto" and (url or supervisor_url) else target
    found = remote.find_replicas(chosen, local, management_url=management_url, project=home.root)
    inside = [item for item in found if isinstance(item, ContainerReplica)]
    mounted = inside[0].store if inside and store is None else folder
    front = remote.find_front(home.root) if inside else _local_front(gateway_folder, gateway_log)
    return Reached(found, mounted, front)


def address_of(
    interface: Interface, given: str | None, management_url: str | None, settings: ServeSettings, *, needed: bool
) -> str:
    """Of the server at `management_url`: the usual ports belong to it only when that is the usual address too.

    Empty when it is unknown and not `needed`: nobody is asked then, and no other server in its place. Raises ConfigError
    when it is needed.
    """
    if given:
        return given
    if management_url is None or _same(management_url, settings.url("management")):
        return settings.url(interface)
    if needed:
        raise ConfigError(
            f"the {interface} address of the server at {management_url} is not known, and "
            f"{settings.url(interface)} may be another server's",
            remedy=f"give --{interface}-url too ({interface}_url in deploy.toml)",
        )
    return ""


def _same(one: str, other: str) -> bool:
    return _place(one) == _place(other)


def _place(url: str) -> str:
    return urlsplit(url).netloc.replace("localhost", "127.0.0.1")


def _local_front(folder: Path | None, log: Path | None) -> Front | None:
    if folder is None and log is None:
        return None
    if folder is None or log is None:
        raise ConfigError(
            "the folder and the log of a gateway go together (--gateway-folder, --gateway-log)",
            remedy="give both, or none for a server without a gateway",
        )
    return Front(splits=folder / SPLITS_FILE, open_log=lambda: FileLog(log))
