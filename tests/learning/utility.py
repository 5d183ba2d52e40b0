"""The trainings of the test of what privacy costs, as functions for child processes that meet in one directory.

Every training is `rin-client train`: a home with 2,000 phantom patients of four images, a plan, a start, a folder out.
A private one debits the home's ledger and is held to the ceiling in its site.toml. No two sets share a patient.

others(root)                     a network trained on patients of the other two sites
patients(root, seed)             the site's home and its test patients, in root/<seed>/
trained(root, seed, way, target) one training and its figures
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import cv2
import numpy as np
import numpy.typing as npt

from rin.client import alone
from rin.client.data import TrainingData
from rin.client.home import Home
from rin.client.ingest.pseudonyms import site_pseudonyms
from rin.client.ledger import site_ledger
from rin.common import fit
from rin.common.accountant import Row, epsilon
from rin.common.backbones import BACKBONES, Network, build, initial
from rin.common.files import write_atomic
from rin.common.labels import label_index, label_set
from rin.common.metrics import log_softmax, macro_auc
from rin.common.plan import Model, parse_plan
from rin.common.weights import layout_of, read_facts, read_into, save
from rin.server.bench import protocol
from rin.server.phantom import SITES, draw
from tests import simulator
from tests.learning import jobs, setup

SITE: Final = "siteA"
OTHERS: Final = ("siteB", "siteC")  # whose patients the frozen features come from
PATIENTS: Final = 2000  # of the site, for training: N
IMAGES: Final = 4  # of each patient
TEST: Final = 500  # patients
BEFORE: Final = 1000  # patients of each other site
BEFORE_STEPS: Final = 2000  # of 32 images
DELTA: Final = PATIENTS**-1.1
DRAWN: Final = 400  # patients in a private step, expected: the largest share of N that a site.toml allows by itself
STEPS: Final = 25  # private steps
SEEN: Final = STEPS * DRAWN * IMAGES  # images seen by every training, in expectation where it is private
BATCH: Final = 32  # of a training that is not private
NETWORK_SIDE: Final = 64
NETWORK: Final = setup.shallow((24, 48, 96, 96), NETWORK_SIDE)  # in place of resnet18, with group norm
ROWS: Final = sorted(label_index()[label] for label in SITES[SITE].labels)
Way = Literal["head", "fine-tune", "pretrain"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one way of training steps; a clip of 1 throughout, for once all are clipped only rate times clip counts."""

    learning_rate: float
    optimizer: str = "sgd"


FREEZE: Final[dict[Way, str]] = {"head": "head", "fine-tune": "none", "pretrain": "none"}
# Each the best of three to six rates on the patients of a seed of their own (100), which no figure comes from: those
# stand for public data, on which choosing costs no privacy. Target None: not private.
RECIPES: Final[dict[tuple[Way, float | None], Recipe]] = {
    ("head", None): Recipe(0.01, "adamw"),
    ("head", 8.0): Recipe(1.0),
    ("head", 3.0): Recipe(1.2),
    ("head", 1.0): Recipe(0.4),
    ("fine-tune", None): Recipe(0.003, "adamw"),
    ("fine-tune", 8.0): Recipe(0.2),
    ("pretrain", None): Recipe(0.001, "adamw"),
    ("pretrain", 8.0): Recipe(0.5),
}


@functools.cache
def sigma_for(target: float) -> float:
    """The least noise, in thousandths of a clip norm, with which all steps together claim at most `target`."""
    low, high = 300, 30_000
    while low < high:
        middle = (low + high) // 2
        if epsilon([Row(middle / 1000, DRAWN / PATIENTS, STEPS)], DELTA) <= target:
            high = middle
        else:
            low = middle + 1
    return high / 1000


def plan_bytes(seed: int, way: Way, target: float | None) -> bytes:
    """One round; what a step does to an image is the plan's default."""
    recipe = RECIPES[way, target]
    training = {
        "rounds": 1,
        "local_steps": SEEN // BATCH,
        "batch_size": BATCH,
        "optimizer": recipe.optimizer,
        "learning_rate": recipe.learning_rate,
        "weight_decay": 0.0,
        "seed": seed,
        "freeze": FREEZE[way],
    }
    if target is None:
        return _plan(training)
    privacy = {
        "mode": "patient",
        "sigma": sigma_for(target),
        "clip": 1.0,
        "patients": DRAWN,
        "images": IMAGES,
        "delta": DELTA,
    }
    return _plan({**training, "local_steps": STEPS}, privacy=privacy).replace(b"[sites]", b"metrics = []\n[sites]", 1)


def _plan(training: dict[str, Any], **tables: dict[str, Any]) -> bytes:
    model = {"image_size": NETWORK_SIDE, "norm": "group"}
    limits = {"min_sites": 1, "quorum": 1}
    return simulator.plan_text([SITE], model=model, training=training, limits=limits, **tables)


def drawn(site: str, count: int, seed: int) -> simulator.Images:
    """`count` patients as `rin-server demo` draws them: one modality, a main finding on about two images of three."""
    cv2.setNumThreads(1)
    row = SITES[site]
    pixels, labels = np.zeros((count * IMAGES, jobs.SIDE, jobs.SIDE), np.uint8), []
    for patient in range(count):
        rng = np.random.default_rng([seed, sorted(SITES).index(site), patient])
        modality = str(rng.choice(sorted(row.scanners)))
        known = [label for label in row.labels if label.startswith(modality)]
        primary = str(rng.choice(known))
        for _ in range(IMAGES):
            label = primary if rng.random() < 0.55 else str(rng.choice(known))
            pixels[len(labels)] = jobs.padded(draw(label, rng, row.scanners[modality]))
            labels.append((label_index()[label],))
    return simulator.Images(pixels, labels, of_patient=IMAGES)


def others(root: Path) -> None:
    """The network of `rin-client train` on the patients of the other sites together, in root/others.safetensors."""
    BACKBONES["resnet18"] = NETWORK
    folder = root / "others"
    images = [drawn(site, BEFORE, 7) for site in OTHERS]
    rows = sorted({row for part in images for (row,) in part.labels})
    training = {
        "rounds": 1,
        "local_steps": BEFORE_STEPS,
        "batch_size": BATCH,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "warmup_steps": BEFORE_STEPS // 10,
    }
    plan = _plan(training)
    simulator.make_home(Home(folder), SITE, images, rows, plan)
    alone.train(Home(folder), plan, root / "out").replace(root / "others.safetensors")
    shutil.rmtree(folder)
    shutil.rmtree(root / "out")


def patients(root: Path, seed: int) -> None:
    """The site's home with ingested patients, and the test patients' images and labels."""
    folder = root / str(seed)
    simulator.make_home(
        Home(folder / "home"), SITE, [drawn(SITE, PATIENTS, seed)], ROWS, plan_bytes(seed, "head", None)
    )
    test = drawn(SITE, TEST, 1000 + seed)
    np.save(folder / "test.npy", test.pixels)
    np.save(folder / "test_labels.npy", np.array([row for (row,) in test.labels]))


def trained(root: Path, seed: int, way: Way, target: float | None) -> dict[str, Any]:
    """Macro-AUC on the test patients after one training, and what was claimed and spent for it."""
    BACKBONES["resnet18"] = NETWORK
    folder = root / str(seed) / f"{way}-{target}"
    plan = plan_bytes(seed, way, target)
    home = _linked(Home(root / str(seed) / "home"), Home(folder / "home"), target)
    start = None if way == "pretrain" else _start(root, folder / "start.safetensors", seed)
    network = build(parse_plan(plan).model)
    said = None if start is None else "symmetric"  # the wire's file does not say its normalisation
    checkpoint = alone.train(home, plan, folder / "out", weights=start, normalisation=said)
    read_into(network, checkpoint)
    found = {"seed": seed, "way": way, "target": target, "auc": auc(network, root, seed)}
    if target is not None:
        found |= _spent(network, checkpoint, way, target)
    shutil.rmtree(folder)
    return found


def _linked(shared: Home, home: Home, target: float | None) -> Home:
    """The same patients once more as a population that has spent nothing; the cache's files are shared."""
    shutil.copytree(shared.root, home.root, copy_function=os.link)
    policy = f"[policy]\npatients = {PATIENTS}\ndelta = {DELTA!r}\nepsilon = {target or 1.0}\n"
    text = home.site_toml.read_text()
    write_atomic(home.site_toml, (text[: text.index("[policy]")] + policy).encode())
    site_pseudonyms(home.pseudonym_key, create=True)
    site_ledger(home).create()
    return home


def _start(root: Path, path: Path, seed: int) -> Path:
    """A weight file with the backbone of the other sites and a head of random weights."""
    network = fresh(root, seed)
    save(path, network, layout_of(network))
    return path


def fresh(root: Path, seed: int) -> Network:
    """The backbone of the other sites under a head of random weights."""
    BACKBONES["resnet18"] = NETWORK
    model = Model.model_validate({"backbone": "resnet18", "image-size": NETWORK_SIDE, "norm": "group"})
    network, before = initial(model, seed), build(model)
    read_into(before, root / "others.safetensors")
    network.backbone.load_state_dict(before.backbone.state_dict())
    return network


def _spent(network: Network, checkpoint: Path, way: Way, target: float) -> dict[str, float]:
    """The site's claim; and the norm of a step's noise over the clip, both on the mean of the expected patients.

    All rows of the head get noise; those of undeclared labels come back as they were, so `ratio_declared` leaves them
    out.
    """
    claim = read_facts(checkpoint)["privacy_sites"][SITE]
    sigma = sigma_for(target)
    head, row = sum(p.numel() for p in network.head.parameters()), network.width + 1
    backbone = 0 if way == "head" else sum(p.numel() for p in network.backbone.parameters())
    return {
        "epsilon": claim["epsilon"],
        "sigma": sigma,
        "ratio": sigma * math.sqrt(backbone + head) / DRAWN,
        "ratio_declared": sigma * math.sqrt(backbone + row * len(ROWS)) / DRAWN,
    }


def auc(network: Network, root: Path, seed: int) -> float:
    """Macro-AUC of the network's own head on the test patients, every label against its modality and anatomy."""
    logits = fit.infer(network.eval(), np.load(root / str(seed) / "test.npy", mmap_mode="r"), device=jobs.CPU)
    return _macro(log_softmax(logits, ROWS), root, seed)


def untrained(root: Path, seed: int) -> dict[str, Any]:
    """What the other sites' network reaches at the site without any training there, by the head it came with."""
    network = fresh(root, seed)
    read_into(network, root / "others.safetensors")
    return {"seed": seed, "way": "untrained", "auc": auc(network, root, seed)}


def probe(root: Path, seed: int) -> dict[str, Any]:
    """What the frozen features hold: a logistic regression on them, without privacy, to its end."""
    data = TrainingData.open(Home(root / str(seed) / "home"), labels=ROWS, split="train")
    pixels, labels = data.batch(np.arange(len(data)))
    test = np.load(root / str(seed) / "test.npy", mmap_mode="r")
    scores = protocol.linear_probe(fresh(root, seed), pixels, labels.argmax(1), test)
    wide = np.zeros((len(test), len(label_set())))
    wide[:, ROWS] = scores
    return {"seed": seed, "way": "probe", "auc": _macro(wide, root, seed)}


def _macro(scores: npt.NDArray[np.float64], root: Path, seed: int) -> float:
    truth = np.load(root / str(seed) / "test_labels.npy")
    labels = np.zeros(scores.shape, bool)
    labels[np.arange(len(truth)), truth] = True
    return macro_auc(scores, labels).mean
