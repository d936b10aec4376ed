"""The gateway: HAProxy with `deploy/gateway/haproxy.cfg`, its settings, its clients' keys and its certificate.

There is one configuration, a static file that takes everything variable from the environment, because the official
HAProxy image holds no Python that could render one: docker-compose sets the variables, and here `GatewayConfig` sets
the same ones for a HAProxy on this machine. Only the digests of the keys ever reach the proxy.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import fcntl
import hashlib
import ipaddress
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import psutil
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from marina import processes
from marina.errors import ConfigError, PortBusy, ServerError

CONFIG_FILE = Path(__file__).resolve().parent.parent / "deploy" / "gateway" / "haproxy.cfg"
KEY_FILE = "inference.key"
GATEWAY_FOLDER = "gateway"
"""Below the secrets folder: what the proxy may read, and all that is mounted into its container."""
CLIENTS_FILE = "clients"
SPLITS_FILE = "splits"
CERTIFICATE_FILE = "tls.pem"
MAX_REPLICAS = 8
"""Slots that haproxy.cfg has."""
INSTALL_HAPROXY = "install it: apt-get install --no-install-recommends haproxy (2.6 or newer)"

_LOADED = "Loading success."
"""What HAProxy's master writes when a new process of it serves."""
_SIGNAL_SECONDS = 0.2
_NICE = -5
"""Three times the weight of a server beside it: whom it refuses is to hear so at once. Only root may (sched(7))."""
_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

Address = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.\-*\[\]:]*:[0-9]{1,5}$", max_length=255)]
"""`host:port`, or `:port` for every interface."""
Port = Annotated[int, Field(ge=1, le=65535)]
Bytes = Annotated[int, Field(ge=1, le=1 << 30)]
Milliseconds = Annotated[int, Field(ge=1, le=3_600_000)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Replica(_Frozen):
    """One TorchServe: where it answers predictions, and its supervisor's port with `/readyz` on the same host."""

    address: Address
    health_port: Port


class GatewayConfig(_Frozen):
    """Everything that can be set about the gateway. Each field but the replicas has its default in haproxy.cfg too.

    Exactly one of `replicas` (fixed addresses) and `service` (a DNS name whose addresses are the replicas, as
    docker-compose gives them) is set.
    """

    replicas: tuple[Replica, ...] = ()
    service: Address | None = None
    health_port: Port = 8083
    """The supervisors' port when the replicas come from `service`."""
    resolver: Address = "127.0.0.11:53"
    """The DNS server for `service`; the default is the one inside a Docker network."""
    bind: Address = ":8000"
    tls_bind: Address | None = None
    certificate: Path | None = None
    """PEM with the certificate chain and the private key."""
    metrics_bind: Address = ":8405"
    """Prometheus' port: `/metrics` and `/credentials`. Never publish it."""
    inner: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = "marina-gateway"
    """Name of the abstract socket between the gateway's two steps; unique per network namespace."""
    clients: Path = Path("/run/secrets/gateway/clients")
    splits: Path | None = None
    """Which canaries run (`marina.canary`); `splits` beside the clients file when not given."""
    max_body_bytes: Bytes = 10 * 1024 * 1024
    buffer_bytes: Annotated[int, Field(ge=65536, le=64 << 20)] = 1024 * 1024
    """The largest request, header fields included, that another replica may be asked again for (README: memory)."""
    max_chunked_bytes: Bytes = 512 * 1024
    """The largest body without Content-Length; at most half the buffer, because only there it can be measured."""
    max_header_bytes: Annotated[int, Field(ge=1024, le=65536)] = 16 * 1024
    max_url_bytes: Annotated[int, Field(ge=64, le=16384)] = 2048
    max_connections: Annotated[int, Field(ge=1, le=4000)] = 1000
    max_inflight: Annotated[int, Field(ge=1, le=10000)] = 32
    """Requests that one replica works on at a time; the others wait in the gateway."""
    max_queue: Annotated[int, Field(ge=1, le=10000)] = 600
    """Waiting requests beyond which the next one is answered 429 at once."""
    queue_timeout_ms: Milliseconds = 5_000
    deadline_ms: Milliseconds = 30_000
    """For requests without `X-Deadline-Ms`."""
    max_deadline_ms: Milliseconds = 120_000
    request_timeout_ms: Milliseconds = 10_000
    """For a client to send its whole request."""
    idle_timeout_ms: Milliseconds = 30_000
    rate_limit: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Requests of one client in 10 s."""
    retries: Annotated[int, Field(ge=0, le=10)] = 3

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.replicas) == (self.service is not None):
            raise ValueError("set either replicas or service")
        if len(self.replicas) > MAX_REPLICAS:
            raise ValueError(f"replicas: {len(self.replicas)} given, haproxy.cfg has {MAX_REPLICAS} slots")
        if (self.tls_bind is None) != (self.certificate is None):
            raise ValueError("tls_bind and certificate go together")
        if self.max_chunked_bytes > self.buffer_bytes // 2:
            raise ValueError(f"max_chunked_bytes: at most half of buffer_bytes, {self.buffer_bytes // 2}")
        if self.max_header_bytes > self.buffer_bytes // 4:
            raise ValueError(f"max_header_bytes: at most a quarter of buffer_bytes, {self.buffer_bytes // 4}")
        if self.deadline_ms > self.max_deadline_ms:
            raise ValueError("deadline_ms: larger than max_deadline_ms")
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """The config from plain values. Raises ConfigError naming the first wrong field, with the nearest known one."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as refused:
            raise ConfigError(f"gateway: {_first_problem(refused)}", remedy=_suggestion(refused)) from refused

    def environment(self) -> dict[str, str]:
        """The variables that haproxy.cfg reads."""
        found = {
            "GATEWAY_BIND": self.bind,
            "GATEWAY_METRICS_BIND": self.metrics_bind,
            "GATEWAY_INNER": self.inner,
            "GATEWAY_CLIENTS": str(self.clients),
            "GATEWAY_SPLITS": str(self.splits or self.clients.parent / SPLITS_FILE),
            "GATEWAY_HEALTH_PORT": str(self.health_port),
            "GATEWAY_RESOLVER": self.resolver,
            "GATEWAY_MAX_BODY_BYTES": str(self.max_body_bytes),
            "GATEWAY_BUFFER_BYTES": str(self.buffer_bytes),
            "GATEWAY_MAX_CHUNKED_BYTES": str(self.max_chunked_bytes),
            "GATEWAY_MAX_HEADER_BYTES": str(self.max_header_bytes),
            "GATEWAY_MAX_URL_BYTES": str(self.max_url_bytes),
            "GATEWAY_MAX_CONNECTIONS": str(self.max_connections),
            "GATEWAY_MAX_INFLIGHT": str(self.max_inflight),
            "GATEWAY_MAX_QUEUE": str(self.max_queue),
            "GATEWAY_QUEUE_TIMEOUT_MS": str(self.queue_timeout_ms),
            "GATEWAY_DEADLINE_MS": str(self.deadline_ms),
            "GATEWAY_MAX_DEADLINE_MS": str(self.max_deadline_ms),
            "GATEWAY_REQUEST_TIMEOUT_MS": str(self.request_timeout_ms),
            "GATEWAY_IDLE_TIMEOUT_MS": str(self.idle_timeout_ms),
            "GATEWAY_RATE_LIMIT": str(self.rate_limit),
            "GATEWAY_RETRIES": str(self.retries),
        }
        if self.certificate is not None and self.tls_bind is not None:
            found |= {"GATEWAY_TLS_PEM": str(self.certificate), "GATEWAY_TLS_BIND": self.tls_bind}
        if self.service is not None:
            found["GATEWAY_UPSTREAM"] = self.service
        for slot, replica in enumerate(self.replicas, start=1):
            found[f"GATEWAY_REPLICA_{slot}"] = replica.address
            found[f"GATEWAY_HEALTH_{slot}"] = str(replica.health_port)
        return found


def _first_problem(refused: ValidationError) -> str:
    first = refused.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    text = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def _suggestion(refused: ValidationError) -> str:
    first = refused.errors()[0]
    if first["type"] != "extra_forbidden":
        return ""
    known = GatewayConfig.model_fields if len(first["loc"]) == 1 else Replica.model_fields
    near = difflib.get_close_matches(str(first["loc"][-1]), list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"


# --------------------------------------------------------------------------------------------------------------- keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Secrets:
    """Where the first client's key and the proxy's own files lie."""

    key: Path
    """Plain text, mode 0600: for whoever sends requests from this machine."""
    clients: Path
    """Digests only. Its folder is mounted into the gateway's container."""


def create_keys(folder: Path, client: str = "first") -> Secrets:
    """Make `folder/inference.key` and `folder/gateway/clients` unless they are there, and return both.

    `folder` is closed to other users (0700), so that the files of the proxy, which runs as a user of its own inside
    the container, can be readable to it. Raises ConfigError when a key is there whose digest the proxy does not have.
    """
    made = Secrets(key=folder / KEY_FILE, clients=prepare_folder(folder))
    if made.key.exists():
        digest = _digest(made.key.read_text("ascii").strip())
        if not any(entry.digest == digest for entry in read_clients(made.clients)):
            raise ConfigError(
                f"{made.clients} does not know the key in {made.key}",
                remedy=f"remove {made.key} to get a new key, or add its SHA-256 to {made.clients}",
            )
        return made
    _write(made.key, add_key(made.clients, client) + "\n", mode=0o600)
    return made


def prepare_folder(folder: Path) -> Path:
    """Make `folder` and the proxy's own folder in it, as `create_keys` says; returns where the clients file belongs."""
    clients = folder / GATEWAY_FOLDER / CLIENTS_FILE
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)  # Docker, too, makes it when it is missing, open to all
    clients.parent.mkdir(mode=0o755, exist_ok=True)
    clients.parent.chmod(0o755)
    return clients


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientKey:
    """One line of the clients file."""

    client: str
    digest: str
    """SHA-256 of the key, lower-case hex."""
    expires_at: int | None = None
    """Unix seconds."""

    def line(self) -> str:
        return f"{self.client}:{self.digest}" + (f":{self.expires_at}" if self.expires_at is not None else "")


def read_clients(clients: Path) -> tuple[ClientKey, ...]:
    """The keys in a clients file; none when it is not there. Raises ConfigError naming the first broken line."""
    text = clients.read_text("ascii") if clients.exists() else ""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(rf"({_CLIENT_ID.pattern}):([0-9a-fA-F]{{64}}):?([0-9]*)\s*", line)
        if match is None:
            raise ConfigError(
                f"{clients}, line {number}: not client-id:sha256-in-hex[:expiry]",
                remedy="repair or remove the line; the gateway keeps the keys it knew until then",
            )
        found.append(
            ClientKey(client=match[1], digest=match[2].lower(), expires_at=int(match[3]) if match[3] else None)
        )
    return tuple(found)


def add_key(clients: Path, client: str, *, expires_at: int | None = None) -> str:
    """Give `client` one more key and return it; it is stored nowhere. The gateway takes it within about a second.

    To rotate: add, hand over, then `revoke_keys(clients, client, keep=new_key)`. Raises ConfigError on a bad id.
    """
    if not _CLIENT_ID.fullmatch(client):
        raise ConfigError(f"client id {client!r} is refused", remedy="use 1 to 64 letters, digits, '.', '_' and '-'")
    key = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")
    with _locked(clients):
        added = ClientKey(client=client, digest=_digest(key), expires_at=expires_at)
        _write_clients(clients, (*read_clients(clients), added))
    return key


def revoke_keys(clients: Path, client: str, *, keep: str | None = None, keep_newest: bool = False) -> int:
    """Take away the keys of `client` but `keep`, or but the one added last; returns how many went. They stop working
    within about a second.

    Raises ConfigError when the client has no such key, because a revocation that does nothing is a mistake.
    """
    with _locked(clients):
        before = read_clients(clients)
        spared = _digest(keep) if keep is not None else ""
        if keep_newest:
            spared = next((entry.digest for entry in reversed(before) if entry.client == client), "")
        after = tuple(entry for entry in before if entry.client != client or entry.digest == spared)
        if len(after) == len(before):
            known = ", ".join(sorted({entry.client for entry in before})) or "none"
            other = " but its newest" if spared else ""
            raise ConfigError(
                f"client {client!r} has no key{other} to revoke in {clients}", remedy=f"known clients: {known}"
            )
        _write_clients(clients, after)
    return len(before) - len(after)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@contextlib.contextmanager
def _locked(clients: Path) -> Iterator[None]:
    """Two commands at once must not lose one another's line; the folder is locked, since the file is replaced."""
    folder = os.open(clients.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write_clients(clients: Path, entries: Sequence[ClientKey]) -> None:
    _write(clients, "".join(entry.line() + "\n" for entry in entries), mode=0o644)


def _write(path: Path, text: str, *, mode: int) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(text)
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# -------------------------------------------------------------------------------------------------------- certificate


def create_certificate(folder: Path, hosts: Sequence[str] = ("localhost", "127.0.0.1"), *, days: int = 90) -> Path:
    """A self-signed certificate for trying TLS out; returns `folder/gateway/tls.pem` (certificate and private key).

    `folder/gateway/tls.crt` is the certificate alone, for clients to trust. Made with the openssl program, because a
    cryptography library only for this would be one more dependency to keep current. `folder` is closed to other users.
    Raises ConfigError on an unusable host name, and when openssl is missing or refuses.
    """
    if not hosts or not all(re.fullmatch(r"[A-Za-z0-9.:*-]{1,253}", host) for host in hosts):
        raise ConfigError(f"certificate: host names {list(hosts)} are refused", remedy="give DNS names or addresses")
    target = prepare_folder(folder).with_name(CERTIFICATE_FILE)
    names = ",".join(f"{'IP' if _is_address(host) else 'DNS'}:{host}" for host in hosts)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        key, certificate = Path(scratch) / "key", Path(scratch) / "crt"
        _openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", str(days),
            "-subj", f"/CN={hosts[0][:64]}", "-addext", f"subjectAltName={names}",
            "-keyout", str(key), "-out", str(certificate),
        )  # fmt: skip
        _write(target.with_suffix(".crt"), certificate.read_text("ascii"), mode=0o644)
        install_certificate(folder, certificate, key)
    return target


def install_certificate(folder: Path, certificate: Path, key: Path) -> Path:
    """Put a certificate chain and its key together as `folder/gateway/tls.pem`, with the line that the expiry metric
    reads. Raises ConfigError when openssl cannot read the certificate."""
    target = prepare_folder(folder).with_name(CERTIFICATE_FILE)
    end = _openssl("x509", "-noout", "-enddate", "-in", str(certificate)).strip().removeprefix("notAfter=")
    expiry = int(ssl.cert_time_to_seconds(end))
    _write(target, f"# not-after {expiry}\n{certificate.read_text('ascii')}{key.read_text('ascii')}", mode=0o644)
    return target


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _openssl(*arguments: str) -> str:
    program = shutil.which("openssl")
    if program is None:
        raise ConfigError("openssl was not found", remedy="install it: apt-get install openssl")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise ConfigError(f"openssl {arguments[0]}: {done.stderr.strip().splitlines()[-1]}", remedy="see the message")
    return done.stdout


# ------------------------------------------------------------------------------------------------- HAProxy on this host


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningGateway:
    """A HAProxy of ours. `stop` it."""

    process: subprocess.Popen[bytes]
    config: GatewayConfig
    log: Path
    """JSON access log lines (they begin with `{`) and HAProxy's own messages."""

    @property
    def url(self) -> str:
        """Where clients reach it without TLS."""
        host, port = _host_and_port(self.config.bind)
        return f"http://{host}:{port}"

    def pids(self) -> tuple[int, ...]:
        """HAProxy's processes: the master, which stays, and its workers, of which each reload starts a new one."""
        with contextlib.suppress(psutil.Error):
            return (self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children()))
        return ()

    def reload(self, *, timeout_s: float = 10.0) -> None:
        """Take the configuration file, the certificate and the Lua files anew; return when a new process serves.

        The old one answers what it has, and leaves. Raises ServerError when HAProxy refuses: then the old one serves on.
        """
        check_config(self.config)
        before = set(self.pids())
        written = self.log.stat().st_size
        self.process.send_signal(signal.SIGUSR2)
        deadline = time.monotonic() + timeout_s
        while not (_LOADED in self._written_since(written) and set(self.pids()) - before):
            if time.monotonic() > deadline:
                raise ServerError(f"haproxy did not reload within {timeout_s:g} s", remedy=f"see {self.log}")
            time.sleep(0.02)

    def _written_since(self, position: int) -> str:
        with self.log.open("rb") as stream:
            stream.seek(position)
            return stream.read().decode("utf-8", "replace")

    def stop(self, *, drain_s: float = 10.0) -> int:
        """Take no new connection, answer what is in flight for up to `drain_s` seconds, then end. Returns HAProxy's
        exit status; calling it again is harmless."""
        if self.process.poll() is None:
            ends = time.monotonic() + drain_s
            # Again while it still listens: HAProxy's master loses a signal that comes while a worker of it starts.
            while _accepts(self.config.bind) and time.monotonic() < ends:
                self.process.send_signal(signal.SIGUSR1)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self.process.wait(min(_SIGNAL_SECONDS, drain_s))
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(max(0.0, ends - time.monotonic()))
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return self.process.wait()


def haproxy_program() -> str:
    """The haproxy program; also found where Debian puts it, which a user's PATH often lacks. Raises ServerError."""
    found = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise ServerError("haproxy was not found", remedy=INSTALL_HAPROXY)
    return found


def check_config(config: GatewayConfig) -> None:
    """Have HAProxy check the configuration. Raises ServerError with HAProxy's own message."""
    done = subprocess.run(
        [haproxy_program(), "-c", "-f", str(CONFIG_FILE)],
        env=_environment(config), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise ServerError(f"haproxy refuses its configuration: {_alert(done.stderr)}", remedy=_remedy(done.stderr))


def start_gateway(config: GatewayConfig, log: Path, *, timeout_s: float = 10.0) -> RunningGateway:
    """Start HAProxy and return once it accepts requests (whether a replica is ready is for `/healthz` to say).

    Raises PortBusy when one of its ports is taken, and ServerError when haproxy is missing, refuses the configuration
    (with its own message) or does not come up in time.
    """
    # The abstract socket's name must be this gateway's own, or a second one on this machine would not start.
    config = config.model_copy(update={"inner": f"marina-{uuid.uuid4().hex}"})
    program = haproxy_program()
    for address in filter(None, (config.bind, config.tls_bind, config.metrics_bind)):
        _require_free(address)
    check_config(config)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [program, "-W", "-db", "-f", str(CONFIG_FILE)],
            env=_environment(config), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
    processes.set_priority(process.pid, _NICE)
    running = RunningGateway(process=process, config=config, log=log)
    deadline = time.monotonic() + timeout_s
    while not _accepts(config.bind):
        if process.poll() is not None:
            raise ServerError(
                f"haproxy ended with {process.returncode}: {_alert(log.read_text())}", remedy=f"see {log}"
            )
        if time.monotonic() > deadline:
            running.stop(drain_s=0)
            raise ServerError(f"haproxy did not listen on {config.bind} within {timeout_s:g} s", remedy=f"see {log}")
        time.sleep(0.02)
    return running


def _environment(config: GatewayConfig) -> dict[str, str]:
    """Ours without a GATEWAY_* variable of the shell, which would mix another configuration into this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    return kept | _KEEP_BUFFERS | config.environment()


# HAProxy 2.6 has no setting for it: without these, glibc maps and unmaps every large buffer (+0.6 ms per request).
_KEEP_BUFFERS = {"MALLOC_MMAP_THRESHOLD_": str(64 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}


def _alert(text: str) -> str:
    """The first thing that HAProxy itself calls an alert, without process ids."""
    alerts = [line for line in text.splitlines() if line.startswith("[ALERT]")]
    return re.sub(r"^\[ALERT\]\s+\(\d+\) : (config : )?", "", alerts[0]) if alerts else text.strip()[-500:]


def _remedy(text: str) -> str:
    if "clients file" in text:
        return "make a key first: marina key add CLIENT; or point GATEWAY_CLIENTS to the file"
    return "correct the setting that the message names"


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return ("127.0.0.1" if host in ("", "*", "0.0.0.0") else host.strip("[]")), int(port)


def _require_free(address: str) -> None:
    # HAProxy binds with SO_REUSEPORT: a second one of the same user would silently share the port, so ask without it.
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if host in ("", "*") else host.strip("[]"), int(port)))
        except OSError as busy:
            raise PortBusy(
                f"the gateway cannot listen on {address}: {busy.strerror}",
                remedy="stop what uses it, or set another port",
            ) from busy


def _accepts(address: str) -> bool:
    try:
        socket.create_connection(_host_and_port(address), timeout=0.5).close()
    except OSError:
        return False
    return True
