"""Decoding in worker processes that may crash or hang: either costs one file, never the run."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import resource
import signal
import threading
import warnings
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rin.client.ingest.header import Header
from rin.client.ingest.pixels import Layout
from rin.client.ingest.reasons import Refused
from rin.common.errors import RinError

if TYPE_CHECKING:
    from rin.client.ingest.dicom import Picture

WORKERS: Final = 2
TIMEOUT_S: Final = 60.0  # for one frame; the slowest codec needs 0.5 s for a large radiograph
_START_S: Final = 120.0
_BATCH: Final = 8  # files sent at once
_MEMORY: Final = 8 << 30  # address space of a worker, bytes
_STOP: Final = None


@dataclass(frozen=True, slots=True)
class Job:
    """One file: a PNG, or DICOM: read its header with pydicom (no modality), or decode the wanted frames by its
    skimmed header."""

    path: Path
    modality: str = ""
    frames: frozenset[int] | None = None
    header: Header | None = None
    png: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: a header, pictures (of a PNG with its layout), or the reason against the whole file."""

    header: Header | None = None
    pictures: tuple[Picture, ...] = ()
    reason: str | None = None
    layout: Layout | None = None


class Pool:
    """Long-lived workers, restarted when they die; one thread here for each."""

    def __init__(self, *, workers: int = WORKERS, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[tuple[Job, Future[Outcome]] | None] = queue.SimpleQueue()
        self._running: set[_Worker] = set()
        self._cancelled = threading.Event()
        self._threads = [threading.Thread(target=self._drive, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> Future[Outcome]:
        """Queue a job."""
        future: Future[Outcome] = Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """Finish what is queued and end the workers."""
        for _ in self._threads:
            self._jobs.put(_STOP)
        for thread in self._threads:
            thread.join()

    def cancel(self) -> None:
        """Drop what is queued and end the workers at once."""
        self._cancelled.set()
        for worker in tuple(self._running):
            worker.stop()
        self.close()

    def _drive(self) -> None:
        worker: _Worker | None = None
        while (batch := self._batch()) is not None:
            pending = deque(batch)
            while pending:
                if self._cancelled.is_set():
                    _give_up(pending)
                    continue
                try:
                    if worker is None or not worker.alive:
                        worker = self._start(worker)
                    worker.run(pending)
                except RinError as error:  # no worker can be started
                    for _, future in pending:
                        future.set_exception(error)
                    pending.clear()
                except (EOFError, OSError) as error:
                    reason = "codec-timeout" if isinstance(error, TimeoutError) else "codec-crash"
                    pending.popleft()[1].set_result(Outcome(reason=reason))
                    worker = self._start(worker) if not self._cancelled.is_set() else worker
        if worker is not None:
            worker.kill()

    def _start(self, old: _Worker | None) -> _Worker:
        if old is not None:
            old.kill()
            self._running.discard(old)
        worker = _Worker(self._timeout_s)
        self._running.add(worker)
        return worker

    def _batch(self) -> list[tuple[Job, Future[Outcome]]] | None:
        """At least one job, and what else is queued already; None to stop."""
        if (first := self._jobs.get()) is None:
            return None
        batch = [first]
        with contextlib.suppress(queue.Empty):
            while len(batch) < _BATCH:
                if (item := self._jobs.get_nowait()) is None:
                    self._jobs.put(_STOP)
                    break
                batch.append(item)
        return batch


def _give_up(pending: deque[tuple[Job, Future[Outcome]]]) -> None:
    for _, future in pending:
        future.cancel()
    pending.clear()


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, timeout_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._timeout_s = timeout_s
        self._process = context.Process(target=_serve, args=(child,), daemon=True)
        self._process.start()
        child.close()
        try:
            self._receive(_START_S)
        except (EOFError, OSError) as error:
            self.kill()
            raise RinError("the decoding process does not start", step="look at the installation of rin") from error

    def run(self, pending: deque[tuple[Job, Future[Outcome]]]) -> None:
        """Work through `pending` from the left; what is still there after an error was not finished."""
        self._pipe.send([job for job, _ in pending])
        while pending:
            pictures: list[Any] = []
            while not isinstance(message := self._receive(self._timeout_s), Outcome):
                pictures.append(message)
            _, future = pending.popleft()
            future.set_result(replace(message, pictures=(*pictures, *message.pictures)))

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.is_alive()

    def stop(self) -> None:
        """End the process from another thread than the one that talks to it."""
        self._process.kill()

    def kill(self) -> None:
        """End the process whatever it does, and its pipe."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self, timeout_s: float) -> Any:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError
        return self._pipe.recv()


def _serve(pipe: Connection) -> None:
    """The worker process: quiet (codecs and pydicom quote headers), bounded in memory, ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold a patient's image
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import cv2  # here and not above, as what follows: the parent never decodes

    import rin.client.ingest.png  # noqa: F401 - DICOM with it: loaded before the clock of the first file runs

    cv2.setNumThreads(1)
    with contextlib.suppress(EOFError, OSError):
        pipe.send("ready")
        while True:
            for job in pipe.recv():
                _work(pipe, job)


def _work(pipe: Connection, job: Job) -> None:
    """Each picture as it is done, then the outcome."""
    from rin.client.ingest.dicom import pictures, read_header
    from rin.client.ingest.png import read_png

    outcome = Outcome()
    try:
        if job.png:
            layout, picture = read_png(job.path)
            outcome = Outcome(pictures=(picture,), layout=layout)  # one message: a pipe costs more than its bytes
        elif job.modality:
            for picture in pictures(job.path, modality=job.modality, frames=job.frames, header=job.header):
                pipe.send(picture)
        else:
            outcome = Outcome(header=read_header(job.path))
    except Refused as refused:
        outcome = Outcome(reason=refused.reason)
    except MemoryError:
        outcome = Outcome(reason="too-large")
    except OSError:
        outcome = Outcome(reason="unreadable")
    except Exception:  # noqa: BLE001 - the process's edge: one hostile file must not cost the run
        outcome = Outcome(reason="codec-error")
    pipe.send(outcome)
