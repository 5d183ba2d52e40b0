"""Rounds whose sites measure the global weights on held-out patients, and the closing round that only measures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rin.client.data import TrainingData
from rin.client.site import read_site
from rin.common import evaluate, metrics
from rin.common.backbones import initial
from rin.common.disclosure import published
from rin.common.errors import RefusedError
from rin.common.events import read_events
from rin.common.layout import NOTHING
from rin.common.scores import GroupScores, groups
from rin.common.weights import read_into
from rin.common.wire import Manifest, Request
from rin.server.record import Record, read_record
from rin.server.validation import Validation, summed
from tests.simulator import Consortium, Images, make, plan_text, quicken, record_of, stripes

ROWS = tuple(label.index for label in groups()["CT", "lung"])[:3]
SITES = ("siteA", "siteB", "siteC")
FIGURES = ("validation", "confusion", "auc")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def closed(made: Consortium, number: int) -> Record:
    record = record_of(made, number)
    assert record.state == "closed"
    return record


def mixed(n: int, seed: int) -> Images:
    """Held-out images whose label is often another one than the stripes say: no cell stays empty."""
    base, rng = stripes(ROWS, n, seed), np.random.default_rng(seed)
    labels = [label if rng.random() < 0.5 else (int(rng.choice(ROWS)),) for label in base.labels]
    return replace(base, labels=labels, split="val")


def consortium(root: Path, figures: tuple[str, ...] = FIGURES, **training: Any) -> Consortium:
    metrics = json.dumps(["loss", "images", *figures])
    settings = {"learning_rate": 0.5, "local_steps": 20} | training
    plan = plan_text(SITES, training=settings).replace(b"[sites]", f"metrics = {metrics}\n[sites]".encode())
    images = {site: [stripes(ROWS, 48, i), mixed(240, 10 + i)] for i, site in enumerate(SITES)}
    made = make(root, images, dict.fromkeys(SITES, ROWS), plan)
    for site in SITES:
        allow(made, site, figures)
    return made


def allow(made: Consortium, site: str, figures: tuple[str, ...], **changes: str) -> None:
    path = made.homes[site].site_toml
    text = path.read_text().replace('"loss", "top1", "top5", "images"', ", ".join(f'"{name}"' for name in figures))
    for old, new in changes.items():
        text = text.replace(old, new)
    path.write_text(text)


def central(made: Consortium, number: int) -> tuple[Validation | None, int]:
    """What all held-out images come to at checkpoint `number`, and how many are right, without any wire."""
    network = initial(made.plan.model, 0)
    read_into(network, made.run.checkpoint(number))
    scores, declared, right = {}, {}, 0
    for name, home in made.homes.items():
        site = read_site(home)
        rows = declared[name] = site.labels.rows()
        data = TrainingData.open(home, labels=rows, split="val")
        found = evaluate.evaluate(network, data, made.plan, rows=rows, device=torch.device("cpu"), threads=1)
        seen = metrics.outcomes(found.logits, found.labels, rows, data.patient)
        areas = metrics.macro_auc(metrics.log_softmax(found.logits, rows), seen.labels).by_row
        scores[name] = published(seen, areas, frozenset(FIGURES))
        right += int(found.metrics["top1"])
    return summed(scores, declared, made.plan.sites), right


def kinds(made: Consortium) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((event.kind, event.fields) for event in read_events(made.run.log / "events.jsonl")[0])


def test_every_checkpoint_is_measured_and_the_final_one_in_a_closing_round(tmp_path: Path) -> None:
    made = consortium(tmp_path, rounds=2)
    port = made.go()
    assert port.pushed[-3:] == [(site, 3) for site in SITES]
    for number in (1, 2, 3):
        found = closed(made, number).validation
        expected, right = central(made, number - 1)
        assert found is not None and found == expected
        assert found.images == 720 and found.top1 is not None
        assert found.top1.rough or found.top1.right == right
        assert found.macro_auc is not None and found.balanced is not None
    closing = closed(made, 3)
    assert closing.weights == closing.base == closed(made, 2).weights
    assert {counted.steps for counted in closing.receipts.values()} == {0}
    assert sorted(path.name for path in made.run.checkpoints.iterdir()) == [
        f"round-000{n}.safetensors" for n in (0, 1, 2)
    ]
    assert [name for name, _ in kinds(made)][-1] == "run-finished"
    made.go()
    assert read_record(made.run, 4) is None


def test_measuring_changes_no_bit_of_the_weights(tmp_path: Path) -> None:
    measured, plain = consortium(tmp_path / "a", rounds=2), consortium(tmp_path / "b", figures=(), rounds=2)
    measured.go()
    plain.go()
    assert closed(measured, 2).weights == closed(plain, 2).weights
    assert closed(plain, 2).validation is None
    assert read_record(plain.run, 3) is None
    assert not any("scores" in line and json.loads(line)["scores"] for line in egress(plain, "siteA"))


def egress(made: Consortium, site: str) -> list[str]:
    return made.homes[site].egress_log.read_text().splitlines()


def test_the_egress_log_holds_every_figure_that_left(tmp_path: Path) -> None:
    made = consortium(tmp_path, rounds=1)
    made.go()
    for number, line in enumerate(egress(made, "siteB"), start=1):
        sent = closed(made, number).receipts["siteB"].scores
        assert sent and json.loads(line)["scores"] == [group.model_dump(mode="json") for group in sent]


def test_a_site_that_allows_none_or_holds_none_back_sends_none(tmp_path: Path) -> None:
    made = consortium(tmp_path, rounds=1)
    for site, old, new in (
        ("siteA", '"validation", ', ""),
        ("siteB", "[labels]", "[archive]\nhold-out = false\n[labels]"),
    ):
        path = made.homes[site].site_toml
        path.write_text(path.read_text().replace(old, new))
    made.go()
    for number in (1, 2):
        record = closed(made, number)
        assert [site for site, counted in record.receipts.items() if counted.scores] == ["siteC"]
        assert record.validation is not None and record.validation.groups[0].sites == ("siteC",)


def test_contradicting_figures_are_ignored_and_the_update_counts(tmp_path: Path) -> None:
    made = consortium(tmp_path, rounds=1)

    def boast(request: Request, manifest: Manifest) -> Manifest:
        wrong = GroupScores(modality="CT", anatomy="lung", images=20, top1=500)
        return manifest.model_copy(update={"scores": (wrong,)}) if request.site == "siteA" else manifest

    made.go(made.port(relabel=boast))
    for number in (1, 2):
        record = closed(made, number)
        assert sorted(record.receipts) == list(SITES)
        assert record.receipts["siteA"].scores == ()
        assert record.validation is not None and record.validation.images == 480
    ignored = [fields for kind, fields in kinds(made) if kind == "scores-ignored"]
    assert [(fields["round"], fields["site"]) for fields in ignored] == [(1, "siteA"), (2, "siteA")]


def test_figures_that_nobody_asked_for_are_not_kept(tmp_path: Path) -> None:
    made = consortium(tmp_path, figures=(), rounds=1)
    scores = (GroupScores(modality="CT", anatomy="lung", images=20, top1=10),)
    made.go(made.port(relabel=lambda request, manifest: manifest.model_copy(update={"scores": scores})))
    assert all(counted.scores == () for counted in closed(made, 1).receipts.values())
    assert closed(made, 1).validation is None


def test_a_site_that_fails_does_not_hold_up_the_closing_round(tmp_path: Path) -> None:
    made = consortium(tmp_path, rounds=1)
    made.go(
        made.port(
            before=lambda request: (
                "memory" if (request.site, request.round) != ("siteB", 2) and request.round == 2 else None
            )
        )
    )
    closing = closed(made, 2)
    assert list(closing.receipts) == ["siteB"]
    assert closing.validation is not None and closing.validation.groups[0].sites == ("siteB",)


def test_an_update_without_tensors_does_not_count_in_a_training_round(tmp_path: Path) -> None:
    made = consortium(tmp_path, rounds=1)
    seen = []

    def empty(request: Request, path: Path) -> None:
        if request.site == "siteA" and request.round == 1 and not seen:
            path.write_bytes(NOTHING.header())

    def lazy(request: Request, manifest: Manifest) -> Manifest:
        if request.site == "siteA" and request.round == 1 and not seen:
            seen.append(request)
            return manifest.model_copy(update={"steps": 0})
        return manifest

    made.go(made.port(forge=empty, relabel=lazy))
    failures = [(each.site, each.code) for each in closed(made, 1).failures]
    assert failures == [("siteA", "update-manifest")]
    assert sorted(closed(made, 1).receipts) == list(SITES)


def test_an_update_with_tensors_does_not_count_in_the_closing_round(tmp_path: Path) -> None:
    made = consortium(tmp_path, rounds=1)

    def busy(request: Request, manifest: Manifest) -> Manifest:
        return manifest.model_copy(update={"steps": 20}) if request.round == 2 else manifest

    made.go(made.port(relabel=busy))
    assert {each.code for each in closed(made, 2).failures} == {"update-header"}
    assert closed(made, 2).validation is None


def test_a_coordinator_that_dies_before_the_closing_round_goes_on_with_it(tmp_path: Path) -> None:
    made = consortium(tmp_path, rounds=1)

    class Killed(BaseException):
        pass

    def die(request: Request) -> str | None:
        if request.round == 2 and request.site == "siteB":
            raise Killed
        return None

    with pytest.raises(Killed):
        made.go(made.port(before=die))
    port = made.go(epoch=2)
    assert ("siteA", 2) not in port.pushed  # its figures are kept
    assert sorted(closed(made, 2).receipts) == list(SITES)


def test_no_round_comes_after_the_closing_one(tmp_path: Path) -> None:
    made = consortium(tmp_path, rounds=1)
    port = made.go()
    request = Request(run="0" * 32, round=3, site="siteA", plan=closed(made, 1).plan, base="0" * 64, deadline_s=9.0)
    with pytest.raises(RefusedError) as caught:
        port._trainers["siteA"].train(request, made.run.plan.read_bytes(), lambda progress: None, lambda: "")
    assert caught.value.code == "bad-request"
