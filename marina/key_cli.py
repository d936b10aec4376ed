"""The commands on clients' keys for the gateway: key add, key revoke, key list."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from marina import gateway
from marina.home import find_home
from marina.screen import Screen

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Client = Annotated[
    str, typer.Argument(help="The client's id; it is in the gateway's log, and all its keys share a rate.")
]
Clients = Annotated[
    Path | None,
    typer.Option("--clients", metavar="FILE", help="The gateway's clients file (secrets/gateway/clients by default)."),
]

_DAY_SECONDS = 86_400


def register(app: typer.Typer) -> None:
    """Add the commands to the program, as a group."""
    keys = typer.Typer(name="key", help="Give clients keys for the gateway, take them away, and list them.")
    for name, command in (("add", add), ("revoke", revoke), ("list", list_keys)):
        keys.command(name=name)(command)
    app.add_typer(keys)


def add(
    client: Client,
    expires: Annotated[int | None, typer.Option(min=1, metavar="DAYS", help="Never by default.")] = None,
    clients: Clients = None,
    as_json: Json = False,
) -> None:
    """Make one more key for a client and print it, once: only its digest is stored. It works within a second or two."""
    screen, file = Screen(as_json), clients or gateway.prepare_folder(_secrets())
    expires_at = None if expires is None else int(time.time()) + expires * _DAY_SECONDS
    key = gateway.add_key(file, client, expires_at=expires_at)
    screen.result({"client": client, "key": key, "expires_at": expires_at, "clients": str(file)})
    screen.say(key)


def revoke(
    client: Client,
    keep_newest: Annotated[
        bool, typer.Option("--keep-newest", help="All but the one added last: the end of a rotation.")
    ] = False,
    clients: Clients = None,
    as_json: Json = False,
) -> None:
    """Take away a client's keys. They stop working within a second or two."""
    screen = Screen(as_json)
    count = gateway.revoke_keys(_file(clients), client, keep_newest=keep_newest)
    screen.result({"client": client, "revoked": count})
    screen.say(f"{client}: {count} key{'s' if count != 1 else ''} revoked")


def list_keys(clients: Clients = None, as_json: Json = False) -> None:
    """The clients and when their keys expire, one row per key; keys themselves are stored nowhere."""
    screen, now = Screen(as_json), time.time()
    found = gateway.read_clients(_file(clients))
    screen.result({"keys": [{"client": entry.client, "expires_at": entry.expires_at} for entry in found]})
    screen.table(("client", "expires"), [(entry.client, _expiry(entry.expires_at, now)) for entry in found])


def _secrets() -> Path:
    """The folder that docker-compose.yml mounts: SECRETS of the environment or of `.env`, relative to the project's.

    Read here, and not asked of Compose as elsewhere: a gateway without containers has keys too.
    """
    root = find_home().root
    environment = root / ".env"
    lines = environment.read_text("utf-8").splitlines() if environment.is_file() else []
    written = [line.partition("=")[2].strip().strip("'\"") for line in lines if line.startswith("SECRETS=")]
    return root / (os.environ.get("SECRETS") or (written[-1] if written else "") or "secrets")


def _file(clients: Path | None) -> Path:
    return clients or _secrets() / gateway.GATEWAY_FOLDER / gateway.CLIENTS_FILE


def _expiry(expires_at: int | None, now: float) -> str:
    if expires_at is None:
        return "never"
    day = datetime.fromtimestamp(expires_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return day if expires_at > now else f"{day}, over"
