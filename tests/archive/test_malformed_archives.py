"""What a stranger may put into an archive: each is a finding with its remedy, and never a stack trace."""

from __future__ import annotations

import json
import shutil
import struct
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marina import archive, replay, verify
from marina.archive import Archive
from marina.errors import ArchiveError
from support.archives import repack

DEEP = "[" * 100_000


def overlapping(path: Path, entries: int, size: int) -> Path:
    """Stored entries each of which holds all that come after it: `size` bytes become `entries` times as many."""
    body, records = b"\0" * size, []
    for number in reversed(range(entries)):
        name, crc, length = f"f{number:05d}".encode(), zlib.crc32(body), len(body)
        fields = (20, 0, 0, 0, 0x21, crc, length, length, len(name), 0)
        body = struct.pack("<4s5H3I2H", b"PK\x03\x04", *fields) + name + body
        records.append((name, fields, len(body)))
    directory = b"".join(
        struct.pack("<4sH5H3I5H2I", b"PK\x01\x02", 0x0314, *fields, 0, 0, 0, 0o100644 << 16, len(body) - behind) + name
        for name, fields, behind in reversed(records)
    )
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, entries, entries, len(directory), len(body), 0)
    path.write_bytes(body + directory + end)
    return path


def first_findings(path: Path) -> tuple[verify.Outcome, list[str]]:
    """The check that refused, and what the command shows of it; the checks after it did not run."""
    outcomes = verify.verify(path).outcomes
    (refused,) = [outcome for outcome in outcomes if outcome.findings]
    assert all(outcome.skipped for outcome in outcomes[outcomes.index(refused) + 1 :])
    assert all(finding.remedy and finding.where for finding in refused.findings)
    return refused, [finding.message for finding in refused.findings]


def test_overlapping_entries_are_refused_before_they_fill_the_disk(tmp_path: Path) -> None:
    refused, (message,) = first_findings(overlapping(tmp_path / "bomb.mar", 50, 10_000))
    assert refused.check == "zip safety"
    assert message.endswith(": entries overlap")


def test_a_stored_entry_of_two_sizes_is_refused(packed: Archive, tmp_path: Path) -> None:
    changed = bytearray(packed.path.read_bytes())
    first = changed.find(b"PK\x01\x02")
    changed[first + 24 : first + 28] = struct.pack("<I", 1)
    (tmp_path / "two.mar").write_bytes(changed)
    refused, messages = first_findings(tmp_path / "two.mar")
    assert (refused.check, messages) == ("zip safety", ["the entry has two sizes; what is stored has one"])


def set_field(name: str, field: str, value: object) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        fields = json.loads((root / name).read_text())
        (root / name).write_text(json.dumps(fields | {field: value}))

    return change


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


MANIFEST, SPEC, CONFIG = "MAR-INF/MANIFEST.json", "model_spec.json", "model-config.yaml"


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (lambda root: (root / MANIFEST).unlink(), "names", f"{MANIFEST} is missing or damaged"),
        (written(MANIFEST, "{"), "names", f"{MANIFEST} is missing or damaged"),
        (written(MANIFEST, "[]"), "names", f"{MANIFEST} is missing or damaged"),
        (written(MANIFEST, DEEP), "names", f"{MANIFEST} is missing or damaged"),
        (written(MANIFEST, '{"model": 1}'), "names", f"{MANIFEST} is damaged: its model is no object"),
        (written(SPEC, DEEP), "names", f"{SPEC} is not JSON: maximum recursion depth"),
        (set_field(SPEC, "temperature", 10**400), "names", "temperature must be finite, got 1000"),
        (set_field(SPEC, "name", "x y"), "names", "model name 'x y' must match"),
        (set_field(SPEC, "version", "v1"), "names", "version 'v1' must be a dotted number"),
        (set_field(SPEC, "version", "1" * 5000), "names", "must be a dotted number of at most 100 characters"),
        (written(CONFIG, "[a]: 1\n"), "configuration", "is not valid YAML: "),
        (written(CONFIG, "a: " + "[" * 1500), "configuration", "is not valid YAML: maximum recursion depth"),
        (written(CONFIG, "minWorkers: 2020-13-45\n"), "configuration", "is not valid YAML: month must be in 1..12"),
    ],
)
def test_a_malformed_file_is_a_finding(
    packed: Archive, tmp_path: Path, change: Callable[[Path], object], check: str, message: str
) -> None:
    refused, messages = first_findings(repack(packed, tmp_path, change, honest=True))
    assert refused.check == check
    assert message in messages[0]


@pytest.mark.parametrize("record", [DEEP.encode(), b"[]", b"{}", archive.encode_build_record({"files": {"a": "x"}})])
def test_a_malformed_build_record_is_a_finding(packed: Archive, tmp_path: Path, record: bytes) -> None:
    path = repack(packed, tmp_path, lambda root: (root / "build.json").write_bytes(record))
    refused, messages = first_findings(path)
    assert refused.check == "digests"
    assert messages[0].startswith("build.json ")
    with pytest.raises(ArchiveError, match="is not an archive of Marina's"):
        verify.inspect(path)


@pytest.mark.parametrize("text", [DEEP, "[]", '{"rung": 1}'])
def test_inspect_refuses_a_malformed_engine(packed: Archive, tmp_path: Path, text: str) -> None:
    with pytest.raises(ArchiveError, match=r"is not an archive of Marina's: .*engine\.json"):
        verify.inspect(repack(packed, tmp_path, written("engine.json", text)))


def test_whatever_a_check_runs_into_is_a_finding(packed: Archive, tmp_path: Path, monkeypatch: Any) -> None:
    def trips(subject: verify.Subject) -> Any:
        raise LookupError("no such thing")

    monkeypatch.setattr(verify, "CHECKS", (verify.Check("trips", trips, guard=True), *verify.CHECKS))
    refused, messages = first_findings(packed.path)
    assert (refused.check, messages) == ("trips", ["the check failed with LookupError: no such thing"])


@pytest.mark.parametrize("name", ["metrics.json", "provenance.json", "model-config.yaml"])
def test_an_artifact_with_a_damaged_file_is_not_packed(
    artifact: Path, handlers: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(artifact, tmp_path / "artifact")
    (tmp_path / "artifact" / name).write_bytes(b"\xff{")
    with pytest.raises(ArchiveError, match=name):
        archive.pack(tmp_path / "artifact", handlers=handlers, destination=tmp_path)


def test_an_archive_from_before_there_were_engines_answered_with_its_plain_weights() -> None:
    class Old:
        def handle(self) -> None: ...

    service = types.SimpleNamespace(_entry_point=Old().handle)
    assert replay.engine(service) == {"engine": "plain", "reason": None, "fallback": ""}
