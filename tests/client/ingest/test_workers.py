"""Real worker processes that hang and die: each costs one file."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rin.client.ingest.skim import HEAD, skim
from rin.client.ingest.workers import Job, Outcome, Pool

PIXELS = np.arange(64, dtype=np.int16).reshape(8, 8)


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(workers=1, timeout_s=1.5)
    yield pool
    pool.cancel()


@pytest.fixture
def good(dicom_file: Callable[..., Path]) -> Job:
    path = dicom_file(PIXELS)
    data = path.read_bytes()
    return Job(path, "CT", None, skim(data[:HEAD], size=len(data)))


def is_picture(outcome: Outcome) -> bool:
    return outcome.reason is None and len(outcome.pictures) == 1 and outcome.pictures[0].reason is None


def test_a_hanging_file_costs_itself_only(pool: Pool, good: Job, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hangs")  # opening it for reading waits for ever
    futures = [pool.submit(job) for job in (good, Job(tmp_path / "hangs", "CT"), good, good)]
    outcomes = [future.result(60) for future in futures]
    assert [outcome.reason for outcome in outcomes] == [None, "codec-timeout", None, None]
    assert all(is_picture(outcome) for outcome in outcomes[::2])


def test_a_dying_process_costs_one_file(good: Job, tmp_path: Path) -> None:
    pool = Pool(workers=1, timeout_s=60)
    assert is_picture(pool.submit(good).result(60))
    os.mkfifo(tmp_path / "hangs")
    futures = [pool.submit(job) for job in (Job(tmp_path / "hangs", "CT"), good)]
    time.sleep(0.3)
    (process,) = multiprocessing.active_children()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSEGV)
    assert [future.result(60).reason for future in futures] == ["codec-crash", None]
    pool.close()
    assert not multiprocessing.active_children()


def test_a_worker_that_died_while_idle_costs_nothing(pool: Pool, good: Job) -> None:
    assert is_picture(pool.submit(good).result(60))
    (process,) = multiprocessing.active_children()
    process.kill()
    process.join()
    assert is_picture(pool.submit(good).result(60))


def test_reasons_and_headers_come_back(pool: Pool, good: Job, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"no DICOM at all, whatever its name says")
    assert pool.submit(Job(tmp_path / "text")).result(60).reason == "not-dicom"
    assert pool.submit(Job(tmp_path / "missing", "CT")).result(60).reason == "unreadable"
    header = pool.submit(Job(good.path)).result(60).header
    assert header is not None
    assert header.word("Rows") == 8


def test_cancel_does_not_wait_for_what_hangs(good: Job, tmp_path: Path) -> None:
    pool = Pool(workers=1, timeout_s=600)
    assert is_picture(pool.submit(good).result(60))
    os.mkfifo(tmp_path / "hangs")
    pool.submit(Job(tmp_path / "hangs", "CT"))
    later = pool.submit(good)
    time.sleep(0.3)
    start = time.monotonic()
    pool.cancel()
    assert time.monotonic() - start < 10
    assert later.cancelled() or later.done()


def test_workers_never_import_torch(pool: Pool, good: Job) -> None:
    assert is_picture(pool.submit(good).result(60))
    (process,) = multiprocessing.active_children()
    maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
    assert "cv2" in maps
    assert "torch" not in maps
