"""What a benchmark found, as plain values: the content of summary.json and of the report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from rich.table import Table
from rich.text import Text

from rin.server.bench.statistics import Comparison, Interval
from rin.server.bench.tasks import Kind
from rin.server.validation import Validation

Verdict = Literal["better", "not clearly different", "worse"]
VERDICTS: Final[dict[Verdict, str]] = {"better": "green", "not clearly different": "yellow", "worse": "red"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One weight file that was scored; `digest` is over its tensor bytes, `facts` are its own metadata."""

    name: str
    digest: str
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """One task as it was run; `dataset` are the facts of its `Dataset`."""

    name: str
    kind: Kind
    description: str
    classes: tuple[str, ...]
    dataset: dict[str, Any]
    recipe: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One checkpoint against random weights on one task. `seconds`: of all its fine-tunings, wall clock."""

    task: str
    checkpoint: str
    comparison: Comparison
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """Where the whole interval of the difference lies."""
        difference = self.comparison.difference
        return "better" if difference.low > 0 else "worse" if difference.high < 0 else "not clearly different"


@dataclass(frozen=True, slots=True)
class SiteRound:
    """What one site measured on its own training images in one round; top1 and top5 are shares of them."""

    site: str
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class RoundFacts:
    """One closed round; `failures` are (site, code, how often), `seconds` are from opening to closing.

    `validation`: what the round's starting weights, those of the checkpoint before, came to on held-out patients.
    """

    number: int
    seconds: float
    sites: tuple[SiteRound, ...]
    failures: tuple[tuple[str, str, int], ...] = ()
    validation: Validation | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that the report shows.

    Args:
        ingest: site to its ingest report: files, accepted, refused (reason to count), seconds.
        privacy: result of a search for PHI canaries: canaries, bytes_searched, found, damaged, unaccounted.
        run: name, plan digest, privacy mode and the like of the run that made the checkpoints; empty without a run.
    """

    release: str
    date: str
    seeds: int
    resamples: int
    threads: int
    checkpoints: tuple[Checkpoint, ...]
    tasks: tuple[TaskFacts, ...]
    scores: tuple[TaskScore, ...]
    run: dict[str, Any] = field(default_factory=dict)
    rounds: tuple[RoundFacts, ...] = ()
    ingest: dict[str, dict[str, Any]] = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values only; every score carries its verdict too."""
        value = dataclasses.asdict(self)
        for row, score in zip(value["scores"], self.scores, strict=True):
            row["verdict"] = score.verdict
        return value

    def task(self, name: str) -> TaskFacts:
        return next(task for task in self.tasks if task.name == name)


def figure(interval: Interval, *, signed: bool = False) -> str:
    """The value and, on a second line, its interval; with plus signs where `signed`."""
    sign = "+" if signed else ""
    return f"{interval.value:{sign}.3f}\n{interval.low:{sign}.3f} to {interval.high:{sign}.3f}"


def summary_table(summary: Summary) -> Table:
    """The headline table for a terminal of 80 columns or more."""
    title = f"Downstream benchmark: mean of {summary.seeds} seeds, 95% interval over test images"
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("task")
    for name in ("from checkpoint", "from random", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for score in summary.scores:
        found = score.comparison
        measure = MEASURES[summary.task(score.task).kind]
        table.add_row(
            Text(f"{score.task}\n{measure}, {score.checkpoint}"),
            Text(figure(found.checkpoint)),
            Text(figure(found.random)),
            Text.assemble(figure(found.difference, signed=True), "\n", (score.verdict, VERDICTS[score.verdict])),
        )
    return table


MEASURES: dict[Kind, str] = {"auc": "AUC", "dice": "Dice"}
