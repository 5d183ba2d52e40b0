"""`rin-server bench`: every checkpoint on every task, each fine-tuning stored, then summary.json and the report."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rin.common import fit
from rin.common.errors import ConfigError
from rin.common.files import write_json
from rin.common.plan import Model
from rin.server.bench import history
from rin.server.bench.datasets import Dataset
from rin.server.bench.protocol import Prediction, Progress, compared, example_index
from rin.server.bench.report import RANDOM, Examples, write_report
from rin.server.bench.scores import Job, Start, predictions, workers
from rin.server.bench.statistics import RESAMPLES
from rin.server.bench.summary import Checkpoint, Summary, TaskFacts, TaskScore, summary_table
from rin.server.bench.tasks import Task
from rin.server.rundir import RunDir
from rin.server.weightfiles import open_weights


def bench(
    paths: Sequence[Path],
    tasks: Sequence[Task],
    out: Path,
    *,
    run: RunDir | None = None,
    seeds: int = 3,
    threads: int = 1,
    progress: Progress = fit.silent,
    normalisation: str | None = None,
    image_size: int | None = None,
    sites: dict[str, dict[str, Any]] | None = None,
    privacy: dict[str, Any] | None = None,
) -> Summary:
    """Score the weight files `paths`, of any layout, on `tasks`; write `out/summary.json` and `out/report/index.html`.

    Every finished fine-tuning is stored below `out/scores/`, so a run that was stopped goes on where it was.

    Args:
        run: a run directory whose rounds the report shows too.
        seeds: fine-tunings a task and start.
        threads: fine-tunings at a time; the figures do not depend on it.
        progress: called with fine-tunings done and all fine-tunings.
        normalisation, image_size: for files that do not say theirs.
        sites: site to its ingest report, for the report.
        privacy: result of a search for PHI canaries, for the report.

    Raises:
        ConfigError: a file whose network or normalisation is not known, a task's folder that is no task, two tasks of
            one name, or no folder can be at `out`.
        RefusedError: a weight file that cannot be read.
    """
    _check_names(tasks)
    checkpoints, models = _checkpoints(paths, normalisation, image_size)
    _make(out)
    pairs = [
        (Start(each.name, path, model, each.digest), Start(RANDOM, None, model, "random"))
        for each, path, model in zip(checkpoints, paths, models, strict=True)
    ]
    starts = list(dict.fromkeys(start for pair in pairs for start in pair))
    done, total = itertools.count(1), len(tasks) * len(starts) * seeds
    facts: list[TaskFacts] = []
    scores: list[TaskScore] = []
    examples: dict[str, Examples] = {}
    with workers(threads) as executor:
        for task in tasks:
            data = task.load()
            digest = data.digest()
            jobs = [Job(start, task, digest, seed, out / "scores") for start in starts for seed in range(seeds)]
            made = predictions(jobs, data, executor, finished=lambda: progress(next(done), total))
            found = {start: made[i * seeds : (i + 1) * seeds] for i, start in enumerate(starts)}
            facts.append(_task_facts(task, data))
            scores += [_score(task, data, pair, found) for pair in pairs]
            examples[task.name] = _examples(task, data, {start.name: found[start][0] for start in starts})
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


def _check_names(tasks: Sequence[Task]) -> None:
    """Scores and example images are kept by a task's name, so each has its own."""
    if twice := [name for name, count in Counter(task.name for task in tasks).items() if count > 1]:
        raise ConfigError(
            f"two tasks are called {twice[0]}",
            step="name each task and folder once; rename one of two folders, or link it under another name (ln -s) and"
            " pass the link",
        )


def _make(out: Path) -> None:
    """Make the folder now: after hours of fine-tuning it is too late to learn that there is none."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be a folder: {error.strerror}", step="choose another --out") from None


def _checkpoints(
    paths: Sequence[Path], normalisation: str | None, image_size: int | None
) -> tuple[list[Checkpoint], list[Model]]:
    """What every file says about itself; names are made unique by the digest's first digits."""
    if not paths:
        raise ConfigError("no checkpoint to score", step="name a weight file, such as one of the run's checkpoints/")
    opened = [open_weights(path, normalisation=normalisation, image_size=image_size) for path in paths]
    digests = [weights.digest() for weights, _ in opened]
    if len(set(digests)) < len(digests):
        raise ConfigError("the same weights are named twice", step="name each checkpoint once")
    count = Counter(path.stem for path in paths)
    names = [p.stem if count[p.stem] == 1 else f"{p.stem}-{d[:8]}" for p, d in zip(paths, digests, strict=True)]
    rows = [
        Checkpoint(name, digest, {**weights.all_facts(), "statistics": verdict.words})
        for name, digest, (weights, verdict) in zip(names, digests, opened, strict=True)
    ]
    return rows, [weights.model for weights, _ in opened]


def _score(
    task: Task, data: Dataset, pair: tuple[Start, Start], found: Mapping[Start, Sequence[Prediction]]
) -> TaskScore:
    """One checkpoint against the random weights of its network."""
    seconds = sum(each.seconds for start in pair for each in found[start])
    ours, theirs = ([each.scores for each in found[start]] for start in pair)
    return compared(task, data, pair[0].name, ours, theirs, seconds=seconds)


def _task_facts(task: Task, data: Dataset) -> TaskFacts:
    tuning = dataclasses.asdict(task.tuning) | {"steps": task.tuning.steps_for(int((~data.test).sum()))}
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
