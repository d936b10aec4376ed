"""Both sides of the quarantine on one folder: what a worker writes, what the supervisor makes of a worker's end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from handlerlib import quarantine as worker_side
from handlerlib.errors import InferenceFailed, RequestError, UnprocessableInput
from handlerlib.quarantine import Guard, Unguarded
from marina.quarantine import FOLDER, Quarantine

ROOT = Path(__file__).resolve().parents[3]
POISON, GOOD = b"poison" * 100, b"good" * 100


@pytest.fixture
def quarantine(tmp_path: Path) -> Quarantine:
    return Quarantine(tmp_path)


@pytest.fixture
def guard(quarantine: Quarantine, tmp_path: Path) -> Guard:
    return Guard(tmp_path / FOLDER)


def _lengths(inputs: Sequence[bytes | bytearray]) -> list[int]:
    return [len(data) for data in inputs]


def test_a_record_says_what_is_at_work_and_since_when(quarantine: Quarantine, guard: Guard) -> None:
    seen = []

    def work(inputs: Sequence[bytes | bytearray]) -> list[int]:
        seen.append(quarantine.record(os.getpid()))
        return _lengths(inputs)

    assert guard.run([POISON, GOOD], work) == [600, 400]
    (during,) = seen
    assert during is not None and during.began is not None and during.digest == ""
    assert during.marks == (worker_side.mark_of(POISON), worker_side.mark_of(GOOD))
    after = quarantine.record(os.getpid())
    assert after is not None and after.began is None and after.marks == () and after.done == 1 and after.longest > 0


def test_what_is_shared_has_its_room_on_the_disk_beforehand(guard: Guard, tmp_path: Path) -> None:
    """Writing to a page that a full disk has no room for would end the process by SIGBUS."""
    for name in ("state", f"worker-{os.getpid()}"):
        held = (tmp_path / FOLDER / name).stat()
        assert held.st_blocks * 512 >= held.st_size >= 4096, name


def test_on_a_full_disk_a_worker_goes_on_unguarded(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    code = (
        "import resource, sys, tempfile\n"
        "from handlerlib import quarantine\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "print(quarantine.guard().run([b'x'], list))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "handlers")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "[b'x']\n"), done.stderr


def test_lists_that_could_not_be_written_are_written_later(
    quarantine: Quarantine, guard: Guard, tmp_path: Path
) -> None:
    in_the_way = tmp_path / FOLDER / ".list.json"
    in_the_way.mkdir()
    for _ in range(2):
        quarantine.ended(_die_at(tmp_path, [POISON], POISON))
    quarantine.tidy()
    assert str(in_the_way) in quarantine.unpublished
    in_the_way.rmdir()
    quarantine.tidy()
    assert quarantine.unpublished == "" and quarantine.refused == 0
    quarantine.ended(_die_at(tmp_path, [POISON], POISON))
    assert isinstance(guard.run([POISON], _lengths)[0], UnprocessableInput)


def _die_at(tmp_path: Path, inputs: Sequence[bytes], fatal: bytes) -> int:
    """A worker's process that is killed when it works on `fatal`; returns its process id."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from handlerlib.quarantine import Guard\n"
        "fatal = bytes.fromhex(sys.argv[2])\n"
        "def work(inputs):\n"
        "    if fatal in inputs: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return list(inputs)\n"
        "Guard(Path(sys.argv[1])).run([bytes.fromhex(text) for text in sys.argv[3:]], work)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / FOLDER), fatal.hex(), *(data.hex() for data in inputs)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT / "handlers")}) as process:
        process.wait(20)
    assert process.returncode == -9
    return process.pid


def test_the_second_kill_is_one_inputs_own_and_refuses_it(quarantine: Quarantine, guard: Guard, tmp_path: Path) -> None:
    first = quarantine.ended(_die_at(tmp_path, [GOOD, POISON], POISON))
    assert (first.inputs, first.refused) == (2, "")
    second = quarantine.ended(_die_at(tmp_path, [GOOD, POISON], POISON))
    assert second.inputs == 1 and len(second.refused) == 64
    good, poison = guard.run([GOOD, POISON], _lengths)
    assert good == 400
    assert isinstance(poison, UnprocessableInput) and poison.status == 422 and "ended two workers" in str(poison)
    assert quarantine.refused == 1


def test_an_input_that_shares_the_mark_of_a_refused_one_is_answered(
    quarantine: Quarantine, guard: Guard, tmp_path: Path
) -> None:
    twin = b"X" + POISON[1:]
    assert worker_side.mark_of(twin) == worker_side.mark_of(POISON)
    for _ in range(2):
        quarantine.ended(_die_at(tmp_path, [POISON], POISON))
    assert guard.run([twin], _lengths) == [600]
    assert isinstance(guard.run([POISON], _lengths)[0], RequestError)


def test_a_suspect_that_is_answered_is_none_any_more(quarantine: Quarantine, guard: Guard, tmp_path: Path) -> None:
    quarantine.ended(_die_at(tmp_path, [GOOD, POISON], POISON))
    alone: list[int] = []

    def work(inputs: Sequence[bytes | bytearray]) -> list[int]:
        alone.append(len(inputs))
        return _lengths(inputs)

    assert guard.run([b"other", GOOD, GOOD], work) == [5, 400, 400]
    assert alone == [1, 1, 1], "the others first, then each suspect by itself"
    quarantine.tidy()
    alone.clear()
    assert guard.run([b"other", GOOD], work) == [5, 400]
    assert alone == [2]
    second = quarantine.ended(_die_at(tmp_path, [GOOD, POISON], POISON))
    assert second.refused, "the other suspect is still one"


def test_an_idle_workers_end_blames_nobody(quarantine: Quarantine, guard: Guard) -> None:
    guard.run([GOOD], _lengths)
    assert quarantine.ended(os.getpid()).inputs == 0
    assert quarantine.ended(12345).inputs == 0 and quarantine.record(12345) is None


def test_a_lost_gpu_is_told_with_its_words_and_its_input(quarantine: Quarantine, guard: Guard) -> None:
    def broken(inputs: Sequence[bytes | bytearray]) -> list[RequestError]:
        error = InferenceFailed("the model failed on this input")
        error.__cause__ = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        return [error]

    guard.run([POISON], broken)
    guard.run([GOOD], _lengths)
    found = quarantine.record(os.getpid())
    assert found is not None and found.broken == "CUDA error: an illegal memory access was encountered"
    assert found.marks == (worker_side.mark_of(POISON),) and found.began is not None


def test_out_of_memory_breaks_nothing(quarantine: Quarantine, guard: Guard) -> None:
    def failing(inputs: Sequence[bytes | bytearray]) -> list[RequestError]:
        error = InferenceFailed("the model failed on this input")
        error.__cause__ = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [error]

    guard.run([POISON], failing)
    found = quarantine.record(os.getpid())
    assert found is not None and found.broken == "" and found.began is None


def test_a_batch_that_raises_leaves_the_worker_idle(quarantine: Quarantine, guard: Guard) -> None:
    def failing(inputs: Sequence[bytes | bytearray]) -> list[int]:
        raise ValueError

    with pytest.raises(ValueError):
        guard.run([GOOD], failing)
    found = quarantine.record(os.getpid())
    assert found is not None and found.began is None


def test_more_inputs_than_the_record_holds(quarantine: Quarantine, guard: Guard) -> None:
    many = [str(number).encode() for number in range(2 * worker_side.MOST_MARKS)]
    assert guard.run(many, _lengths) == _lengths(many)


def test_without_a_supervisor_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = worker_side.guard()
    assert isinstance(found, Unguarded) and found.run([GOOD], _lengths) == [400]
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_ended_before_anybody_looked_is_found(
    quarantine: Quarantine, guard: Guard, tmp_path: Path
) -> None:
    guard.run([GOOD], _lengths)
    gone = _die_at(tmp_path, [POISON], POISON)
    assert quarantine.ended_unseen() == [gone], "this process lives"
    assert quarantine.ended(gone).inputs == 1
    assert quarantine.ended_unseen() == []
