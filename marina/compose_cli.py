"""The commands of the compose stack: up, down, logs, sbom."""

from __future__ import annotations

import dataclasses
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from marina import compose
from marina.home import find_home
from marina.screen import Screen

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of sentences.")]
Services = Annotated[list[str] | None, typer.Argument(help="Services; all of them when none is given.")]


class DeviceChoice(StrEnum):
    """As the option takes it."""

    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (up, down, logs, sbom):
        app.command()(command)


def up(
    services: Services = None,
    device: Annotated[
        DeviceChoice, typer.Option("--device", help="auto: GPUs where there are any.")
    ] = DeviceChoice.auto,
    build: Annotated[bool, typer.Option("--build/--no-build", help="Build the image first, from the cache.")] = True,
    tls: Annotated[bool, typer.Option("--tls", help="Also listen on GATEWAY_TLS_PORT (8443) with TLS.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds until all must be ready.")] = 300.0,
    as_json: Json = False,
) -> None:
    """Start gateway, TorchServe and monitoring in containers, wait until they answer, and show how to ask."""
    screen = Screen(as_json)
    running = compose.up(
        find_home(),
        device.value,
        services=services or (),
        build=build,
        tls=tls,
        timeout_s=timeout,
        say=lambda line: screen.err.print(line, markup=False, highlight=False),
        environment=os.environ,
    )
    screen.result({**dataclasses.asdict(running), "key_file": str(running.key_file)})
    screen.say(f"ready    {running.url} after {running.seconds:.1f} s, {running.replicas} on {running.device}")
    screen.say(f"models   {', '.join(running.models)}")
    screen.say(f"key      {running.key_file}")
    screen.say(f"ask      {running.curl}")
    if running.dashboards:
        password = running.key_file.parent / "grafana" / "admin.password"
        screen.say(f"graphs   {running.dashboards} from this host only; user admin, password in {password}")


def down(
    keep_data: Annotated[
        bool, typer.Option("--keep-data", help="Keep the volumes: metrics, dashboards' state.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Drain and stop the containers and leave nothing of them behind."""
    home = find_home()
    compose.down(home, keep_data=keep_data, environment=os.environ)
    Screen(as_json).result({"down": str(home.root), "data_kept": keep_data})


def logs(
    services: Services = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until Ctrl-C.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", min=0, help="Only the last lines of each container.")] = None,
) -> None:
    """The containers' logs."""
    sys.exit(compose.logs(find_home(), services or (), follow=follow, tail=tail, environment=os.environ))


def sbom(
    output: Annotated[Path | None, typer.Option("--output", help="Write it there instead of standard output.")] = None,
) -> None:
    """The image's bill of materials, CycloneDX JSON."""
    text = compose.sbom(find_home(), environment=os.environ)
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")
