"""Plots and example images of the report, as data URIs; drawn without a display."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, Final

import cv2
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rin.server.bench.summary import MEASURES, RoundFacts, Summary

Grey = npt.NDArray[np.uint8]

INK, RULE, RANDOM = "#1d2733", "#d8dee6", "#a3adb8"
# Okabe and Ito's palette: told apart by readers with any colour vision, and by their grey in print.
COLOURS: Final = ("#0b62a8", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKS: Final = ("o", "s", "^", "D", "v", "P")
LEARNING: Final = {"loss": "training loss", "top1": "top-1 accuracy", "top5": "top-5 accuracy"}
TRUTH, PREDICTED = (120, 220, 255), (255, 150, 60)  # RGB of the two outlines

STYLE: Final[Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e9edf2",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "rin",
    "text.parse_math": False,  # a name with dollar signs is a name
}


def svg(figure: Figure) -> str:
    """`figure` as a data URI; the same figure gives the same bytes."""
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.06)
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def _picture(image: Grey) -> str:
    """Grey as PNG, colour (RGB) as JPEG, which takes a fifth of the space where an image is noisy."""
    if image.ndim == 2:
        kind, (ok, data) = "png", cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    else:
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        kind, (ok, data) = "jpeg", cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 88])
    if not ok:
        raise ValueError("the picture cannot be encoded")
    return f"data:image/{kind};base64," + base64.b64encode(data.tobytes()).decode()


def bars(summary: Summary, kind: str) -> str | None:
    """Bars with intervals, and a dot a seed, for the tasks of `kind`; None where there are none."""
    tasks = [task for task in summary.tasks if task.kind == kind]
    if not tasks:
        return None
    names = [checkpoint.name for checkpoint in summary.checkpoints]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 2.1 * len(tasks) + 0.5 * len(tasks) * (len(names) - 1), 3.1))
        axes = figure.add_subplot()
        for place, task in enumerate(tasks):
            scores = {score.checkpoint: score.comparison for score in summary.scores if score.task == task.name}
            first = scores[names[0]]
            rows = [("random weights", RANDOM, first.random, first.random_seeds)]
            for i, name in enumerate(names):
                rows.append((name, COLOURS[i % len(COLOURS)], scores[name].checkpoint, scores[name].checkpoint_seeds))
                if scores[name].random != first.random:  # another network has random weights of its own
                    rows.append((f"random, for {name}", RANDOM, scores[name].random, scores[name].random_seeds))
            wide = 0.72 / len(rows)
            for i, (name, colour, interval, seeds) in enumerate(rows):
                x = place + (i - (len(rows) - 1) / 2) * wide
                axes.bar(x, interval.value, wide * 0.9, color=colour, label=name if place == 0 else None)
                spread = [[interval.value - interval.low], [interval.high - interval.value]]
                axes.errorbar(x, interval.value, yerr=np.maximum(spread, 0), color=INK, capsize=4, lw=1.2)
                dots = x + wide * 0.28 * np.linspace(-1, 1, len(seeds) + 2)[1:-1]
                axes.plot(dots, seeds, ".", color="white", markeredgecolor=INK, markeredgewidth=0.7, ms=7)
                axes.annotate(f"{interval.value:.3f}", (x, 0.02), ha="center", va="bottom", color=_on(colour), size=9)
        axes.set_xticks(range(len(tasks)), [task.name for task in tasks])
        axes.set_ylim(0, 1)
        axes.set_xlim(-0.6, len(tasks) - 0.4)
        axes.set_ylabel(MEASURES[tasks[0].kind])
        if kind == "auc":
            axes.axhline(0.5, color=INK, lw=0.8, ls=(0, (4, 3)))
            axes.annotate("chance", (len(tasks) - 0.4, 0.5), ha="right", va="bottom", size=8)
        figure.legend(loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.06), handlelength=1, handleheight=1)
        return svg(figure)


def _on(colour: str) -> str:
    return INK if colour == RANDOM else "white"


def learning_curves(rounds: Sequence[RoundFacts]) -> list[tuple[str, str]]:
    """(caption, data URI) of every metric in `LEARNING` that the sites sent: one line a site over the rounds."""
    sites = sorted({site.site for facts in rounds for site in facts.sites})
    found = []
    for metric, caption in LEARNING.items():
        points = {
            site: [
                (r.number, s.metrics[metric]) for r in rounds for s in r.sites if s.site == site and metric in s.metrics
            ]
            for site in sites
        }
        if not any(points.values()):
            continue
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(4.6, 3.0))
            axes = figure.add_subplot()
            for index, (site, values) in enumerate(points.items()):
                x, y = zip(*values, strict=True) if values else ((), ())
                colour, mark = COLOURS[index % len(COLOURS)], MARKS[index % len(MARKS)]
                axes.plot(x, y, label=site, lw=1.8, ms=5, color=colour, marker=mark)
            axes.set_xlabel("round")
            axes.set_ylabel(caption)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(handlelength=1.6, fontsize=9)
            found.append((caption, svg(figure)))
    return found


def plain(image: Grey) -> str:
    """`image` (h, w) as a data URI."""
    return _picture(image)


def outlined(image: Grey, *, truth: Grey, predicted: Grey | None, scale: int = 2) -> str:
    """`image` (h, w) enlarged, with the outlines of the two masks (any size, 0 or 1), as a data URI."""
    side = (image.shape[1] * scale, image.shape[0] * scale)
    rgb = cv2.cvtColor(cv2.resize(image, side, interpolation=cv2.INTER_CUBIC), cv2.COLOR_GRAY2RGB)
    for mask, colour in ((truth, TRUTH), (predicted, PREDICTED)):
        if mask is not None:
            smooth = cv2.resize(mask.astype(np.float32), side, interpolation=cv2.INTER_LINEAR) > 0.5
            outlines, _ = cv2.findContours(smooth.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(rgb, outlines, -1, colour, scale, cv2.LINE_AA)
    return _picture(np.asarray(rgb, np.uint8))
