"""The plot of what privacy costs: `python -m tests.learning.utility_plot FIGURES PICTURE`.

FIGURES is what the test of it kept, one JSON line a training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from tests.learning.utility import DELTA, PATIENTS

PLACES = {1.0: "1", 3.0: "3", 8.0: "8", None: "none"}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"  # told apart whatever one's colour vision (Okabe and Ito)
MARKS = ("o", "s", "^")


def draw(figures: list[dict[str, Any]]) -> Figure:
    """Each seed's private heads and their mean, against epsilon."""
    mpl.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(PLACES))
    seeds = sorted({each["seed"] for each in figures})
    heads = np.array([[_auc(figures, seed, "head", target) for target in PLACES] for seed in seeds])
    untrained = float(np.mean([_auc(figures, seed, "untrained") for seed in seeds]))
    mean = heads.mean(axis=0)
    axes.plot(places, mean, color=BLUE, linewidth=2, zorder=1, label="mean")
    for seed, row, mark, shift in zip(seeds, heads, MARKS, (-0.06, 0.0, 0.06), strict=True):
        axes.scatter(
            places + shift, row, marker=mark, color=BLUE, edgecolor="white", s=60, zorder=2, label=f"seed {seed}"
        )
    axes.axhline(mean[-1] - 0.03, color=ORANGE, linestyle="--", label="0.03 below none")
    axes.axhline(untrained, color=GREY, linestyle=":", linewidth=2, label="other sites' network, not trained here")
    axes.set_xticks(places, list(PLACES.values()))
    axes.set_xlabel(f"epsilon of a patient (delta {DELTA:.5f}, {PATIENTS:,} patients)")
    axes.set_ylabel("macro-AUC on held-out patients")
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.legend(facecolor="white", edgecolor="none", framealpha=1, loc="upper left")
    return figure


def _auc(figures: list[dict[str, Any]], seed: int, way: str, target: float | None = None) -> float:
    return next(f["auc"] for f in figures if (f["seed"], f["way"], f.get("target")) == (seed, way, target))


def main() -> None:
    source, picture = sys.argv[1:]
    draw([json.loads(line) for line in Path(source).read_text().splitlines()]).savefig(picture)


if __name__ == "__main__":
    main()
