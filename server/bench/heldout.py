"""Plots of the figures on the sites' held-out patients: how they moved over the checkpoints, and what was mistaken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rin.common.labels import label_set
from rin.server.bench.plots import COLOURS, INK, MARKS, RULE, STYLE, svg
from rin.server.bench.summary import RoundFacts
from rin.server.validation import Bounds, GroupFigures, Validation

Figures = GroupFigures | Validation

# Caption to the value of a group, or of all together; None where it was withheld.
CURVES: Final[dict[str, Callable[[Figures], float | None]]] = {
    "top-1 accuracy": lambda figures: figures.top1.value if figures.top1 else None,
    "balanced accuracy": lambda figures: figures.balanced.value if figures.balanced else None,
    "mean AUC": lambda figures: figures.macro_auc,
}
SHADES: Final = LinearSegmentedColormap.from_list("shades", ["#ffffff", COLOURS[0]])
WRITTEN: Final = 0.005  # a share that would read 0.00 is not written


def curves(rounds: Sequence[RoundFacts]) -> list[tuple[str, str]]:
    """(caption, data URI) of each of `CURVES` that any site sent: one line a modality and anatomy, and one for all."""
    found = [(facts.number - 1, facts.validation) for facts in rounds if facts.validation is not None]
    names = sorted({group.name for _, validation in found for group in validation.groups})
    made = []
    for caption, value in CURVES.items():
        lines: dict[str, list[tuple[int, float]]] = {name: [] for name in [*names, "all"]}
        for number, validation in found:
            every: list[tuple[str, Figures]] = [(group.name, group) for group in validation.groups]
            for name, figures in [*every, ("all", validation)]:
                if (y := value(figures)) is not None:
                    lines[name].append((number, y))
        if lines["all"]:
            bounds = [(n, v.balanced) for n, v in found if v.balanced] if caption == "balanced accuracy" else []
            made.append((caption, lines, bounds))
    return [(caption, _curve(caption, lines, bounds, legend=caption == made[-1][0])) for caption, lines, bounds in made]


def _curve(
    caption: str, lines: dict[str, list[tuple[int, float]]], bounds: Sequence[tuple[int, Bounds]], *, legend: bool
) -> str:
    with mpl.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(2.7, 2.4))
        axes = figure.add_subplot()
        if bounds:
            numbers, between = [n for n, _ in bounds], [b for _, b in bounds]
            axes.fill_between(numbers, [b.low for b in between], [b.high for b in between], color=RULE, lw=0)
        for index, (name, points) in enumerate(lines.items()):
            x, y = zip(*points, strict=True) if points else ((), ())
            style: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[index % len(MARKS)]}
            if name == "all":
                style = {"color": INK, "marker": "", "lw": 2.6}
            if name != "all" or len(lines) > 2:
                axes.plot(x, y, label=name, **{"lw": 1.2, "ms": 4, **style})
        axes.set_xlabel("checkpoint")
        axes.set_ylabel(caption)
        axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if legend:
            axes.legend(handlelength=1.6, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return svg(figure)


def confusions(validation: Validation) -> list[tuple[str, str]]:
    """(modality and anatomy, data URI) of every group of which two labels or more are known."""
    shown = [group for group in validation.groups if sum(each.of > each.withheld for each in group.recalls) > 1]
    return [(group.name, _confusion(group)) for group in shown]


def shares(group: GroupFigures) -> tuple[list[int], np.ndarray]:
    """Head rows, and what became of the images of each: float (rows, rows + 2), each row summing to 1.

    The last two columns are labels outside these rows, and what the sites withheld because it is small.
    """
    known = [each for each in group.recalls if each.of > each.withheld]
    rows = [each.row for each in known]
    place = {row: i for i, row in enumerate(rows)}
    counts = np.zeros((len(rows), len(rows) + 2))
    for each in known:
        counts[place[each.row], place[each.row]] = each.right
    for true, predicted, count in group.cells:
        if true in place:
            counts[place[true], place.get(predicted, len(rows))] += count
    whole = np.array([[each.of - each.withheld] for each in known], float)
    counts[:, -1] = np.maximum(0.0, whole[:, 0] - counts.sum(1))
    return rows, counts / np.maximum(whole, counts.sum(1, keepdims=True))


def _confusion(group: GroupFigures) -> str:
    rows, parts = shares(group)
    names = [label_set()[row].finding.strip("_").replace("_", " ") for row in rows]
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 8}):
        figure = Figure(figsize=(1.9 + 0.36 * (len(rows) + 2), 1.5 + 0.28 * len(rows)))
        axes = figure.add_subplot()
        axes.imshow(parts, cmap=SHADES, vmin=0, vmax=1, aspect="auto")
        axes.axvline(len(rows) - 0.5, color=INK, lw=0.8)
        for (y, x), value in np.ndenumerate(parts):
            if value >= WRITTEN:
                text = "1" if value >= 1 - WRITTEN else f"{value:.2f}".removeprefix("0")
                axes.text(x, y, text, ha="center", va="center", size=7, color="white" if value > 0.5 else INK)
        axes.set_xticks(range(len(rows) + 2), [*names, "other labels", "withheld"], rotation=60, ha="right")
        axes.set_yticks(range(len(rows)), names)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        return svg(figure)
