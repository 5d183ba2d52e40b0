"""A small home that is ready to train, as a factory: real catalog, cache, keys, site file, accepted plan."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rin.client.home import Home
from rin.client.ingest.cache import Cache
from rin.client.ingest.catalog import Catalog, ImageRow
from rin.common import formats, keys
from rin.common.backbones import BACKBONES
from rin.common.files import write_atomic
from rin.common.labels import label_set, label_set_digest
from rin.common.plan import Plan, parse_plan
from rin.common.wire import Request
from tests.simulator import TINY

RUN = "ab" * 16
PLAN = """
protocol = 1
name = "small"
label-set = "{labels}"
[sites]
siteA = 1.0
siteB = 1.0
siteC = 1.0
[model]
backbone = "resnet18"
image-size = 32
[training]
rounds = 3
local-steps = {steps}
batch-size = 8
learning-rate = 0.01
"""
SITE = """
site = "{site}"
[labels]
declared = {declared}
[device]
name = "cpu"
disk-reserve-gib = 0.0
[policy]
privacy = "none"
none-agreed-by = "a test"
none-agreed-on = "2026-11-23"
metrics = ["loss", "top1", "images"]
"""


@dataclass(frozen=True, slots=True)
class SmallSite:
    """One home and its plan; `base` is the digest of global weights that lie in its inbox."""

    home: Home
    plan: Plan
    plan_bytes: bytes
    base: str

    def request(self, number: int = 1, **changes: Any) -> Request:
        plan = hashlib.sha256(self.plan_bytes).hexdigest()
        facts = {"run": RUN, "round": number, "site": "siteA", "plan": plan, "base": self.base, "deadline_s": 600.0}
        return Request.model_validate(facts | changes)


def ingest_small(home: Home, rows: list[int], patients: int) -> None:
    """Two images a patient, whose stripes tell the label."""
    rng = np.random.default_rng(7)
    catalog, cache = Catalog(home.catalog), Cache(home.cache, slots=0)
    for patient in range(patients):
        for frame in range(2):
            label = rows[patient % len(rows)]
            stripes = np.sin(np.arange(256) * (0.1 + 0.2 * (patient % len(rows)))) * 60 + 120
            image = np.clip(stripes[:, None] + rng.normal(0, 20, (256, 256)), 0, 255).astype(np.uint8)
            digest = hashlib.sha256(image.tobytes()).digest()
            who = hashlib.sha256(f"p{patient}".encode()).digest()
            row = ImageRow(
                patient=who,
                study=who,
                series=who,
                instance=digest,
                frame=frame,
                modality="MR",
                anatomy="knee",
                split="train",
                digest=digest,
                policy="x",
                rows=256,
                cols=256,
                bits=8,
                photometric="MONOCHROME2",
                syntax="x",
                lossy=False,
                labels=(label,),
            )
            slot = cache.append([image.tobytes()])
            catalog.add_image(b"k", row, slot=slot)
    catalog.set_meta("slots", str(cache.slots))
    catalog.commit()
    catalog.close()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`TINY` in place of resnet18, for readers of weight files too."""
    monkeypatch.setitem(BACKBONES, "resnet18", TINY)
    formats._shapes.cache_clear()
    yield
    formats._shapes.cache_clear()


@pytest.fixture(scope="session")
def plan_bytes() -> bytes:
    """The small plan as `small_site()` makes it."""
    return PLAN.format(labels=label_set_digest(), steps=8).encode()


@pytest.fixture(scope="session")
def global_weights(tmp_path_factory: pytest.TempPathFactory, plan_bytes: bytes) -> Path:
    """Weights of the small plan's network, named by their digest."""
    from rin.common import backbones, weights

    network = backbones.initial(parse_plan(plan_bytes).model, 1)
    path = tmp_path_factory.mktemp("weights") / "x"
    return path.rename(path.with_name(weights.save(path, network, weights.layout_of(network))))


@pytest.fixture
def small_site(tmp_path: Path, global_weights: Path) -> Callable[..., SmallSite]:
    """`small_site(plan=..., site=..., steps=8, ...)`; the texts are appended to the files."""

    def make(
        *, plan: str = "", site: str = "", steps: int = 8, patients: int = 24, accepted: bool = True, name: str = "home"
    ) -> SmallSite:
        home = Home(tmp_path / name)
        rows = [label.index for label in label_set() if label.anatomy == "knee"][:3]
        names = [label_set()[row].name for row in rows]
        data = (PLAN.format(labels=label_set_digest(), steps=steps) + plan).encode()
        text = SITE.format(site="siteA", declared=names).replace("'", '"') + site
        write_atomic(home.site_toml, text.encode())
        keys.save_private(home.keys / "signing.key", keys.make_signing_key())
        if accepted:
            write_atomic(home.accepted / f"{hashlib.sha256(data).hexdigest()}.toml", data)
        if patients:
            ingest_small(home, rows, patients)
        home.inbox.mkdir(parents=True)
        shutil.copyfile(global_weights, home.inbox / global_weights.name)
        return SmallSite(home, parse_plan(data), data, global_weights.name)

    return make
