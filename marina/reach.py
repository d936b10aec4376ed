"""Which servers a command means, where their model store is, and which gateway stands in front of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from marina import remote
from marina.canary import FileLog, Front
from marina.errors import ConfigError
from marina.gateway import SPLITS_FILE
from marina.home import find_home
from marina.remote import ContainerReplica, Target
from marina.replica import LocalReplica, Replica
from marina.settings import OTHER_VARIABLES, ServeSettings


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
) -> Reached:
    """An address that was given means that server, whatever else runs. Raises Unreachable when there is none."""
    home = find_home()
    folder = store or home.store
    settings = ServeSettings.load({"config": home.config}, os.environ, other_variables=OTHER_VARIABLES)
    management_url = url or settings.url("management")
    local = LocalReplica(
        store=folder,
        inference_url=inference_url or settings.url("inference"),
        management_url=management_url,
        supervisor_url=supervisor_url or settings.url("supervisor"),
    )
    chosen: Target = "local" if target == "auto" and (url or supervisor_url) else target
    found = remote.find_replicas(chosen, local, management_url=management_url, project=home.root)
    inside = [item for item in found if isinstance(item, ContainerReplica)]
    mounted = inside[0].store if inside and store is None else folder
    front = remote.find_front(home.root) if inside else _local_front(gateway_folder, gateway_log)
    return Reached(found, mounted, front)


def _local_front(folder: Path | None, log: Path | None) -> Front | None:
    if folder is None and log is None:
        return None
    if folder is None or log is None:
        raise ConfigError(
            "the folder and the log of a gateway go together (--gateway-folder, --gateway-log)",
            remedy="give both, or none for a server without a gateway",
        )
    return Front(splits=folder / SPLITS_FILE, open_log=lambda: FileLog(log))
