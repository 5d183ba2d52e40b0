"""An in-process consortium: real homes, trainers, tickets and receipts; files are copied where Flower and HTTPS are.

`python -m tests.simulator RUN` goes on with the run in a process of its own, for tests that kill it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from rin.client.home import Home
from rin.client.ingest.cache import SIDE, Cache
from rin.client.ingest.catalog import Catalog, ImageRow
from rin.client.trainer import Trainer
from rin.common import backbones, keys
from rin.common.errors import RefusedError, RinError
from rin.common.files import read_json, write_atomic, write_json
from rin.common.labels import label_set, label_set_digest
from rin.common.layout import file_digest
from rin.common.plan import Plan, parse_plan, plan_digest
from rin.common.wire import Manifest, Request, SignedRefusal, from_bytes
from rin.server import members, rounds
from rin.server.carrier import FileCarrier
from rin.server.port import Answer
from rin.server.record import Record, last_record, read_record
from rin.server.rundir import RunDir

RUN_ID = "5a" * 16


class Tiny(nn.Module):
    """A backbone of 376 parameters with batch norm, in place of resnet18 where the network does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 4, stride=4, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.fc = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn1(self.conv1(x))).mean((2, 3)))


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """`TINY` in place of resnet18, and a round loop that hardly waits."""
    monkeypatch.setitem(backbones.BACKBONES, "resnet18", TINY)
    hasten(monkeypatch)


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round loop that hardly waits."""
    for name in ("POLL_S", "PORT_S", "LONGEST_S", "PAUSE_S"):
        monkeypatch.setattr(rounds, name, 0.002)
    monkeypatch.setattr(rounds._Asked, "__init__", functools.partialmethod(rounds._Asked.__init__, pause=0.002))


TINY = backbones.BackboneRow(Tiny, 8, (8, 8, 8, 8, 8))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Images:
    """What one site holds: uint8 (n, side, side), the labels of each image, its split, how many a patient has."""

    pixels: npt.NDArray[np.uint8]
    labels: Sequence[tuple[int, ...]]
    split: str = "train"
    of_patient: int = 2


def stripes(rows: Sequence[int], n: int, seed: int) -> Images:
    """`n` images of 32 pixels whose stripes tell the label, one of `rows` in turn."""
    rng = np.random.default_rng(seed)
    kinds = [rows[i % len(rows)] for i in range(n)]
    wave = np.sin(np.arange(32)[None] * (0.2 + 0.25 * (np.array(kinds)[:, None] % 7))) * 60 + 120
    pixels = np.clip(wave[:, None, :] + rng.normal(0, 20, (n, 32, 32)), 0, 255).astype(np.uint8)
    return Images(pixels, [(kind,) for kind in kinds])


def plan_text(sites: Sequence[str], **tables: dict[str, Any]) -> bytes:
    """A plan file; each keyword is a table whose keys (with underscores) replace or extend the defaults here."""
    plan: dict[str, dict[str, Any]] = {
        "model": {"backbone": "resnet18", "image_size": 32},
        "training": {"rounds": 2, "local_steps": 8, "batch_size": 8, "learning_rate": 0.05},
        "strategy": {},
        "limits": {"deadline_s": 60.0},
        "retention": {},
    }
    for name, table in tables.items():
        plan[name] = {**plan.get(name, {}), **table}
    lines = ["protocol = 1", 'name = "simulated"', f'label-set = "{label_set_digest()}"', "[sites]"]
    lines += [f"{site} = {float(1 + i)}" for i, site in enumerate(sites)]
    for name, table in plan.items():
        lines += [f"[{name}]", *(f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines).encode() + b"\n"


def make_home(home: Home, site: str, images: Sequence[Images], declared: Sequence[int], plan: bytes) -> None:
    """A site that has ingested `images`, accepted `plan` and made its keys."""
    names = [label_set()[row].name for row in declared]
    text = f'site = "{site}"\n[labels]\ndeclared = {json.dumps(names)}\n'
    text += '[device]\nname = "cpu"\ndisk-reserve-gib = 0.0\n'
    text += '[policy]\nprivacy = "none"\nnone-agreed-by = "a test"\nnone-agreed-on = "2026-11-23"\nmin-sites = 1\n'
    text += 'metrics = ["loss", "top1", "top5", "images"]\n'
    home.keys.mkdir(parents=True, mode=0o700)
    write_atomic(home.site_toml, text.encode())
    keys.save_private(home.keys / "signing.key", keys.make_signing_key())
    write_atomic(home.accepted / f"{plan_digest(plan)}.toml", plan)
    catalog, cache = Catalog(home.catalog), Cache(home.cache, slots=0)
    count = 0
    for part in images:
        for start in range(0, len(part.pixels), 256):
            chunk = [_full_size(pixels) for pixels in part.pixels[start : start + 256]]
            slot = cache.append([image.tobytes() for image in chunk])
            for i, image in enumerate(chunk):
                row = _row(count, image, part.labels[start + i], part.split, count // part.of_patient)
                catalog.add_image(b"file %d" % count, row, slot=slot + i)
                count += 1
    catalog.set_meta("slots", str(count))
    catalog.commit()
    catalog.close()


def _full_size(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Whole pixels repeated, so that the network's area mean gives back what went in."""
    if pixels.shape == (SIDE, SIDE):
        return pixels
    return np.asarray(cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST), np.uint8)


def _row(number: int, image: npt.NDArray[np.uint8], labels: tuple[int, ...], split: str, owner: int) -> ImageRow:
    label = label_set()[labels[0]]
    patient = b"patient %06d" % owner
    digest = hashlib.sha256(image.tobytes() + b"%d" % number).digest()
    shared = dict.fromkeys(("study", "series"), patient)
    return ImageRow(
        patient=patient,
        instance=b"image %06d" % number,
        frame=0,
        modality=label.modality,
        anatomy=label.anatomy,
        split=split,
        digest=digest,
        policy="test",
        rows=SIDE,
        cols=SIDE,
        bits=8,
        photometric="MONOCHROME2",
        syntax="1.2.840.10008.1.2.1",
        lossy=False,
        labels=labels,
        **shared,
    )


@dataclass
class LocalPort:
    """The port without Flower: each pull lets one trainer work, start to end, and its update travel by `FileCarrier`.

    Attributes:
        away: sites that cannot be reached.
        before: called with (request) before the site begins; it may raise RinError, or return a code to answer with.
        forge: makes another file of the update that a site is about to send; its manifest is signed anew.
        renote: the note that takes the place of the one that comes with an answer.
    """

    run: RunDir
    homes: dict[str, Home]
    away: set[str] = field(default_factory=set)
    before: Callable[[Request], str | None] = lambda request: None
    forge: Callable[[Request, Path], None] | None = None
    relabel: Callable[[Request, Manifest], Manifest] = lambda request, manifest: manifest
    renote: Callable[[Request, SignedRefusal | None], SignedRefusal | None] = lambda request, note: note
    pushed: list[tuple[str, int]] = field(default_factory=list)
    _queue: deque[tuple[str, Request, str, bytes]] = field(default_factory=deque)
    _trainers: dict[str, Trainer] = field(default_factory=dict)

    def sites(self) -> set[str]:
        return set(self.homes) - self.away

    def push(self, site: str, request: Request, ticket: str, plan: bytes) -> None:
        self.pushed.append((site, request.round))
        self._queue.append((site, request, ticket, plan))

    def pull(self) -> list[Answer]:
        if not self._queue:
            return []
        site, request, ticket, plan = self._queue.popleft()
        note = None
        try:
            code = self.before(request)
            if code is None:
                self.work(site, request, ticket, plan)
                code = ""
        except RinError as error:
            code = error.code
            if isinstance(error, RefusedError) and error.note:
                note = from_bytes(SignedRefusal, error.note)
        return [Answer(site, code, self.renote(request, note))]

    def work(self, site: str, request: Request, ticket: str, plan: bytes) -> None:
        """What client/app.py does, with another carrier."""
        home, carrier = self.homes[site], FileCarrier(self.run)
        home.inbox.mkdir(parents=True, exist_ok=True)
        trainer = self._trainers.setdefault(site, Trainer(home))
        for path in home.inbox.iterdir():
            path.unlink()
        carrier.fetch(request.base, ticket, home.inbox / request.base)
        done = trainer.train(request, plan, lambda progress: None, lambda: "")
        facts = read_json(home.outbox / f"{done.request}.json")
        manifest, signature = keys.decode(facts["manifest"]), keys.decode(facts["signature"])
        assert manifest is not None
        assert signature is not None
        path = home.outbox / f"{done.request}.safetensors"
        if self.forge is not None:
            path = home.root / "forged"
            path.write_bytes((home.outbox / f"{done.request}.safetensors").read_bytes())
            self.forge(request, path)
        paper = self.relabel(request, Manifest.model_validate_json(manifest))
        paper = paper.model_copy(update={"update": file_digest(path)})
        if paper.to_bytes() != manifest:
            manifest = paper.to_bytes()
            signature = keys.sign(keys.load_signing_key(home.keys / "signing.key"), paper.signed_bytes())
        carrier.send(request.round, site, ticket, path, manifest, signature)


@dataclass(frozen=True, slots=True)
class Consortium:
    """A run directory and its sites, all admitted."""

    run: RunDir
    plan: Plan
    homes: dict[str, Home]

    def port(self, **options: Any) -> LocalPort:
        return LocalPort(self.run, self.homes, **options)

    def go(self, port: LocalPort | None = None, *, epoch: int = 1) -> LocalPort:
        """Run the rounds to their end with the port, or a plain one; returns it."""
        port = port or self.port()
        rounds.run(self.run, port, epoch=epoch)
        return port


def make(
    root: Path, images: Mapping[str, Sequence[Images]], declared: Mapping[str, Sequence[int]], plan: bytes
) -> Consortium:
    """A consortium below `root`; `images` and `declared` head rows by site."""
    run = RunDir(root / "run")
    write_atomic(run.plan, plan)
    write_json(run.facts, {"run": RUN_ID, "epoch": 1, "address": "https://localhost:1"})
    members.create(run)
    homes = {}
    for site in images:
        homes[site] = Home(root / site)
        make_home(homes[site], site, images[site], declared[site], plan)
        admit(run, site, homes[site])
    return Consortium(run, parse_plan(plan), homes)


def admit(run: RunDir, site: str, home: Home) -> None:
    key = keys.signing_public(keys.load_signing_key(home.keys / "signing.key"))
    members.register(run, site, node_key=keys.node_public(keys.make_node_key()), signing_key=key)


def small(
    root: Path, *, rows: Mapping[str, Sequence[int]] | None = None, n: int = 48, **tables: dict[str, Any]
) -> Consortium:
    """Three sites with stripes; each test changes what it needs. Wants `TINY` in the table of backbones."""
    rows = rows or dict.fromkeys(("siteA", "siteB", "siteC"), (0, 1, 2, 3))
    images = {site: [stripes(own, n, seed)] for seed, (site, own) in enumerate(sorted(rows.items()))}
    return make(root, images, rows, plan_text(sorted(rows), **tables))


def reopened(root: Path) -> Consortium:
    """The consortium that lies below `root`."""
    run = RunDir(root / "run")
    homes = {path.parent.parent.name: Home(path.parent.parent) for path in sorted(root.glob("*/vault/site.toml"))}
    return Consortium(run, parse_plan(run.plan.read_bytes()), homes)


def record_of(made: Consortium, number: int) -> Record:
    record = read_record(made.run, number)
    assert record is not None
    return record


def final(made: Consortium) -> str:
    """Digest of the last weights, of a run that has come to its end."""
    last = last_record(made.run)
    assert last is not None
    assert last.state == "closed"
    assert last.round == made.plan.training.rounds
    assert file_digest(made.run.checkpoint(last.round)) == last.weights
    return last.weights


def rewrite(path: Path, change: Callable[[np.ndarray], Any]) -> None:
    """Change the tensor bytes of the weight file at `path`."""
    data = bytearray(path.read_bytes())
    flat = np.frombuffer(data, "<f4", offset=8 + int.from_bytes(data[:8], "little"))
    change(flat)
    path.write_bytes(bytes(data))


if __name__ == "__main__":
    backbones.BACKBONES["resnet18"] = TINY
    reopened(Path(sys.argv[1])).go()
