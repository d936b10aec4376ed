"""A real Prometheus and promtool, and the repository's rules with all their times made shorter."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from marina import processes

MONITORING = Path(__file__).resolve().parents[2] / "deploy" / "monitoring"
RULES = sorted((MONITORING / "rules").glob("*.yml"))
INSTALL = "install Debian's package: apt-get install --no-install-recommends prometheus"
_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION = r"(\d+)(ms|s|m|h|d)\b"


def require_prometheus() -> None:
    """Skip on a machine without Prometheus; in CI its absence is a failure."""
    missing = [program for program in ("prometheus", "promtool") if shutil.which(program) is None]
    if missing and os.environ.get("CI"):
        pytest.fail(f"{' and '.join(missing)} missing; {INSTALL}")
    if missing:
        pytest.skip(f"{' and '.join(missing)} missing; {INSTALL}")


def promtool(*arguments: str | Path) -> str:
    """What it prints; the test fails with that when promtool is not content."""
    require_prometheus()
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=110)
    if done.returncode:
        pytest.fail(f"promtool {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")
    return done.stdout


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def alerts() -> list[dict[str, Any]]:
    """Every alert rule of the repository."""
    groups = [group for path in RULES for group in load(path)["groups"]]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def quickened(text: str, factor: float) -> str:
    """Rules whose ranges, waits and intervals are `factor` times shorter; labels and thresholds stay."""

    def shorter(match: re.Match[str]) -> str:
        return f"{max(1, round(int(match[1]) * _UNITS[match[2]] / factor))}ms"

    def inside(match: re.Match[str]) -> str:
        return re.sub(_DURATION, shorter, match[0])

    return re.sub(rf"\[{_DURATION}\]|(?m:^\s*(?:for|interval|keep_firing_for): {_DURATION})", inside, text)


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running one."""

    url: str
    log: Path

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Samples of an instant query, now: each with `metric` and `value`."""
        answer = requests.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10)
        document = answer.json()
        assert document["status"] == "success", (expression, document)
        found = document["data"]["result"]
        return [{"metric": {}, "value": found}] if document["data"]["resultType"] == "scalar" else found

    def number(self, expression: str) -> float | None:
        """The value of the only sample."""
        found = self.query(expression)
        assert len(found) <= 1, (expression, found)
        return float(found[0]["value"][1]) if found else None

    def firing(self) -> dict[str, list[dict[str, Any]]]:
        """Firing alerts by name, each with labels and annotations."""
        answer = requests.get(f"{self.url}/api/v1/alerts", timeout=10).json()
        found: dict[str, list[dict[str, Any]]] = {}
        for alert in answer["data"]["alerts"]:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert)
        return found

    def rule_errors(self) -> list[str]:
        """What went wrong when rules were evaluated last."""
        groups = requests.get(f"{self.url}/api/v1/rules", timeout=10).json()["data"]["groups"]
        return [f"{rule['name']}: {rule['lastError']}" for g in groups for rule in g["rules"] if rule.get("lastError")]


def scrape(job: str, *targets: str, **more: Any) -> dict[str, Any]:
    """One scrape configuration with addresses `host:port`, plus what the repository's own one says about this job."""
    (own,) = [found for found in load(MONITORING / "prometheus.yml")["scrape_configs"] if found["job_name"] == job]
    kept = {key: own[key] for key in ("metrics_path", "metric_relabel_configs") if key in own}
    return {"job_name": job, **kept, "static_configs": [{"targets": list(targets)}], **more}


@contextlib.contextmanager
def running(
    folder: Path, jobs: Sequence[Mapping[str, Any]], *, factor: float, every_seconds: float
) -> Iterator[Prometheus]:
    """Prometheus with the repository's rules, `factor` times faster, that looks every `every_seconds`."""
    require_prometheus()
    rules = folder / "rules"
    rules.mkdir(parents=True)
    for path in RULES:
        (rules / path.name).write_text(quickened(path.read_text(), factor))
    every = f"{round(every_seconds * 1000)}ms"
    config = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(rules / "*.yml")],
        "scrape_configs": [dict(job) for job in jobs],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    promtool("check", "config", folder / "prometheus.yml")
    (port,) = processes.free_ports(1)
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--query.lookback-delta=2s",  # what has gone must not be remembered for the usual 5 minutes
    ]
    found = Prometheus(f"http://127.0.0.1:{port}", folder / "prometheus.log")
    with found.log.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_ready(found, process)
        yield found
    except BaseException:
        print(found.log.read_text()[-3000:])  # noqa: T201 - pytest shows it with the failure
        raise
    finally:
        process.terminate()
        process.wait(20)


def _wait_ready(prometheus: Prometheus, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{prometheus.url}/-/ready", timeout=1).ok:
                return
        time.sleep(0.05)
    pytest.fail(f"Prometheus did not become ready\n{prometheus.log.read_text()[-3000:]}")
