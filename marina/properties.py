"""config.properties: parse, check, render.

TorchServe ignores an unknown key, takes the last of two equal ones and falls back silently on a malformed number. Here
each is refused, and so is each setting that does not do what its name says. Sources: ConfigManager.java of TorchServe
0.12.0, and the keys that the released jar knows.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from handlerlib.spec import closest
from marina.errors import ConfigError

SMALLEST_RESPONSE = 65536
"""Bytes. A larger answer than `max_response_size` kills the worker, and JSON answers reach some 10 kB."""

_ADDRESSES = {"inference": "inference_address", "management": "management_address", "metrics": "metrics_address"}
_GRPC_ADDRESSES = ("grpc_inference_address", "grpc_management_address")
_BOOLEANS = frozenset(
    {
        "async_logging",
        "cpu_launcher_enable",
        "debug",
        "decode_input_request",
        "disable_system_metrics",
        "disable_token_authorization",
        "enable_envvars_config",
        "enable_grpc_ssl",
        "enable_metrics_api",
        "enable_model_api",
        "install_py_dep_per_model",
        "ipex_enable",
        "ipex_gpu_enable",
        "limit_max_image_pixels",
        "model_metrics_auto_detect",
        "prefer_direct_buffer",
        "ts_open_inference_protocol",
        "use_env_allowed_urls",
        "use_native_io",
    }
)
_INTEGERS = {
    "default_response_timeout": 1,
    "default_startup_timeout": 1,
    "default_workers_per_model": 0,
    "grpc_inference_max_connection_age_grace_ms": 0,
    "grpc_inference_max_connection_age_ms": 0,
    "grpc_inference_port": 1,
    "grpc_management_max_connection_age_grace_ms": 0,
    "grpc_management_max_connection_age_ms": 0,
    "grpc_management_port": 1,
    "initial_distribution_port": 1,
    "initial_worker_port": 1,
    "io_ratio": 1,
    "job_queue_size": 1,
    "max_request_size": 1,
    "max_response_size": SMALLEST_RESPONSE,
    "metric_time_interval": 1,
    "netty_client_threads": 0,
    "number_of_gpu": 0,
    "number_of_netty_threads": 0,
    "token_expiration_min": 1,
    "unregister_model_timeout": 1,
}
"""Key -> smallest sensible value."""
_CHOICES = {"metrics_mode": ("log", "prometheus", "legacy")}
_REGEXES = ("blacklist_env_vars",)
_TEXTS = frozenset(
    {
        "allowed_urls",
        "certificate_file",
        "cors_allowed_headers",
        "cors_allowed_methods",
        "cors_allowed_origin",
        "cpp_log_config",
        "cpu_launcher_args",
        "default_service_handler",
        "keystore",
        "keystore_pass",
        "keystore_type",
        "load_models",
        "metrics_config",
        "model_server_home",
        "model_snapshot",
        "model_store",
        "models",
        "plugins_path",
        "private_key_file",
        "python",
        "service_envelope",
        "system_metrics_cmd",
        "ts_header_key_sequence_end",
        "ts_header_key_sequence_id",
        "ts_header_key_sequence_start",
        "vmargs",
        "workflow_store",
    }
)
KNOWN = frozenset({*_ADDRESSES.values(), *_GRPC_ADDRESSES, *_BOOLEANS, *_INTEGERS, *_CHOICES, *_REGEXES, *_TEXTS})
"""Every key that TorchServe 0.12.0 reads from the file."""

_RENDERED = {
    "load_models": "the models to load are rendered at each start",
    "model_snapshot": "the models to load are rendered at each start",
    "models": "settings of a model belong into its model-config.yaml, and this key ignores its maxBatchDelay",
    "model_store": "the model store is an option of `marina serve`",
    "model_server_home": "the installed torchserve package is found at each start",
    "metrics_config": "the metrics file is shipped with marina and rendered at each start",
    "python": "workers run the interpreter that runs marina",
}
_REFUSED_WHEN_TRUE = {
    "install_py_dep_per_model": "it runs pip for each archive at start: put what the handlers import into the image",
    "use_env_allowed_urls": "an environment variable could then open downloads from anywhere",
    "enable_envvars_config": "TS_* variables would override this file, which is then not what runs",
    "cpu_launcher_enable": "it restarts all workers at each scaling and prints a process tree into the log",
    "ts_open_inference_protocol": "its health routes always say yes; use the supervisor's /readyz",
    "model_metrics_auto_detect": "any worker could then create metric series without bound",
    "debug": "it forces one worker per model whatever the archive says",
}
_REFUSED = {
    "service_envelope": "it applies to every model, and the kserve envelopes read only the first request of a batch",
    "default_service_handler": "each archive names its own handler",
    "token_expiration_min": "tokens cannot be set or rotated from outside; access control belongs to the gateway",
    "workflow_store": "workflows bypass enable_model_api",
    "plugins_path": "it runs other java code inside the front end",
    "system_metrics_cmd": "it runs a command of your file every minute",
    "cpu_launcher_args": "the launcher is refused too",
    "cors_allowed_origin": "browsers are let in by the gateway",
    "cors_allowed_methods": "browsers are let in by the gateway",
    "cors_allowed_headers": "browsers are let in by the gateway",
}
_VARIABLE = re.compile(r"\$\$([^$]+[^$])\$\$")
"""As ConfigManager.java has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Properties:
    """A parsed file: what it says, and on which line."""

    source: str
    """The file's name for messages."""
    entries: Mapping[str, str]
    lines: Mapping[str, int] = field(default_factory=dict)
    """Key -> line number, from 1."""

    def address(self, kind: str) -> tuple[str, int] | None:
        """Host and port of `inference`, `management` or `metrics`; None where the file does not say."""
        value = self.entries.get(_ADDRESSES[kind])
        return None if value is None else _host_and_port(value)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong with the file."""

    key: str
    problem: str
    remedy: str


def load(path: Path) -> Properties:
    """Read and parse. Raises ConfigError naming the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", remedy="name another file with --config") from error
    return parse(text, str(path))


def parse(text: str, source: str = "config.properties") -> Properties:
    """Lines `key=value` and comments (`#`, `!`). Raises ConfigError for anything else, a repeated key included.

    Backslashes are read as Java reads them: `\\\\` is one backslash, and one before any other character vanishes in
    Java, which breaks regular expressions, so that is refused; so is a value continued on the next line.
    """
    entries: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped[0] in "#!":
            continue
        where = f"{source}:{number}"
        key, equals, value = (part.strip() for part in stripped.partition("="))
        if not equals or not key or re.search(r"[\s:\\]", key):
            raise ConfigError(f"{where}: not of the form key=value: {stripped}", remedy="correct the line")
        if key in entries:
            raise ConfigError(
                f"{where}: {key} is already set on line {lines[key]}; TorchServe would take the last one silently",
                remedy="keep one of the two lines",
            )
        entries[key], lines[key] = _unescape(value, where, key), number
    return Properties(source=source, entries=entries, lines=lines)


def check(properties: Properties, *, environment: Mapping[str, str], expose: tuple[str, ...] = ()) -> Properties:
    """The same properties with `$$VARIABLE$$` filled in. Raises ConfigError with everything that is wrong.

    `expose` names the ports (`inference`, `management`, `metrics`) that may listen beyond loopback.
    """
    found = list(_variables(properties.entries, environment))
    entries = {key: _fill(value, environment) for key, value in properties.entries.items()}
    found += _keys(entries)
    found += _values(entries)
    found += _traps(entries)
    found += _addresses(entries, expose)
    if found:
        raise ConfigError(
            "\n".join(f"{_where(properties, finding)}: {finding.problem}" for finding in found),
            remedy="; ".join(dict.fromkeys(finding.remedy for finding in found)),
        )
    return Properties(source=properties.source, entries=entries, lines=properties.lines)


def render(properties: Properties, overrides: Mapping[str, str]) -> str:
    """The text of a file with `overrides` on top of `properties`, escaped so that Java reads the same values."""
    merged = {**properties.entries, **overrides}
    return "".join(f"{key}={_escape(value)}\n" for key, value in sorted(merged.items()))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _where(properties: Properties, finding: Finding) -> str:
    line = properties.lines.get(finding.key)
    return f"{properties.source}:{line}: {finding.key}" if line else f"{properties.source}: {finding.key}"


def _variables(entries: Mapping[str, str], environment: Mapping[str, str]) -> Iterator[Finding]:
    for key, value in entries.items():
        for name in _VARIABLE.findall(value):
            if name not in environment:
                yield Finding(key, f"the environment variable {name} is not set", f"set {name} or write the value")


def _fill(value: str, environment: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: environment.get(match.group(1), match.group(0)), value)


def _keys(entries: Mapping[str, str]) -> Iterator[Finding]:
    for key in entries:
        if key not in KNOWN:
            yield Finding(
                key,
                f"TorchServe 0.12 knows no such key and would ignore it{closest(key, KNOWN)}",
                "correct or remove it",
            )


def _values(entries: Mapping[str, str]) -> Iterator[Finding]:
    for key, value in entries.items():
        if key in _BOOLEANS and value not in ("true", "false"):
            yield Finding(key, f"must be true or false, got '{value}'", f"correct {key}")
        if key in _INTEGERS and not _is_integer(value, _INTEGERS[key]):
            yield Finding(key, f"must be a whole number of at least {_INTEGERS[key]}, got '{value}'", f"correct {key}")
        if key in _CHOICES and value not in _CHOICES[key]:
            yield Finding(key, f"must be one of {', '.join(_CHOICES[key])}, got '{value}'", f"correct {key}")
        patterns = value.split(",") if key == "allowed_urls" else [value] if key in _REGEXES else []
        for pattern in patterns:
            if not _is_regex(pattern):
                yield Finding(
                    key, f"'{pattern}' is not a regular expression", f"correct {key}; commas separate patterns"
                )


def _traps(entries: Mapping[str, str]) -> Iterator[Finding]:
    for key, value in entries.items():
        if key in _RENDERED:
            yield Finding(key, f"is not set by hand: {_RENDERED[key]}", f"remove {key}")
        elif key in _REFUSED:
            yield Finding(key, f"is refused: {_REFUSED[key]}", f"remove {key}")
        elif key in _REFUSED_WHEN_TRUE and value == "true":
            yield Finding(key, f"is refused: {_REFUSED_WHEN_TRUE[key]}", f"set {key}=false")
    if entries.get("disable_token_authorization") != "true":
        problem = (
            "must be true: TorchServe's tokens change at each start and expire after an hour, health checks included"
        )
        yield Finding("disable_token_authorization", problem, "set it to true; keys are checked by the gateway")
    if "allowed_urls" not in entries or re.search(r"\.\*\|http|^\.\*$|https?\??://\.\*", entries["allowed_urls"]):
        problem = "lets TorchServe download and run code from anywhere (its default)"
        yield Finding("allowed_urls", problem, "set allowed_urls as in the config.properties of this repository")
    if entries.get("metrics_mode", "log") != "prometheus":
        yield Finding("metrics_mode", "leaves the metrics endpoint empty", "set metrics_mode=prometheus")


def _addresses(entries: Mapping[str, str], expose: tuple[str, ...]) -> Iterator[Finding]:
    for kind, key in _ADDRESSES.items():
        value = entries.get(key)
        if value is None:
            continue
        address = _host_and_port(value)
        if address is None:
            yield Finding(key, f"must look like http://127.0.0.1:8080, got '{value}'", f"correct {key}")
        elif not is_loopback(address[0]) and kind not in expose:
            yield _public(key, address[0], kind)
    for key in _GRPC_ADDRESSES:
        host = entries.get(key, "127.0.0.1")
        if not is_loopback(host):
            yield Finding(
                key, f"{host} is not loopback, and gRPC answers without any access control", f"set {key}=127.0.0.1"
            )


def _public(key: str, host: str, kind: str) -> Finding:
    reason = "whoever reaches it can run code" if kind == "management" else "it has no access control"
    return Finding(
        key,
        f"{host} is not loopback: {reason}",
        f"listen on 127.0.0.1 behind the gateway, or say --expose {kind} where the network itself is private",
    )


def _host_and_port(value: str) -> tuple[str, int] | None:
    """https is refused as well: TorchServe's TLS is 1.2 with two old ciphers; the gateway ends TLS."""
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme != "http" or not parts.hostname or port is None or port == 0 or parts.path not in ("", "/"):
        return None
    return parts.hostname, port


def _is_integer(value: str, smallest: int) -> bool:
    return re.fullmatch(r"\d{1,9}", value) is not None and int(value) >= smallest


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _unescape(value: str, where: str, key: str) -> str:
    if re.search(r"(?<!\\)(\\\\)*\\$", value):
        raise ConfigError(f"{where}: {key} continues on the next line", remedy="write the value on one line")
    lone = re.search(r"(?<!\\)(?:\\\\)*\\([^\\u:=#! ])", value)
    if lone:
        raise ConfigError(
            f"{where}: {key}: Java drops the backslash before '{lone.group(1)}'", remedy="write two backslashes for one"
        )
    try:
        units = re.sub(
            r"\\(u([0-9a-fA-F]{4})|.)", lambda match: chr(int(match[2], 16)) if match[2] else match[1], value
        )
        return units.encode("utf-16", "surrogatepass").decode("utf-16")  # two \\u of one character become that one
    except ValueError as error:
        raise ConfigError(f"{where}: {key}: {error}", remedy="correct the line") from error


def _escape(value: str) -> str:
    units = value.replace("\\", "\\\\").encode("utf-16-be")
    codes = [int.from_bytes(units[index : index + 2], "big") for index in range(0, len(units), 2)]
    return "".join(chr(code) if 0x20 <= code <= 0x7E else f"\\u{code:04x}" for code in codes)
