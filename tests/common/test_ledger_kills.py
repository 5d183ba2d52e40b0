"""The ledger when processes die, write at once, overtake each other, or find a full disk."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rin.common.ledger import debits
from tests.common.test_ledger import anything, at, debit, filled

LIVES = """
import os, secrets, sys
from pathlib import Path
from typing import Any
from tests.common.test_ledger import anything, at, debit

ledger = at(Path(sys.argv[1]))
for _ in sys.stdin:
    life = os.fork()
    if life == 0:
        while True:
            new = debit()
            ledger.debit(new, anything)
            os.write(1, new.attempt.encode() + b"\\n")
    os.write(1, b"pid %d\\n" % life)
    os.waitpid(life, 0)
    os.write(1, b"dead\\n")
"""


@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_lose_no_debit_that_was_acknowledged(tmp_path: Path, kills: int) -> None:
    ledger, rng = filled(tmp_path, 0), random.Random(4)
    command = [sys.executable, "-c", LIVES, str(tmp_path)]
    acknowledged: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as parent:
        assert parent.stdin and parent.stdout
        for _ in range(kills):
            parent.stdin.write(b"live\n")
            parent.stdin.flush()
            living = True
            while living:
                word = parent.stdout.readline().decode().split()
                if word[0] == "pid":
                    time.sleep(rng.uniform(0, 0.06))
                    os.kill(int(word[1]), signal.SIGKILL)
                elif word[0] == "dead":
                    living = False
                else:
                    acknowledged.append(word[0])
            assert {old.attempt for old in debits(ledger.entries())} >= set(acknowledged)
        parent.stdin.close()
    found = ledger.entries()
    assert kills / 4 < len(acknowledged) < len(found) <= len(acknowledged) + kills  # some died in the middle of one
    ledger.debit(debit(), anything)


def test_two_processes_at_once_both_land(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 0)
    code = (
        "import sys; from pathlib import Path; from tests.common.test_ledger import anything, at, debit\n"
        "for number in range(20): at(Path(sys.argv[1])).debit(debit(round=number + 1), anything)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    writers = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        ledger.entries()  # a reader without the lock never sees a fault
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len({old.attempt for old in debits(ledger.entries())}) == 40


def test_a_reader_whom_a_writer_overtakes_reads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = filled(tmp_path, 1), at(tmp_path)
    real, reads = reader._bytes, itertools.count()

    def slow(*which: Any) -> bytes:
        data = real(*which)
        if next(reads) == 0:  # the anchor is read, the ledger not yet
            writer.debit(debit(), anything)
        return data

    monkeypatch.setattr(reader, "_bytes", slow)
    assert len(reader.entries()) == 2


def test_a_full_disk_stops_a_debit_and_nothing_else(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.path.stat().st_size + 100, hard))
    try:
        with pytest.raises(OSError) as caught:
            ledger.debit(debit(round=5), anything)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert [old.round for old in debits(ledger.entries())] == [1, 2, 3, 4, 5]  # it may have been seen: it counts
    ledger.debit(debit(round=6), anything)
    assert [old.round for old in debits(ledger.entries())] == [1, 2, 3, 4, 5, 6]
