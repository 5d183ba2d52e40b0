"""The report: one self-contained HTML file that a hospital's board can read, print and forward."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, StrictUndefined

from rin.common.files import write_atomic
from rin.server.bench import heldout, plots
from rin.server.bench.summary import MEASURES, VERDICTS, Checkpoint, RoundFacts, Summary
from rin.server.validation import COLUMNS, table

RANDOM: Final = "random weights"
Grey = npt.NDArray[np.uint8]

# By the privacy mode of the plan of the run: what its sites did.
AT_THE_SITES: Final = {
    "none": "Privacy mode of the run: none. Each site agreed to that in its site file, with a name and a date. Images "
    "and labels stayed at the sites; weights and the metrics shown here left them.",
    "patient": "Privacy mode of the run: patient. Each site trained with differential privacy for each patient, "
    "accounted in its own ledger. Images, labels and all figures of patients stayed at the sites; weights left them.",
}
UNKNOWN_PRIVACY: Final = "The weight file does not say how it was trained, so nothing can be said about privacy."


@dataclass(frozen=True, slots=True)
class Examples:
    """Test images of one task, chosen by their place in the test set and never by the result.

    Args:
        images: uint8 (k, h, w).
        captions: what each image shows: its class, or nothing.
        truth: masks (k, h, w), 0 or 1, or None.
        by_start: name of the checkpoint, or "random weights", to one prediction an image: caption, mask or None.
    """

    images: Grey
    captions: tuple[str, ...]
    truth: Grey | None
    by_start: Mapping[str, Sequence[tuple[str, Grey | None]]]


def write_report(summary: Summary, examples: Mapping[str, Examples], path: Path) -> None:
    """Write the report to `path`, atomically."""
    write_atomic(path, render(summary, examples).encode())


def render(summary: Summary, examples: Mapping[str, Examples]) -> str:
    """The whole page. Every text goes through the escaping renderer; no script, no outside address."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["range"] = lambda interval: f"({interval.low:.3f} to {interval.high:.3f})"
    environment.filters["signed_range"] = lambda interval: f"({interval.low:+.3f} to {interval.high:+.3f})"
    template = environment.from_string(resources.files("rin.server.bench").joinpath("report.html").read_text("utf-8"))
    return template.render(
        summary=summary,
        measures=MEASURES,
        headline=headline(summary),
        bars=[(MEASURES[kind], uri) for kind in MEASURES if (uri := plots.bars(summary, kind))],
        curves=plots.learning_curves(summary.rounds),
        held_out=_held_out(summary.rounds),
        examples={name: _pictures(example) for name, example in examples.items()},
        rounds=[_round(facts, summary) for facts in summary.rounds],
        colours={"truth": _css(plots.TRUTH), "predicted": _css(plots.PREDICTED)},
        task_rows={task.name: _rows({**task.dataset, **task.recipe}) for task in summary.tasks},
        provenance=[_provenance(checkpoint) for checkpoint in summary.checkpoints],
        privacy=privacy(summary),
    )


def _held_out(rounds: Sequence[RoundFacts]) -> dict[str, Any] | None:
    """The figures on held-out patients: curves over the checkpoints, a table and confusion pictures of the newest."""
    newest = next((facts for facts in reversed(rounds) if facts.validation is not None), None)
    if newest is None or newest.validation is None:
        return None
    return {
        "checkpoint": newest.number - 1,
        "curves": heldout.curves(rounds),
        "columns": COLUMNS,
        "rows": table(newest.validation),
        "confusions": heldout.confusions(newest.validation),
    }


def headline(summary: Summary) -> str:
    """One sentence about the last checkpoint: where it helped, where not, and no more than the intervals say."""
    last = summary.checkpoints[-1].name
    verdicts = {score.task: score.verdict for score in summary.scores if score.checkpoint == last}
    parts = []
    for word in VERDICTS:
        tasks = [task for task, verdict in verdicts.items() if verdict == word]
        if tasks:
            count = "every task" if len(tasks) > 1 and len(tasks) == len(verdicts) else " and ".join(tasks)
            parts.append(f"{word} on {count}")
    return f"Compared with random weights, the pretrained backbone {last} is " + ", ".join(parts) + "."


def privacy(summary: Summary) -> list[str]:
    """The privacy statements: each checkpoint's own, then what the run's plan says."""
    own = dict.fromkeys(str(each.facts.get("privacy", UNKNOWN_PRIVACY)) for each in summary.checkpoints)
    run = AT_THE_SITES.get(str(summary.run.get("privacy")))
    return [*own, *([run] if run else [])]


def _css(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _pictures(example: Examples) -> list[dict[str, Any]]:
    """Rows of the example grid: a title and one (caption, data URI) an image."""
    count = len(example.images)
    if example.truth is None:
        cells = [
            (
                example.captions[i],
                plots.plain(example.images[i]),
                [f"{name}: {predictions[i][0]}" for name, predictions in example.by_start.items()],
            )
            for i in range(count)
        ]
        return [{"title": "", "cells": cells}]
    rows = []
    for name, predictions in example.by_start.items():
        cells = [
            ("", plots.outlined(example.images[i], truth=example.truth[i], predicted=mask), [text])
            for i, (text, mask) in enumerate(predictions)
        ]
        rows.append({"title": name, "cells": cells})
    return rows


def _round(facts: RoundFacts, summary: Summary) -> dict[str, Any]:
    return {
        "number": facts.number if facts.number <= summary.run.get("rounds", facts.number) else "closing",
        "seconds": f"{facts.seconds:.0f}",
        "counted": [each.site for each in facts.sites],
        "loss": [f"{each.site} {each.metrics['loss']:.3f}" for each in facts.sites if "loss" in each.metrics],
        "failures": [f"{site}: {code}{f', {n} times' if n > 1 else ''}" for site, code, n in facts.failures],
    }


def _provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's facts as rows of text; the privacy statement has its own place."""
    facts = {key: value for key, value in checkpoint.facts.items() if key not in ("privacy", "weights")}
    rows = [("SHA-256 of the weights", checkpoint.digest), *_rows(facts)]
    return {"name": checkpoint.name, "rows": rows}


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Facts as rows of text; of a table within a fact, long values (digests) get a row each."""
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        name = key.replace("_", " ").replace("-", " ")
        if isinstance(value, dict) and any(len(str(each)) > 40 for each in value.values()):
            rows += [(f"{name}, {part}", _text(each)) for part, each in value.items()]
        elif isinstance(value, dict):
            rows.append((name, ", ".join(f"{part} {each}" for part, each in value.items()) or "none"))
        else:
            rows.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
