"""Fine-tunings, each stored when it is finished, several at a time in processes of one thread each.

One thread each, because two fine-tunings beside each other use two cores better than one with two threads, and because
the figures then do not depend on how many cores there were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from rin.common import fit
from rin.common.files import canonical_json, write_atomic
from rin.common.plan import Model
from rin.common.supervise import die_with_parent
from rin.server.bench.datasets import Dataset
from rin.server.bench.protocol import Prediction, fine_tune
from rin.server.bench.tasks import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a fine-tuning starts: a checkpoint, or random weights (`path` None) of the same network.

    Args:
        identity: what a stored score is reused for: the weights' digest, or a word that stands for random weights.
    """

    name: str
    path: Path | None
    model: Model
    identity: str


@dataclass(frozen=True, slots=True)
class Job:
    """One fine-tuning of `task`, whose images have the digest `data`; its score is stored in `folder`."""

    start: Start
    task: Task
    data: str
    seed: int
    folder: Path

    @property
    def path(self) -> Path:
        """Named by everything that the score depends on, so that a changed task, recipe or release scores anew."""
        network, tuning = self.start.model.model_dump(mode="json"), dataclasses.asdict(self.task.tuning)
        what = [self.start.identity, network, self.task.name, self.task.kind, tuning, self.data, self.seed]
        key = hashlib.sha256(canonical_json([*what, metadata.version("rin")])).hexdigest()
        return self.folder / f"{key}.safetensors"

    def stored(self) -> Prediction | None:
        """The prediction of this job if it was finished before."""
        try:
            with safe_open(self.path, framework="np") as file:
                facts = json.loads(file.metadata()["rin"])
                return Prediction(file.get_tensor("scores"), file.get_tensor("examples"), facts["seconds"])
        except FileNotFoundError:
            return None
        except SafetensorError:
            logger.warning("a stored score could not be read and is made again")
            return None

    def make(self, data: Dataset) -> None:
        """Fine-tune with one thread and store the score."""
        begun = time.monotonic()
        made = fine_tune(self.start.model, self.start.path, self.task, data, seed=self.seed, threads=1)
        facts = {"start": self.start.name, "task": self.task.name, "seed": self.seed}
        facts["seconds"] = round(time.monotonic() - begun, 3)
        tensors = {"scores": made.scores, "examples": made.examples}
        write_atomic(self.path, to_safetensors(tensors, {"rin": json.dumps(facts, sort_keys=True)}))


def predictions(
    jobs: Sequence[Job], data: Dataset, executor: Executor | None, *, finished: Callable[[], None]
) -> list[Prediction]:
    """The predictions of `jobs`, in their order; `finished` is called once a job. Without an executor: in this process.

    Raises:
        RefusedError: a weight file cannot be read, or a fine-tuning became NaN.
    """
    missing = [job for job in jobs if job.stored() is None]
    for _ in range(len(jobs) - len(missing)):
        finished()
    if executor is None:
        for job in missing:
            job.make(data)
            finished()
    else:
        for done in as_completed([executor.submit(job.make, data) for job in missing]):
            done.result()
            finished()
    return [found for job in jobs if (found := job.stored()) is not None]


@contextlib.contextmanager
def workers(count: int) -> Iterator[Executor | None]:
    """`count` processes for `predictions`, started when first needed, stopped at once on an error or Ctrl-C.

    None, which means this process, for one worker and wherever there is a GPU.
    """
    if count <= 1 or fit.pick_device("auto").type != "cpu":
        yield None
        return
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(count, mp_context=context, initializer=_obey, initargs=(os.getpid(),))
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    executor.shutdown()


def _obey(parent: int) -> None:
    """In a worker: Ctrl-C is the parent's affair, and nothing lives longer than the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
