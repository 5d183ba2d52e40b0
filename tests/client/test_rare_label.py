"""A rare label's only patient: nothing that leaves a site tells whether it exists, beyond the mechanism."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from rin.client.ledger import site_ledger
from rin.client.trainer import Progress, Trainer
from rin.common import keys, private
from rin.common.errors import RefusedError
from rin.common.files import read_json
from rin.common.ledger import debits
from rin.common.weights import read_facts
from rin.common.wire import SignedRefusal, from_bytes
from tests.private_consortium import POLICY, ROWS, consortium, request_of
from tests.simulator import Consortium, quicken

RARE: Final = ROWS[-1]  # no other patient of any site has it
PATIENTS: Final = 60  # of a site, the rare one included; it is the last in canonical order
STILL: Final = {"flip": "never", "shift": 0.0, "brightness": 0.0}  # nothing is augmented
DIGEST: Final = re.compile(r"[0-9a-f]{32,}|ecdsa-\S+ \S+")  # a node's key as well
TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+(\+00:00|Z)?")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def plant(made: Consortium, *, there: bool, images: int = 2, split: str = "train", alone: bool = False) -> None:
    """Make the last patient of siteA the only one with the rare label, or take it away.

    Args:
        images: how many it has; they were those of others before.
        alone: nobody else is left.
    """
    for name, home in made.homes.items():
        with sqlite3.connect(home.catalog) as db:
            db.execute("UPDATE image_labels SET label = ? WHERE label = ?", (ROWS[0], RARE))
            if name != "siteA":
                continue
            last, first = db.execute("SELECT max(patient), max(id) - ? FROM images", (images - 1,)).fetchone()
            db.execute("UPDATE images SET patient = ?, split = ? WHERE id >= ?", (last, split, first))
            db.execute("UPDATE image_labels SET label = ? WHERE image >= ?", (RARE, first))
            gone = [] if there else [">="]
            for side in [*gone, "<"] if alone else gone:
                db.execute(f"DELETE FROM image_labels WHERE image {side} ?", (first,))
                assert db.execute(f"DELETE FROM images WHERE id {side} ?", (first,)).rowcount


def scrubbed(value: Any) -> Any:
    """What is left of JSON without digests, signatures, clock, run times, and norms, which are of the weights."""
    if isinstance(value, dict):
        return {
            TIME.sub("TIME", DIGEST.sub("HEX", key)): scrubbed(each)
            for key, each in value.items()
            if key not in ("seconds", "elapsed_s", "signature", "norm")
        }
    if isinstance(value, list):
        return [scrubbed(each) for each in value]
    return TIME.sub("TIME", DIGEST.sub("HEX", value)) if isinstance(value, str) else value


def lines(path: Path) -> list[Any]:
    return [scrubbed(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def held(root: Path) -> Iterator[tuple[Any, ...]]:
    """Every file below `root`: name, size and mode; of JSON the content, of weights which rows are 0, and the facts."""
    for path in sorted(root.rglob("*")):
        if not path.is_file():
            continue
        name, facts = DIGEST.sub("HEX", str(path.relative_to(root))), path.stat()
        if path.suffix == ".json":
            yield name, oct(facts.st_mode), repr(scrubbed(opened(read_json(path))))
        elif path.suffix == ".jsonl":
            yield name, repr(lines(path))
        elif path.suffix == ".safetensors":
            told = scrubbed(read_facts(path)) if "checkpoint" in name else None
            still = {key: (value == 0).reshape(len(value), -1).all(axis=1) for key, value in load_file(path).items()}
            rows = sorted((key, np.flatnonzero(each).tolist()) for key, each in still.items())
            yield name, oct(facts.st_mode), facts.st_size, repr(told), repr(rows)
        else:
            yield name, oct(facts.st_mode), facts.st_size


def opened(value: Any) -> Any:
    """A signed paper with its manifest as JSON."""
    if isinstance(value, dict) and isinstance(value.get("manifest"), str):
        paper = keys.decode(value["manifest"])
        assert paper is not None
        return value | {"manifest": json.loads(paper)}
    return value


def all_that_leaves(made: Consortium) -> list[Any]:
    """What the coordinator holds after the run, what lies between, what the site wrote down as having left."""
    home = made.homes["siteA"]
    files = sorted([*held(made.run.root), *held(home.outbox)], key=repr)  # some are named by what is in them
    told = [*files, lines(home.egress_log), lines(home.vault_log / "events.jsonl")]
    spent = [debit.model_dump(exclude={"attempt", "request"}) for debit in debits(site_ledger(home).entries())]
    return [*told, spent, read_json(home.budget), Trainer(home).hello()]


@pytest.mark.parametrize("where", [{}, {"images": 40}, {"split": "val"}])
def test_nothing_that_leaves_tells_whether_the_patient_exists(tmp_path: Path, where: dict[str, Any]) -> None:
    """Whole runs with and without: the numbers of weights are the mechanism's; all other things are equal."""
    found = []
    for there in (True, False):
        made = consortium(tmp_path / str(there), training={"rounds": 2})
        plant(made, there=there, **where)
        made.go()
        found.append(all_that_leaves(made))
    assert len(found[0]) > 20
    for with_it, without in zip(*found, strict=True):
        assert with_it == without


def asked(made: Consortium) -> tuple[list[Progress], str, Any]:
    """The progress that siteA tells about a first request, its code, and what is signed with a refusal."""
    request, told = request_of(made), list[Progress]()
    code, note = "", None
    try:
        Trainer(made.homes["siteA"]).train(request, made.run.plan.read_bytes(), told.append, lambda: "")
    except RefusedError as error:
        code, note = error.code, scrubbed(from_bytes(SignedRefusal, error.note).refusal.model_dump())
    return told, code, note


@pytest.mark.parametrize("policy", [POLICY, POLICY.replace("epsilon = 50.0", "epsilon = 0.01")])
@pytest.mark.parametrize("alone", [True, False])
def test_a_site_answers_alike_whether_or_not_somebody_is_there(tmp_path: Path, policy: str, alone: bool) -> None:
    """Also where nobody else is: no code says that there are no data."""
    found = []
    for there in (True, False):
        made = consortium(tmp_path / str(there), policy=policy)
        plant(made, there=there, alone=alone)
        found.append((asked(made), *held(made.homes["siteA"].outbox), lines(made.homes["siteA"].egress_log)))
    assert found[0] == found[1]
    assert found[0][0][1] == ("budget" if "0.01" in policy else "")


class Known:
    """Randomness that the test knows, in place of the mechanism's: what is drawn is the same with and without.

    Attributes:
        drawn: whether the rare patient is.
    """

    drawn = False

    def __init__(self) -> None:
        self._draws, self._noise = np.random.default_rng(1), np.random.default_rng(2)

    def seed(self) -> int:
        return 7

    def chosen(self, count: int, rate: float) -> npt.NDArray[np.int64]:
        others = np.flatnonzero(self._draws.random(PATIENTS - 1) < rate)
        return np.append(others, PATIENTS - 1) if self.drawn and count == PATIENTS else others

    def some(self, count: int, most: int) -> npt.NDArray[np.int64]:
        return np.arange(min(count, most))

    def normals(self, count: int) -> npt.NDArray[np.float32]:
        return self._noise.standard_normal(count, np.float32)


def update_of(root: Path, *, there: bool, **tables: Any) -> dict[str, npt.NDArray[np.float32]]:
    made = consortium(root, **tables)
    plant(made, there=there)
    assert asked(made)[1] == ""
    (path,) = made.homes["siteA"].outbox.glob("*.safetensors")
    return load_file(path)


def test_a_patient_who_is_not_drawn_leaves_no_trace_in_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: no class set, prior, weight or number of patients comes from the catalog."""
    monkeypatch.setattr(private, "Source", Known)
    without, with_it = (update_of(tmp_path / str(there), there=there) for there in (False, True))
    assert without.keys() == with_it.keys()
    for name, values in without.items():
        assert values.tobytes() == with_it[name].tobytes()
    bias = next(values for name, values in without.items() if name.endswith("head.bias"))
    assert (bias[list(ROWS)] != 0).all()  # the rare label's row has its noise as well
    assert not np.delete(bias, list(ROWS)).any()


def test_a_patient_who_is_drawn_moves_the_weights_by_a_clip_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "Source", Known)
    monkeypatch.setattr(Known, "drawn", True)
    tables = {"training": {"rounds": 1, "local_steps": 1, "learning_rate": 1.0}, "augment": STILL}
    clip = 0.01  # below what a gradient has here
    tables["privacy"] = {"clip": clip}
    without, with_it = (update_of(tmp_path / str(there), there=there, **tables) for there in (False, True))
    moved = np.sqrt(sum(np.square(with_it[name] - values, dtype=np.float64).sum() for name, values in without.items()))
    assert moved == pytest.approx(clip / 6, rel=1e-3)  # over the patients that a step expects
