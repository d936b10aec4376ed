"""Settings of `marina serve`: options win over MARINA_* variables, those over config.properties and defaults."""

from __future__ import annotations

import ipaddress
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from handlerlib.spec import closest
from marina import properties
from marina.errors import ConfigError
from marina.logs import Level

PREFIX = "MARINA_"
CONFIG_FILE = Path(__file__).parent.parent / "config.properties"
"""The one at the top level of this repository."""

ENGINE_SWITCH = "MARINA_ENGINE"
"""Read by the workers: `plain` keeps them from using the engines that archives bring."""
OTHER_VARIABLES = ("MARINA_HOME", "MARINA_URL", "MARINA_MANAGEMENT_URL", "MARINA_KEY_FILE", ENGINE_SWITCH)
"""MARINA_* variables that belong to the command line and are no settings of `serve`."""

Kind = Literal["inference", "management", "metrics", "supervisor"]


class ServeSettings(BaseModel):
    """How one TorchServe is started, watched and stopped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: Path = CONFIG_FILE
    """The front end's config.properties to start from."""
    inference_host: str = "127.0.0.1"
    inference_port: int = Field(default=8080, ge=1, le=65535)
    management_host: str = "127.0.0.1"
    management_port: int = Field(default=8081, ge=1, le=65535)
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=8082, ge=1, le=65535)
    supervisor_host: str = "127.0.0.1"
    supervisor_port: int = Field(default=8083, ge=0, le=65535)
    """For /livez, /readyz, /metrics and /drain; 0 switches it off."""
    expose: frozenset[Kind] = frozenset()
    """The ports that may listen beyond loopback: only inside a network that is private itself."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: GPUs where there are any; gpu: refuse to start without one."""
    frontend_patches: bool = True
    """Batches without waiting and fewer detours in TorchServe's java (marina/frontend_patch.py); False: as it ships."""
    fork_server: bool = True
    """Workers are forked from one process that has imported torch (marina/fork_server.py); False: each imports it."""
    startup_timeout: float = Field(default=300.0, gt=0)
    """Seconds until every worker must be ready."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """Seconds that requests already accepted may take after a stop was asked for."""
    watch_seconds: float = Field(default=1.0, gt=0)
    """Seconds between two looks at the workers' state."""
    hang_seconds: float = Field(default=5.0, gt=0)
    """A batch is given up after ten times the longest one before it, and after no less than this (marina/watchdog.py)."""
    worker_memory_mb: int = Field(default=0, ge=0)
    """A worker with more resident memory is started anew once it is idle; 0: no limit."""
    autoscale: bool = True
    """Whether models that have bounds (`[models.NAME.autoscale]` of deploy.toml) are scaled within them."""
    autoscale_memory_mb: int = Field(default=0, ge=0)
    """What all workers may take together on the host when workers are added; 0: what the system has free."""
    log_level: Level = "warning"
    """Lines below it are not passed on; requests have their own switch."""
    log_requests: bool = True
    """One JSON line per answered request."""
    log_file: Path | None = None
    """Appended to; standard error when not given."""

    @field_validator("expose", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """`inference,metrics`, as a variable or an option gives it."""
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("inference_host", "management_host", "metrics_host", "supervisor_host")
    @classmethod
    def _an_address(cls, value: str) -> str:
        if value != "localhost":
            ipaddress.ip_address(value)
        return value

    @model_validator(mode="after")
    def _ports_differ(self) -> ServeSettings:
        ports = [self.port(kind) for kind in self.kinds()]
        for port in ports:
            if ports.count(port) > 1:
                raise ValueError(f"port {port} is given to {ports.count(port)} interfaces; each needs its own")
        return self

    @model_validator(mode="after")
    def _loopback_unless_exposed(self) -> ServeSettings:
        for kind in self.kinds():
            if not properties.is_loopback(self.host(kind)) and kind not in self.expose:
                raise ValueError(
                    f"{kind}_host {self.host(kind)} is not loopback, and that interface has no access control; "
                    f"in a network that is private itself say --expose {kind}"
                )
        return self

    def kinds(self) -> tuple[Kind, ...]:
        """The interfaces that listen."""
        all_of_them: tuple[Kind, ...] = ("inference", "management", "metrics", "supervisor")
        return all_of_them if self.supervisor_port else all_of_them[:3]

    def host(self, kind: Kind) -> str:
        """Where the interface listens."""
        return str(getattr(self, f"{kind}_host"))

    def port(self, kind: Kind) -> int:
        """Where the interface listens."""
        return int(getattr(self, f"{kind}_port"))

    def url(self, kind: Kind) -> str:
        """How a client on this machine reaches the interface."""
        host = self.host(kind)
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return (
            f"http://[{reachable}]:{self.port(kind)}" if ":" in reachable else f"http://{reachable}:{self.port(kind)}"
        )

    @classmethod
    def load(
        cls, options: Mapping[str, Any], environment: Mapping[str, str], *, other_variables: Iterable[str] = ()
    ) -> ServeSettings:
        """Put the settings together. An option that is None was not given.

        `other_variables` are the MARINA_* names that belong to other parts. Raises ConfigError for any further one, for
        an unknown option, and for a value that does not fit.
        """
        variables = _from_environment(cls, environment, other_variables)
        given = {name: value for name, value in options.items() if value is not None}
        values = variables | given
        for name in values:
            if name not in cls.model_fields:
                raise ConfigError(f"unknown setting '{name}'{closest(name, cls.model_fields)}", remedy="correct it")
        file = properties.load(Path(values.get("config", CONFIG_FILE)))
        try:
            return cls(**{**_addresses(file), **values})
        except ValidationError as error:
            raise ConfigError(_explain(error, variables.keys() - given), remedy="see `marina serve --help`") from error


def _addresses(file: properties.Properties) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for kind in ("inference", "management", "metrics"):
        address = file.address(kind)
        if address is not None:
            values[f"{kind}_host"], values[f"{kind}_port"] = address
    return values


def _from_environment(
    cls: type[ServeSettings], environment: Mapping[str, str], other_variables: Iterable[str]
) -> dict[str, Any]:
    known = {f"{PREFIX}{name.upper()}": name for name in cls.model_fields}
    others = set(other_variables)
    for variable in environment:
        if variable.startswith(PREFIX) and variable not in known and variable not in others:
            hint = closest(variable, [*known, *others])
            raise ConfigError(f"unknown variable {variable}{hint}", remedy="correct its name or unset it")
    return {name: environment[variable] for variable, name in known.items() if variable in environment}


def _explain(error: ValidationError, variables: Container[str]) -> str:
    """Settings that came from `variables` by the names of these."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        where = f"{PREFIX}{where.upper()}" if where in variables else where
        message = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {message}, got {problem['input']!r}" if where else message)
    return "; ".join(lines)
