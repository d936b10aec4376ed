"""config.properties: what is read, what is refused and why, and that Java reads back what is rendered."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

from marina import java, properties
from marina.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
SAFE = "disable_token_authorization=true\nallowed_urls=file:///none\nmetrics_mode=prometheus\n"


def check(text: str, *, expose: tuple[str, ...] = (), **environment: str) -> properties.Properties:
    return properties.check(properties.parse(SAFE + text), environment=environment, expose=expose)


def test_the_file_of_this_repository_passes() -> None:
    found = properties.check(properties.load(ROOT / "config.properties"), environment={})
    assert found.address("inference") == ("127.0.0.1", 8080)


def test_every_line_of_it_has_its_reason() -> None:
    before = ""
    for line in (ROOT / "config.properties").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            assert before.startswith(("#", "grpc_")), f"no reason above: {line}"
        before = line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("job_queue_sze=1", "knows no such key and would ignore it, did you mean 'job_queue_size'?"),
        ("job_queue_size=many", "a whole number of at least 1, got 'many'"),
        ("job_queue_size=0", "at least 1, got '0'"),
        ("max_response_size=100", "at least 65536"),
        ("async_logging=yes", "must be true or false, got 'yes'"),
        ("blacklist_env_vars=(", "not a regular expression"),
        ("inference_address=127.0.0.1:8080", "must look like http://127.0.0.1:8080"),
        ("inference_address=https://127.0.0.1:8443", "must look like http://127.0.0.1:8080"),
        ("inference_address=http://0.0.0.0:8080", "0.0.0.0 is not loopback: it has no access control"),
        ("management_address=http://0.0.0.0:8081", "whoever reaches it can run code"),
        ("grpc_inference_address=0.0.0.0", "gRPC answers without any access control"),
        ("models={}", "is not set by hand: settings of a model belong into its model-config.yaml"),
        ("load_models=all", "is not set by hand"),
        ("model_snapshot={}", "is not set by hand"),
        ("service_envelope=kserve", "read only the first request of a batch"),
        ("install_py_dep_per_model=true", "it runs pip for each archive at start"),
        ("use_env_allowed_urls=true", "open downloads from anywhere"),
        ("enable_envvars_config=true", "TS_* variables would override this file"),
        ("cpu_launcher_enable=true", "restarts all workers at each scaling"),
        ("token_expiration_min=60", "access control belongs to the gateway"),
        ("vmargs=-Xmx$$HEAP$$", "the environment variable HEAP is not set"),
    ],
)
def test_refused_with_its_line_and_reason(line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        check(line)
    assert f"config.properties:4: {line.partition('=')[0]}: " in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("allowed_urls=file:///none\nmetrics_mode=prometheus", "disable_token_authorization: must be true"),
        ("disable_token_authorization=true\nmetrics_mode=prometheus", "allowed_urls: lets TorchServe download"),
        (SAFE.replace("file:///none", "file://.*|http(s)?://.*"), "allowed_urls: lets TorchServe download"),
        (SAFE.replace("prometheus", "log"), "metrics_mode: leaves the metrics endpoint empty"),
    ],
)
def test_unsafe_defaults_must_be_overridden(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        properties.check(properties.parse(text), environment={})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("job_queue_size=1\njob_queue_size=2", r"config\.properties:2: job_queue_size is already set on line 1"),
        ("just words", r"config\.properties:1: not of the form key=value"),
        ("allowed_urls=https://a\\.b", "Java drops the backslash before '.'"),
        ("vmargs=-Xmx1g \\\n -Xms1g", "continues on the next line"),
    ],
)
def test_malformed(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        properties.parse(text)


def test_all_findings_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check("debug=true\njob_queue_size=x")
    assert len(str(caught.value).splitlines()) == 2


def test_a_private_network_may_be_named() -> None:
    check("inference_address=http://0.0.0.0:8080\nmetrics_address=http://0.0.0.0:8082", expose=("inference", "metrics"))


def test_variables_are_filled_in() -> None:
    assert check("vmargs=-Xmx$$HEAP$$ -Dx=1", HEAP="2g").entries["vmargs"] == "-Xmx2g -Dx=1"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent cannot be read"):
        properties.load(tmp_path / "absent")


def test_the_known_keys_are_those_of_the_installed_jar() -> None:
    """Every key we know is a word in the jar's ConfigManager, so that none of ours is invented."""
    with zipfile.ZipFile(java.torchserve_home() / "ts" / "frontend" / "model-server.jar") as jar:
        code = jar.read("org/pytorch/serve/util/ConfigManager.class")
    assert [key for key in sorted(properties.KNOWN) if key.encode() not in code] == ["plugins_path", "vmargs"]


@pytest.mark.parametrize(
    "value",
    ['{"a":{"b":"c:d=e#f!g"}}', r"https://a\.b/.*", "trailing\\", "naïve – 日本 😀", "a\\u0041b"],
)
def test_what_is_rendered_reads_back(value: str) -> None:
    """With our own parser; the contract tier asks TorchServe's java."""
    text = properties.render(properties.Properties(source="x", entries={"key": "old", "other": "1"}), {"key": value})
    assert text.isascii()
    assert properties.parse(text).entries == {"key": value, "other": "1"}
