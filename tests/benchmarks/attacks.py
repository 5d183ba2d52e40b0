"""The attack report: `python -m tests.benchmarks.attacks [--out DIR] [--image FILE ...]`, a quarter of an hour.

Draws attacks-inversion.png and attacks-membership.png and prints the figures of docs/attacks.md. It decides nothing.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import cv2
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rin.server.bench.plots import COLOURS, INK, MARKS, STYLE
from tests.benchmarks import inversion, membership
from tests.benchmarks.patients import Held, Pixels

BUDGETS: Final = (8.0, 1.0)  # of membership inference; privacy off comes first
LINES: Final = ("-", "--", ":")
DPI: Final = 110
LEAST: Final = 5e-3  # rate where the axes begin: fewer false alarms are too few to count on
# What the columns of the picture are called, and the rows of the table.
CAPTIONS: Final = {
    "guess": ("no update:", "mean of other patients", "of the same label"),
    "curious": ("OFF", "one patient, one step,", "random weights"),
    "alone": ("OFF", "one patient, one step,", "crafted weights"),
    "among": ("OFF", "20 patients, 8 steps,", "crafted weights"),
    "picked": ("OFF", "20 patients, 8 steps,", "crafted to pick a label"),
    "private": ("ON, epsilon 8", "one patient, one step,", "crafted weights"),
}
PANELS: Final = {"last weights": "from the last weights", "every round": "from the weights of every round"}


def draw_inversion(held: Held, attempts: Sequence[inversion.Attempt], path: Path) -> None:
    """One row a patient: the image, then what each attack made of it."""
    count = len(inversion.LABELS)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.5 * (len(attempts) + 1), 1.72 * count + 0.5))
        grid = figure.subplots(count, len(attempts) + 1, squeeze=False)
        for row in range(count):
            _picture(grid[row, 0], held.pixels[row] / 255, inversion.LABELS[row].replace("_", " "))
            for column, attempt in enumerate(attempts, 1):
                under = f"{attempt.psnr[row]:.1f} dB, SSIM {max(0.0, attempt.ssim[row]):.2f}"
                _picture(grid[row, column], attempt.pictures[row], under)
        grid[0, 0].set_title("the patient's\nimage", fontsize=8, fontweight="bold")
        for column, attempt in enumerate(attempts, 1):
            grid[0, column].set_title("\n".join(CAPTIONS[attempt.name]), fontsize=8, fontweight="bold")
        figure.tight_layout(pad=0.4, h_pad=0.6, w_pad=0.3)
        _save(figure, path, grey=True)


def _picture(axes: Axes, image: np.ndarray, under: str) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.set_xlabel(under, fontsize=7.5, labelpad=2)


def draw_membership(found: Mapping[str, Mapping[str, membership.Found]], path: Path) -> None:
    """A panel an attack, both axes logarithmic: what counts is who is found among few false alarms."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.4, 5.2))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (attack, title) in zip(panels, PANELS.items(), strict=True):
            _curves(axes, {name: attacks[attack] for name, attacks in found.items()})
            axes.set_title(title, fontsize=10.5, fontweight="bold")
        panels[0].set_ylabel("true positive rate: patients found")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=9, handlelength=3)
        figure.tight_layout(rect=(0, 0.1, 1, 1))
        _save(figure, path)


def _curves(axes: Axes, found: Mapping[str, membership.Found]) -> None:
    false = np.logspace(np.log10(LEAST), 0, 300)
    for place, (name, result) in enumerate(found.items()):
        axes.step(*result.curve, where="post", color=COLOURS[place], lw=2, ls=LINES[place], label=name)
        text, at = f"{name}: AUC {result.auc:.2f}", (0.97, 0.17 - 0.055 * place)
        axes.annotate(text, at, xycoords="axes fraction", ha="right", color=COLOURS[place], size=9.5)
    for place, budget in enumerate(BUDGETS, 1):
        most, label = membership.accounted(false, budget), f"most that epsilon {budget:g} allows"
        axes.plot(false, most, color=COLOURS[place], lw=1, marker=MARKS[place], markevery=60, ms=4, label=label)
    axes.plot(false, false, color=INK, lw=0.8, ls=(0, (1, 3)), label="chance")
    axes.set(xscale="log", yscale="log", xlim=(LEAST, 1), ylim=(LEAST, 1.1), xlabel="false positive rate: false alarms")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:g} %")


def _save(figure: Figure, path: Path, *, grey: bool = False) -> None:
    """`figure` as PNG; in one channel a third of the bytes."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    canvas.draw()
    image = cv2.cvtColor(np.asarray(canvas.buffer_rgba()), cv2.COLOR_RGBA2GRAY if grey else cv2.COLOR_RGBA2BGR)
    cv2.imwrite(str(path), image, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


def print_inversion(attempts: Sequence[inversion.Attempt]) -> None:
    print(
        f"\nsigma {inversion.mechanism().sigma:.2f}\n\n| attack | PSNR, dB | SSIM | place of 101 |\n|---|---|---|---|"
    )
    for attempt in attempts:
        decibels, alike = attempt.psnr, attempt.ssim
        spread = f"{np.mean(decibels):.1f} ({min(decibels):.1f}-{max(decibels):.1f})"
        places = ", ".join(map(str, attempt.place))
        print(f"| {' '.join(CAPTIONS[attempt.name])} | {spread} | {np.mean(alike):.2f} | {places} |")


def print_membership(seen: Sequence[membership.Watched], found: Mapping[str, Mapping[str, membership.Found]]) -> None:
    print("\n| training | accuracy | attack | AUC | TPR at 1 % FPR | allowed |\n|---|---|---|---|---|---|")
    for trained, budget in zip(seen, (None, *BUDGETS), strict=True):
        at = np.array([membership.FPR])
        most = "" if budget is None else f"{membership.accounted(at, budget)[0]:.3f}"
        for attack, result in found[trained.name].items():
            auc = f"{result.auc:.3f} ({result.auc_interval[0]:.3f}-{result.auc_interval[1]:.3f})"
            tpr = f"{result.tpr:.3f} ({result.tpr_interval[0]:.3f}-{result.tpr_interval[1]:.3f})"
            print(f"| {trained.name} | {trained.right:.2f} | {attack} | {auc} | {tpr} | {most} |")
    for trained in seen:
        wrong, right = membership.found_by_label(trained)
        print(
            f"{trained.name}: TPR {wrong:.2f} of wrong labels ({trained.wrong.sum()} patients), {right:.2f} of others"
        )
    for budget in BUDGETS:
        print(f"epsilon {budget:g}: sigma {membership.mechanism(budget).sigma:.2f}")


def opened(path: Path) -> Pixels:
    """A picture of one's own as the network sees it: grey, a square from the middle, uint8."""
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise SystemExit(f"{path} is no picture")
    side = min(image.shape)
    top, left = ((length - side) // 2 for length in image.shape)
    square = image[top : top + side, left : left + side]
    size = (inversion.SIDE, inversion.SIDE)
    return np.asarray(cv2.resize(square, size, interpolation=cv2.INTER_AREA), np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where the pictures go")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="in place of a phantom; membership is left out then"
    )
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", force=True
    )  # a library has made a handler
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    held = inversion.patients([opened(path) for path in options.image])
    attempts = inversion.attempts(held)
    draw_inversion(held, attempts, options.out / "attacks-inversion.png")
    print_inversion(attempts)
    if options.image:
        return
    seen = membership.watched(BUDGETS)
    found = {trained.name: membership.attacks(trained) for trained in seen}
    draw_membership(found, options.out / "attacks-membership.png")
    print_membership(seen, found)


if __name__ == "__main__":
    main()
