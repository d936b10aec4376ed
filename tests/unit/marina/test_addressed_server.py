"""An address given to a command means that server in all the command does: its neighbour is never asked in its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import typer

from marina import plan_cli, rollout_cli
from marina.errors import ConfigError
from marina.home import find_home
from marina.reach import address_of, reach
from marina.replica import LocalReplica
from marina.settings import ServeSettings
from marina.tune_cli import _server
from support.commands import ROOT


@dataclass
class Asked:
    """A server without models, and what it was asked."""

    port: int = 0
    requests: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def _server_without_models() -> Iterator[Asked]:
    asked = Asked()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, b'{"models": []}')

        def do_POST(self) -> None:
            self._answer(202, b"{}")

        def _answer(self, status: int, body: bytes) -> None:
            asked.requests.append(f"{self.command} {self.path.partition('?')[0]}")
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        asked.port = server.server_port
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Asked]:
    """The server at the usual ports: all of its interfaces but management are this one."""
    for name in ("MARINA_MANAGEMENT_URL", "MARINA_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MARINA_HOME", str(ROOT))
    with _server_without_models() as found:
        monkeypatch.setenv("MARINA_SUPERVISOR_PORT", str(found.port))
        yield found


@pytest.fixture
def other() -> Iterator[Asked]:
    with _server_without_models() as found:
        yield found


def test_drain_of_another_server_leaves_the_own_one_alone(own: Asked, other: Asked) -> None:
    with pytest.raises(ConfigError, match=f"supervisor address of the server at {other.url} is not known") as caught:
        rollout_cli.drain(url=other.url)
    assert "--supervisor-url" in caught.value.remedy
    assert "POST /drain" not in own.requests + other.requests
    rollout_cli.drain(url=other.url, supervisor_url=other.url)
    assert "POST /drain" in other.requests and "POST /drain" not in own.requests


def test_what_needs_no_other_address_goes_on_without_asking_the_own_server(
    own: Asked, other: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollout_cli.status(url=other.url, store=tmp_path, as_json=True)
    assert json.loads(capsys.readouterr().out)["models"] == []
    (found,) = reach(url=other.url, store=tmp_path).replicas
    assert isinstance(found, LocalReplica)
    assert found._inference_url == found._supervisor_url == ""
    assert own.requests == []


@pytest.mark.parametrize("command", ["deploy", "rollback", "recover"])
def test_golden_samples_are_never_asked_of_the_own_server(
    command: str, own: Asked, other: Asked, tmp_path: Path
) -> None:
    arguments = {"deploy": ("nothing.mar",), "rollback": ("m",), "recover": ()}[command]
    with pytest.raises(ConfigError, match="inference address") as caught:
        getattr(rollout_cli, command)(*arguments, url=other.url, store=tmp_path)
    assert "--inference-url" in caught.value.remedy
    assert own.requests == []


def test_tune_never_loads_the_own_server_for_another(own: Asked, other: Asked, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inference address"):
        _server(find_home(), tmp_path, other.url, None)
    assert _server(find_home(), tmp_path, other.url, other.url).inference_url == other.url


def test_the_usual_address_given_by_hand_is_the_own_server(
    own: Asked, other: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARINA_MANAGEMENT_PORT", str(other.port))
    rollout_cli.drain(url=f"http://localhost:{other.port}/")
    assert "POST /drain" in own.requests


def test_without_any_address_the_usual_one_is_meant() -> None:
    usual = ServeSettings()
    assert address_of("supervisor", None, None, usual, needed=True) == usual.url("supervisor")


def test_one_of_several_replicas_is_drained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "docker"
    program.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/asked
case "$1 $*" in
*" drain") echo '{{"done": "drain"}}' ;;
"inspect "*) echo '[{{"Source": "{tmp_path}", "Destination": "/opt/marina/model_store"}}]' ;;
"ps "*gateway*) ;;
*) printf 'stack_torchserve_1\\nstack_torchserve_2\\n' ;;
esac
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("MARINA_MANAGEMENT_URL", raising=False)
    with pytest.raises(ConfigError, match="2 replicas: stack_torchserve_1, stack_torchserve_2") as caught:
        rollout_cli.drain(target="compose")
    assert "--replica" in caught.value.remedy
    with pytest.raises(ConfigError, match="no replica 'local'"):
        rollout_cli.drain("local", target="compose")
    assert "drain" not in (tmp_path / "asked").read_text()
    # A replica in a container is asked in there: no address is needed of it.
    rollout_cli.drain("stack_torchserve_2", target="compose", url="http://127.0.0.1:9", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"draining": ["stack_torchserve_2"]}
    (asked,) = [line for line in (tmp_path / "asked").read_text().splitlines() if line.endswith(" drain")]
    assert "stack_torchserve_2" in asked


def test_a_plan_is_for_the_server_that_the_variables_name(
    own: Asked,
    other: Asked,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "deploy.toml"
    file.write_text(f'[hosts.here]\nstore = "{tmp_path}"\n')
    monkeypatch.setenv("MARINA_MANAGEMENT_PORT", str(own.port + 1 if own.port < 65535 else own.port - 1))
    monkeypatch.setenv("MARINA_MANAGEMENT_URL", other.url)
    plan_cli.plan(file, as_json=True)
    assert json.loads(capsys.readouterr().out)["hosts"] == {"here": {"actions": []}}
    assert "GET /models" in other.requests and own.requests == []
    with pytest.raises(typer.Exit) as ended:
        plan_cli.apply(file, as_json=True)
    assert ended.value.exit_code == 3
    assert "inference address" in json.loads(capsys.readouterr().out)["hosts"]["here"]["error"]
    monkeypatch.setenv("MARINA_URL", other.url)
    plan_cli.apply(file, as_json=True)
    assert json.loads(capsys.readouterr().out)["changed"] is False
    assert own.requests == []


def test_an_address_in_the_file_wins_over_the_variables(
    own: Asked, other: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "deploy.toml"
    file.write_text(f'[hosts.here]\nurl = "{other.url}"\nstore = "{tmp_path}"\n')
    monkeypatch.setenv("MARINA_MANAGEMENT_URL", own.url)
    plan_cli.plan(file, as_json=True)
    assert "GET /models" in other.requests and own.requests == []
