"""Settings, keys and certificates of the gateway: everything that needs no HAProxy."""

from __future__ import annotations

import hashlib
import re
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from marina import gateway
from marina.errors import ConfigError, ServerError
from marina.gateway import MAX_REPLICAS, GatewayConfig, Replica

pytestmark = pytest.mark.unit

ONE = {"address": "127.0.0.1:8080", "health_port": 8083}


@pytest.mark.parametrize(
    ("values", "message", "remedy"),
    [
        pytest.param({"replica": [ONE]}, "replica: unknown key", "did you mean replicas?", id="unknown key"),
        pytest.param(
            {"replicas": [{**ONE, "port": 1}]}, "replicas.0.port: unknown key", "known keys: address", id="deep"
        ),
        pytest.param({}, "set either replicas or service", "", id="no replica"),
        pytest.param({"replicas": [ONE], "service": "x:1"}, "set either replicas or service", "", id="both"),
        pytest.param({"replicas": [ONE] * 9}, "9 given, haproxy.cfg has 8 slots", "", id="too many"),
        pytest.param({"replicas": [ONE], "certificate": "x.pem"}, "go together", "", id="certificate alone"),
        pytest.param(
            {"replicas": [ONE], "max_chunked_bytes": 600_000}, "at most half of buffer_bytes", "", id="chunked"
        ),
        pytest.param({"replicas": [ONE], "deadline_ms": 130_000}, "larger than max_deadline_ms", "", id="deadline"),
        pytest.param({"replicas": [ONE], "retries": -1}, "retries: Input should be greater", "", id="negative"),
        pytest.param({"service": "x y:1"}, "service: String should match", "", id="not an address"),
        pytest.param({"service": 'a:1" ssl verify none'}, "service: String should match", "", id="injection"),
        pytest.param({"replicas": [ONE], "inner": "a b"}, "inner: String should match", "", id="socket name"),
    ],
)
def test_wrong_settings_are_refused_by_name(values: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        GatewayConfig.parse(values)
    assert remedy in refused.value.remedy
    assert refused.value.exit_code == 3


def presets() -> dict[str, str]:
    """The defaults in haproxy.cfg."""
    return dict(re.findall(r"^ +presetenv (\w+) (\S+)$", gateway.CONFIG_FILE.read_text(), re.M))


def test_both_homes_of_the_defaults_agree() -> None:
    made = GatewayConfig.parse({"service": "torchserve:8080"}).environment()
    assert made.pop("GATEWAY_UPSTREAM") == "torchserve:8080"
    assert made == presets()


def test_haproxy_cfg_reads_only_variables_that_the_config_sets() -> None:
    full = GatewayConfig.parse(
        {"replicas": [ONE] * MAX_REPLICAS, "tls_bind": ":8443", "certificate": "/x.pem"}
    ).environment()
    read = set(re.findall(r"GATEWAY_\w+", gateway.CONFIG_FILE.read_text()))
    assert read == set(full) | {"GATEWAY_UPSTREAM"}


def test_each_replica_has_its_slot() -> None:
    made = GatewayConfig(replicas=(Replica(address="a:1", health_port=2), Replica(address="b:3", health_port=4)))
    found = made.environment()
    assert (found["GATEWAY_REPLICA_2"], found["GATEWAY_HEALTH_2"]) == ("b:3", "4")
    assert "GATEWAY_REPLICA_3" not in found


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keys_are_made_once_and_only_the_digest_reaches_the_proxy(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    made = gateway.create_keys(folder)
    key = made.key.read_text().strip()
    assert len(key) == 43
    assert [mode(path) for path in (folder, made.key, made.clients.parent, made.clients)] == [
        0o700,
        0o600,
        0o755,
        0o644,
    ]
    assert made.clients.read_text() == f"first:{hashlib.sha256(key.encode()).hexdigest()}\n"
    assert gateway.create_keys(folder) == made
    assert made.key.read_text().strip() == key


def test_a_key_that_the_proxy_does_not_know_is_refused(tmp_path: Path) -> None:
    made = gateway.create_keys(tmp_path)
    made.clients.unlink()
    with pytest.raises(ConfigError, match="does not know the key") as refused:
        gateway.create_keys(tmp_path)
    assert str(made.key) in refused.value.remedy


def test_rotation_adds_first_and_revokes_then(tmp_path: Path) -> None:
    clients = gateway.create_keys(tmp_path).clients
    other = gateway.add_key(clients, "other", expires_at=2_000_000_000)
    new = gateway.add_key(clients, "first")
    assert len(gateway.read_clients(clients)) == 3
    assert gateway.revoke_keys(clients, "first", keep=new) == 1
    assert [(entry.client, entry.expires_at) for entry in gateway.read_clients(clients)] == [
        ("other", 2_000_000_000),
        ("first", None),
    ]
    assert new not in clients.read_text()
    assert other not in clients.read_text()
    assert gateway.revoke_keys(clients, "first") == 1


@pytest.mark.parametrize("client", ["", "a:b", "a b", "x" * 65, "a\nb:", "ü"])
def test_an_unsafe_client_id_is_refused(tmp_path: Path, client: str) -> None:
    with pytest.raises(ConfigError, match="client id"):
        gateway.add_key(tmp_path / "clients", client)


def test_revoking_nothing_is_an_error(tmp_path: Path) -> None:
    clients = gateway.create_keys(tmp_path).clients
    with pytest.raises(ConfigError, match="'nobody' has no key") as refused:
        gateway.revoke_keys(clients, "nobody")
    assert "first" in refused.value.remedy


@pytest.mark.parametrize("line", ["first", "first:abc", "first:" + "0" * 64 + ":tomorrow", "a b:" + "0" * 64])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    clients = tmp_path / "clients"
    clients.write_text(f"# a comment\n{line}\n")
    with pytest.raises(ConfigError, match="line 2"):
        gateway.read_clients(clients)


def test_two_commands_at_once_lose_no_key(tmp_path: Path) -> None:
    clients = tmp_path / "clients"
    threads = [threading.Thread(target=gateway.add_key, args=(clients, f"client-{number}")) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gateway.read_clients(clients)) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["clients"]


def test_the_certificate_names_its_hosts_and_tells_its_end(tmp_path: Path) -> None:
    pem = gateway.create_certificate(tmp_path, ["gateway.example", "127.0.0.1"], days=3)
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-text", "-in", str(pem)], capture_output=True, text=True, check=True
    ).stdout
    assert "DNS:gateway.example, IP Address:127.0.0.1" in shown
    assert "PRIVATE KEY" in pem.read_text()
    assert "PRIVATE KEY" not in pem.with_suffix(".crt").read_text()
    assert re.match(r"# not-after \d{10}\n", pem.read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gateway"]


@pytest.mark.parametrize("hosts", [[], ["a,DNS:b"], ["a b"]])
def test_unusable_host_names_are_refused(tmp_path: Path, hosts: list[str]) -> None:
    with pytest.raises(ConfigError, match="host names"):
        gateway.create_certificate(tmp_path, hosts)


def test_a_missing_haproxy_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.shutil, "which", lambda *_args, **_kwargs: None)
    with pytest.raises(ServerError, match="haproxy was not found") as missing:
        gateway.haproxy_program()
    assert "apt-get install" in missing.value.remedy
    assert missing.value.exit_code == 6
