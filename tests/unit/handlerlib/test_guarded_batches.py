"""What a worker's record says while it is at a batch that is larger than the record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from handlerlib import quarantine
from marina.quarantine import Quarantine


def test_every_input_of_a_large_batch_is_in_the_record_while_it_is_worked_on(tmp_path: Path) -> None:
    supervisor = Quarantine(tmp_path)
    guard = quarantine.Guard(tmp_path / quarantine.FOLDER)
    inputs = [b"%d" % number for number in range(2 * quarantine.MOST_MARKS + 7)]
    unmarked: list[bytes | bytearray] = []

    def work(part: Sequence[bytes | bytearray]) -> list[bytes | bytearray]:
        record = supervisor.record(os.getpid())
        marks = record.marks if record is not None else ()
        unmarked.extend(data for data in part if quarantine.mark_of(data) not in marks)
        return [*part]

    assert guard.run(inputs, work) == inputs
    assert unmarked == []
    supervisor.close()
