from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from handlerlib import cores
from handlerlib.cores import Board, Cores

WORKER = """
import sys
from pathlib import Path
from handlerlib.cores import Board, Cores

board = Board(Path(sys.argv[1]))
mine = Cores(8, board)
for line in sys.stdin:
    word = line.strip()
    found = getattr(mine, word)() if word in ("begin", "end", "share") else board.others()
    print(found, flush=True)
"""


class Worker:
    """Another process on the board, which does what it is told."""

    def __init__(self, folder: Path, handlers: Path) -> None:
        environment = dict(os.environ) | {"PYTHONPATH": str(handlers)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.ask("others")

    def ask(self, word: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        with self._process:
            self._process.kill()


@pytest.fixture
def start(tmp_path: Path, handlers: Path) -> Iterator[Callable[[], Worker]]:
    started: list[Worker] = []

    def one() -> Worker:
        started.append(Worker(tmp_path / "board", handlers))
        return started[-1]

    yield one
    for worker in started:
        worker.kill()


def test_alone_all_cores_together_the_share(start: Callable[[], Worker]) -> None:
    first, second, third = start(), start(), start()
    first.ask("begin")
    assert first.ask("share") == "8"
    second.ask("begin")
    assert second.ask("share") == "4"
    assert first.ask("share") == "4"
    third.ask("begin")
    assert third.ask("share") == "2"
    for worker in (first, second, third):
        worker.ask("end")
    time.sleep(cores._RECENT / 1e9)
    assert [first.ask("others"), second.ask("others")] == ["0", "0"]


def test_a_client_that_sends_one_at_a_time_gets_all_cores_from_every_worker(start: Callable[[], Worker]) -> None:
    workers = [start(), start()]
    for turn in range(6):
        worker = workers[turn % 2]
        worker.ask("begin")
        assert worker.ask("share") == "8"
        worker.ask("end")


def test_under_load_the_gap_between_two_batches_is_no_idleness(tmp_path: Path) -> None:
    ours, theirs = Board(tmp_path / "board"), Board(tmp_path / "board")
    ours.begin()
    theirs.begin()
    ours.end()
    theirs.end()
    ours.begin()  # java is handing them the next batch
    assert ours.others() == 1
    deadline = time.monotonic() + 10
    while ours.others():
        assert time.monotonic() < deadline, "it counts for ever"
    ours.close()
    theirs.close()


def test_a_worker_killed_in_its_batch_stops_counting_and_its_place_is_used_again(
    start: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dead, alive = start(), start()
    dead.ask("begin")
    alive.ask("begin")
    board = Board(tmp_path / "board")
    assert board.others() == 2
    dead.kill()
    monkeypatch.setattr(cores, "_SUSPICIOUS", 0)
    assert board.others() == 1  # the other one is busy for long, but alive
    again = start()
    assert again.ask("others") == "1"
    assert sorted(path.name for path in (tmp_path / "board").iterdir()) == ["board", "place-0", "place-1", "place-2"]
    board.close()


def test_a_board_of_others_or_full_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o755)
    with pytest.raises(PermissionError, match="ours alone"):
        Board(open_to_all)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(elsewhere)
    with pytest.raises(PermissionError, match="ours alone"):
        Board(tmp_path / "link")
    boards = [Board(tmp_path / "full") for _ in range(cores._PLACES)]
    with pytest.raises(OSError, match="all 64 places"):
        Board(tmp_path / "full")
    for board in boards:
        board.close()
    Board(tmp_path / "full").close()


def test_without_a_board_each_keeps_to_its_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    found = Cores.of_server(workers=2)
    found.begin()
    assert found.share() == max(1, cores.usable() // 2)
    found.end()
    assert Cores(16, None, workers=4).share() == 4


def test_boards_of_servers_that_are_gone_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    old, foreign = tmp_path / f"marina-cores-{os.geteuid()}-{ended.pid}", tmp_path / "marina-cores-other"
    Board(old).close()
    foreign.mkdir()
    Cores.of_server(workers=1)
    assert not old.exists()
    assert foreign.exists()
    assert (tmp_path / f"marina-cores-{os.geteuid()}-{os.getppid()}" / "board").exists()


def test_a_team_of_threads_shrinks_at_once_and_grows_when_it_lasts(tmp_path: Path) -> None:
    ours, others = Board(tmp_path / "board"), [Board(tmp_path / "board") for _ in range(7)]
    mine = Cores(8, ours)
    mine.begin()
    assert mine.share() == 8
    others[0].begin()
    assert mine.share() == 4
    others[0]._clear()
    assert [mine.share() for _ in range(3)] == [4, 4, 8]
    for other in others:
        other.begin()
    assert mine.share() == 1
    for other in others:
        other._clear()
    assert mine.share() == 8  # from one thread there is no team to end
    for board in (ours, *others):
        board.close()


@pytest.mark.parametrize(
    ("lines", "files", "cores_expected"),
    [
        ("0::/", {"cpu.max": "250000 100000"}, 2),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "400000 100000"}, 1),
        ("0::/host/path", {"cpu.max": "50000 100000"}, 1),
        ("4:cpu,cpuacct:/x", {"cpu,cpuacct/x/cpu.cfs_quota_us": "100000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/x", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("9:pids:/x", {"pids/x/cpu.max": "100000 100000"}, None),
        ("", {"cpu.max": "garbage"}, None),
    ],
)  # fmt: skip
def test_quota_of_the_control_group(
    tmp_path: Path, lines: str, files: dict[str, str], cores_expected: int | None
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cgroup").write_text(lines)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    mask = len(os.sched_getaffinity(0))
    assert cores.usable(tmp_path / "proc", tmp_path / "groups") == min(mask, cores_expected or mask)
