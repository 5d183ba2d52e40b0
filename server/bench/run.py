"""`rin-server bench`: every checkpoint on every task, each fine-tuning stored, then summary.json and the report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from rin.common import fit, weights
from rin.common.errors import ConfigError
from rin.common.files import canonical_json, write_atomic, write_json
from rin.common.layout import file_digest
from rin.common.plan import Model
from rin.server.bench import history
from rin.server.bench.datasets import Dataset
from rin.server.bench.protocol import Prediction, Progress, compared, example_index, fine_tune, model_of
from rin.server.bench.report import RANDOM, Examples, write_report
from rin.server.bench.statistics import RESAMPLES
from rin.server.bench.summary import Checkpoint, Summary, TaskFacts, TaskScore, summary_table
from rin.server.bench.tasks import Task
from rin.server.rundir import RunDir

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Start:
    """One start of fine-tuning: a checkpoint, or random weights (`path` None) of the same network."""

    name: str
    path: Path | None
    model: Model
    identity: str  # what a stored score is reused for: the weights' digest, or nothing but the network


def bench(
    paths: Sequence[Path],
    tasks: Sequence[Task],
    out: Path,
    *,
    run: RunDir | None = None,
    seeds: int = 3,
    threads: int = 1,
    progress: Progress = fit.silent,
    sites: dict[str, dict[str, Any]] | None = None,
    privacy: dict[str, Any] | None = None,
) -> Summary:
    """Score the checkpoints `paths` on `tasks`; write `out/summary.json` and `out/report/index.html`.

    Every finished fine-tuning is stored below `out/scores/`, so a run that was stopped goes on where it was.

    Args:
        run: a run directory whose rounds the report shows too.
        seeds: fine-tunings a task and start.
        progress: called with fine-tunings done and all fine-tunings.
        sites: site to its ingest report, for the report.
        privacy: result of a search for PHI canaries, for the report.

    Raises:
        ConfigError: a checkpoint that does not say its network, or a task's folder that is no task.
        RefusedError: a weight file that cannot be read.
    """
    checkpoints, models = _checkpoints(paths)
    scores: list[TaskScore] = []
    facts: list[TaskFacts] = []
    examples: dict[str, Examples] = {}
    starts = [
        start
        for checkpoint, path, model in zip(checkpoints, paths, models, strict=True)
        for start in (_Start(checkpoint.name, path, model, checkpoint.digest), _Start(RANDOM, None, model, "random"))
    ]
    total, done = len(tasks) * seeds * len(starts), 0
    for task in tasks:
        data = task.load()
        digest = data.digest()
        found: list[list[Prediction]] = []
        seconds: list[float] = []
        for start in starts:
            found.append([])
            begun = time.monotonic()
            for seed in range(seeds):
                found[-1].append(_stored(start, task, data, digest, out / "scores", seed=seed, threads=threads))
                progress(done := done + 1, total)
            seconds.append(time.monotonic() - begun)
        for place in range(0, len(starts), 2):
            pair = [[prediction.scores for prediction in predictions] for predictions in found[place : place + 2]]
            taken = sum(seconds[place : place + 2])
            scores.append(compared(task, data, starts[place].name, *pair, seconds=taken))
        facts.append(_task_facts(task, data))
        examples[task.name] = _examples(task, data, {s.name: f[0] for s, f in zip(starts, found, strict=True)})
    summary = Summary(
        release=metadata.version("rin"),
        date=datetime.now(UTC).date().isoformat(),
        seeds=seeds,
        resamples=RESAMPLES,
        threads=threads,
        checkpoints=tuple(checkpoints),
        tasks=tuple(facts),
        scores=tuple(scores),
        run=history.run_facts(run) if run else {},
        rounds=history.rounds_of(run) if run else (),
        ingest=sites or {},
        privacy=privacy or {},
    )
    write_json(out / "summary.json", summary.to_json())
    write_report(summary, examples, out / "report" / "index.html")
    return summary


def print_summary(summary: Summary) -> None:
    """The headline table on the terminal."""
    Console(markup=False, highlight=False).print(summary_table(summary))


def _checkpoints(paths: Sequence[Path]) -> tuple[list[Checkpoint], list[Model]]:
    """What every file says about itself; names are made unique by the digest's first digits."""
    if not paths:
        raise ConfigError("no checkpoint to score", step="name a file of the run's checkpoints/")
    models = [model_of(path) for path in paths]
    digests = [file_digest(path) for path in paths]
    if len(set(digests)) < len(digests):
        raise ConfigError("the same weights are named twice", step="name each checkpoint once")
    count = Counter(path.stem for path in paths)
    names = [p.stem if count[p.stem] == 1 else f"{p.stem}-{d[:8]}" for p, d in zip(paths, digests, strict=True)]
    rows = zip(names, digests, paths, strict=True)
    return [Checkpoint(name, digest, weights.read_facts(path)) for name, digest, path in rows], models


def _stored(
    start: _Start, task: Task, data: Dataset, digest: str, folder: Path, *, seed: int, threads: int
) -> Prediction:
    """The prediction of one fine-tuning, from its file if it was finished before."""
    tuning = dataclasses.asdict(task.tuning)
    network = start.model.model_dump(mode="json")
    key = [start.identity, network, task.name, task.kind, tuning, digest, seed, metadata.version("rin")]
    path = folder / f"{hashlib.sha256(canonical_json(key)).hexdigest()}.safetensors"
    try:
        with safe_open(path, framework="np") as file:
            return Prediction(file.get_tensor("scores"), file.get_tensor("examples"))
    except FileNotFoundError:
        pass
    except SafetensorError:
        logger.warning("a stored score could not be read and is made again")
    made = fine_tune(start.model, start.path, task, data, seed=seed, threads=threads)
    facts = {"start": start.name, "task": task.name, "seed": seed, "threads": threads}
    tensors = {"scores": made.scores, "examples": made.examples}
    write_atomic(path, to_safetensors(tensors, {"rin": json.dumps(facts, sort_keys=True)}))
    return made


def _task_facts(task: Task, data: Dataset) -> TaskFacts:
    tuning = dataclasses.asdict(task.tuning)
    return TaskFacts(task.name, task.kind, task.description, data.classes, data.facts, tuning)


def _examples(task: Task, data: Dataset, found: dict[str, Prediction]) -> Examples:
    """The report's example images with what the first seed of every start said."""
    index = example_index(data)
    place = np.searchsorted(np.flatnonzero(data.test), index)
    by_start = {}
    for name, prediction in found.items():
        rows = prediction.scores[place]
        if task.kind == "dice":
            by_start[name] = [(f"Dice {d:.2f}", m) for d, m in zip(rows, prediction.examples, strict=True)]
        else:
            by_start[name] = [(f"{data.classes[int(row.argmax())]} {row.max():.2f}", None) for row in rows]
    truth = data.masks[index] if task.kind == "dice" and data.masks is not None else None
    captions = tuple(data.classes[target] for target in data.targets[index])
    return Examples(data.images[index], captions, truth, by_start)
