"""`marina key`: clients get keys, change them and lose them, without a line of Python; the runbook's commands work."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

from marina import gateway, key_cli
from marina.errors import ConfigError
from support.commands import ROOT, project

RUNBOOK = ROOT / "deploy" / "monitoring" / "runbook.md"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = project(tmp_path / "home")
    monkeypatch.setenv("MARINA_HOME", str(folder))
    return folder


@pytest.mark.parametrize("place", ["environment", "file", "both"])
def test_keys_go_where_the_stack_mounts_them(
    home: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SECRETS", raising=False)
    if place != "environment":
        (home / ".env").write_text("SECRETS=before\nGATEWAY_PORT=9000\nSECRETS='./written'\n")
    if place != "file":
        monkeypatch.setenv("SECRETS", str(home / "given"))
    key_cli.add("partner", as_json=True)
    folder = home / ("written" if place == "file" else "given")
    assert json.loads(capsys.readouterr().out)["clients"] == str(folder / "gateway" / "clients")
    assert (folder / "gateway" / "clients").is_file()


def test_a_folder_that_docker_made_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir(mode=0o755)
    gateway.create_keys(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    gateway.create_certificate(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "the private key below it can be read by all who get there"


def test_the_life_of_a_key(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key_cli.add("partner")
    first = capsys.readouterr().out.strip()
    key_cli.add("partner", expires=30, as_json=True)
    added = json.loads(capsys.readouterr().out)
    assert added["expires_at"] == pytest.approx(time.time() + 30 * 86_400, abs=120)
    clients = home / "secrets" / "gateway" / "clients"
    assert str(clients) == added["clients"]
    assert stat.S_IMODE((home / "secrets").stat().st_mode) == 0o700
    assert first not in clients.read_text() and added["key"] not in clients.read_text()

    key_cli.list_keys(as_json=True)
    out = capsys.readouterr().out
    assert json.loads(out)["keys"] == [
        {"client": "partner", "expires_at": None},
        {"client": "partner", "expires_at": added["expires_at"]},
    ]
    key_cli.list_keys()
    table = capsys.readouterr().out
    assert "never" in table and "UTC" in table
    assert first not in out + table and added["key"] not in out + table

    key_cli.revoke("partner", keep_newest=True, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"client": "partner", "revoked": 1}
    assert [entry.expires_at for entry in gateway.read_clients(clients)] == [added["expires_at"]]
    with pytest.raises(ConfigError, match="no key but its newest to revoke"):
        key_cli.revoke("partner", keep_newest=True)
    key_cli.revoke("partner")
    assert gateway.read_clients(clients) == ()


def test_a_key_that_has_expired_is_listed_as_over(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key_cli.add("partner", expires=1)
    clients = home / "secrets" / "gateway" / "clients"
    gateway.add_key(clients, "former", expires_at=86_400)
    capsys.readouterr()
    key_cli.list_keys()
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if "UTC" in line}
    assert "1970-01-02 00:00 UTC, over" in rows["former"] and "over" not in rows["partner"]


def test_another_clients_file(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key_cli.add("partner", clients=tmp_path / "others")
    assert [entry.client for entry in gateway.read_clients(tmp_path / "others")] == ["partner"]
    assert not (home / "secrets").exists()
    with pytest.raises(ConfigError, match="client 'nobody' has no key to revoke") as caught:
        key_cli.revoke("nobody", clients=tmp_path / "others")
    assert "partner" in caught.value.remedy


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_log_commands_of_the_runbook_find_what_they_look_for(tmp_path: Path) -> None:
    answered, failed = (json.dumps({"event": "request", "status": status}) for status in (200, 503))
    logs = {
        "gateway": f"[NOTICE] (1) : New worker forked\n{answered}\n{failed}\n",
        "torchserve": "\n".join(
            [
                '{"time":"t","level":"INFO","logger":"access","status":200}',
                '{"time":"t","level":"WARN","logger":"MODEL_LOG","message":"{\\"event\\": \\"request failed\\"}"}',
                "ready http://127.0.0.1:8080",
                "error: digits did not load: ValueError: no",
            ]
        ),
    }
    wanted = {"gateway": [json.dumps(json.loads(failed), separators=(",", ":"))], "torchserve": []}
    wanted["torchserve"] = [logs["torchserve"].splitlines()[index] for index in (1, 3)]
    commands = re.findall(
        r"^    docker compose logs --no-log-prefix (\w+) +\| (.*)$", RUNBOOK.read_text(), re.MULTILINE
    )
    assert [service for service, _ in commands] == ["gateway", "torchserve"]
    for service, command in commands:
        done = subprocess.run(
            ["/bin/sh", "-c", command], input=logs[service], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.splitlines() == wanted[service]
