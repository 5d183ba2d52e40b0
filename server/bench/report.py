"""The report: one self-contained HTML file that a hospital's board can read, print and forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, StrictUndefined

from rin.common.files import write_atomic
from rin.server.bench import plots
from rin.server.bench.summary import MEASURES, Checkpoint, RoundFacts, Summary

RANDOM: Final = "random weights"
Grey = npt.NDArray[np.uint8]

PRIVACY: Final = {
    "none": "No privacy mechanism was used in this training (mode: none). Each site agreed to that in its site file, "
    "with a name and a date. Images and labels stayed at the sites; what left them were weights and the metrics shown "
    "here. Weights trained without a mechanism can reveal something about single patients: treat them as patient data "
    "until your privacy officer says otherwise.",
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
        examples={name: _pictures(example) for name, example in examples.items()},
        rounds=[_round(facts) for facts in summary.rounds],
        colours={"truth": _css(plots.TRUTH), "predicted": _css(plots.PREDICTED)},
        task_rows={task.name: _rows({**task.dataset, **task.recipe}) for task in summary.tasks},
        provenance=[_provenance(checkpoint) for checkpoint in summary.checkpoints],
        mode=mode(summary),
        privacy=PRIVACY.get(mode(summary), UNKNOWN_PRIVACY),
    )


def headline(summary: Summary) -> str:
    """One sentence about the last checkpoint: on how many tasks it helped."""
    last = summary.checkpoints[-1].name
    verdicts = [score.verdict for score in summary.scores if score.checkpoint == last]
    count = {word: verdicts.count(word) for word in ("better", "worse", "no clear difference")}
    tasks = "the task" if len(verdicts) == 1 else f"{count['better']} of {len(verdicts)} tasks"
    if count["better"] == len(verdicts) == 1 or count["better"]:
        text = f"Starting from the pretrained backbone {last} is better than starting from random weights on {tasks}."
    elif count["worse"]:
        text = f"The pretrained backbone {last} did not help on any task."
    else:
        text = f"The pretrained backbone {last} shows no clear difference from random weights."
    rest = [f"{count[word]} {word}" for word in ("no clear difference", "worse") if count[word] and count["better"]]
    return text + (f" On the others: {', '.join(rest)}." if rest else "")


def mode(summary: Summary) -> str:
    """The privacy mode of the training, or `unknown`."""
    return str(summary.run.get("privacy") or summary.checkpoints[-1].facts.get("privacy") or "unknown")


def _css(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _pictures(example: Examples) -> list[dict[str, Any]]:
    """Rows of the example grid: a title and one (caption, data URI) an image."""
    count = len(example.images)
    if example.truth is None:
        cells = [
            (
                example.captions[i],
                plots.outlined(example.images[i]),
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


def _round(facts: RoundFacts) -> dict[str, Any]:
    counted = [site for site in facts.sites if not site.code]
    return {
        "number": facts.number,
        "seconds": "" if facts.seconds is None else f"{facts.seconds:.0f}",
        "counted": [site.site for site in counted],
        "refused": [f"{site.site}: {site.code}" for site in facts.sites if site.code],
        "loss": [f"{site.site} {site.metrics['loss']:.3f}" for site in counted if "loss" in site.metrics],
    }


def _provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    rows = [("SHA-256 of the weights", checkpoint.digest), *_rows(checkpoint.facts)]
    return {"name": checkpoint.name, "rows": rows}


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Facts as rows of text: lists and tables within a fact on one line."""
    rows = []
    for key, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if isinstance(value, dict):
            text = ", ".join(f"{name} {number}" for name, number in value.items()) or "none"
        rows.append((key.replace("_", " ").replace("-", " "), text))
    return rows
