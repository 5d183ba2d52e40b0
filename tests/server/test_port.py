"""What a site signs when it refuses: the coordinator remembers its ledger's head, and believes nobody else's word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rin.client import private
from rin.client.ledger import site_ledger
from rin.client.site import read_site
from rin.client.trainer import Trainer
from rin.common import keys
from rin.common.chain import Debit, Head
from rin.common.errors import RefusedError
from rin.common.wire import Refusal, Request, SignedRefusal, from_bytes
from rin.server import members
from rin.server.port import Answer, signed_head
from tests.private_consortium import POLICY, consortium, request_of
from tests.simulator import Consortium, quicken, record_of, rewrite, small

TWO = {"min_sites": 2, "quorum": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def spend(made: Consortium, site: str) -> Head:
    """A debit of another run at `site`, which the coordinator of this one hears nothing of."""
    home, digest = made.homes[site], "1" * 64
    row = private.row_of(made.plan, read_site(home))
    debit = Debit(
        run="ab" * 16,
        round=1,
        plan=digest,
        request=digest,
        attempt="cd" * 16,
        sigma=row.sigma,
        rate=row.rate,
        steps=row.steps,
        clip=1.0,
        images=2,
        patients=60,
        delta=1e-3,
        release="0",
    )
    return site_ledger(home).debit(debit, lambda entries: None).head


def ceiling(made: Consortium, site: str, epsilon: float) -> None:
    path = made.homes[site].site_toml
    lines = [f"epsilon = {epsilon}" if line.startswith("epsilon") else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))


class Crash(Exception):
    """The coordinator dies."""


def test_a_refusals_head_outlives_the_coordinator_and_a_ledger_rolled_back_behind_it_is_refused(tmp_path: Path) -> None:
    made = consortium(tmp_path, policy=POLICY + "min-sites = 2\n", training={"rounds": 3}, limits=TWO)
    home, copies, asked = made.homes["siteB"], list[bytes](), list[Request]()

    def disturb(request: Request) -> None:
        if (request.site, request.round) == ("siteB", 2):
            copies.extend((home.ledger.read_bytes(), home.ledger_anchor.read_bytes()))
            spend(made, "siteB")
            ceiling(made, "siteB", 0.01)
        if request.round == 3:
            raise Crash

    with pytest.raises(Crash):
        made.go(made.port(before=disturb))
    assert [(each.site, each.code) for each in record_of(made, 2).failures] == [("siteB", "budget")]
    known = site_ledger(home).head
    assert known.count == 2 and record_of(made, 3).claims["siteB"].ledger.count == 1
    ceiling(made, "siteB", 50.0)
    home.ledger.write_bytes(copies[0])  # both, as from a backup of the time before the other run
    home.ledger_anchor.write_bytes(copies[1])
    made.go(made.port(before=asked.append))
    assert [request.ledger for request in asked if request.site == "siteB"] == [known]
    assert [(each.site, each.code) for each in record_of(made, 3).failures] == [("siteB", "ledger")]
    assert sorted(record_of(made, 3).receipts) == ["siteA", "siteC"]


def test_what_a_site_has_signed_counts_also_where_its_update_does_not(tmp_path: Path) -> None:
    made = consortium(tmp_path, policy=POLICY + "min-sites = 2\n", limits={**TWO, "retries": 0})
    asked = list[Request]()

    def poison(request: Request, path: Path) -> None:
        if (request.site, request.round) == ("siteB", 1):
            rewrite(path, lambda flat: flat.__setitem__(50, float("nan")))

    made.go(made.port(forge=poison, before=asked.append))
    assert "siteB" not in record_of(made, 1).receipts
    assert [request.ledger.count for request in asked if request.site == "siteB" and request.ledger] == [1]
    assert record_of(made, 2).heads == {} and record_of(made, 2).claims["siteB"].ledger.count == 2


def refused(made: Consortium, request: Request) -> SignedRefusal:
    with pytest.raises(RefusedError) as caught:
        Trainer(made.homes[request.site]).train(request, made.run.plan.read_bytes(), lambda _: None, lambda: "")
    assert caught.value.code == "budget"
    return from_bytes(SignedRefusal, caught.value.note)


def signed(made: Consortium, site: str, refusal: Refusal, context: bytes = b"rin-refusal-v1\n") -> SignedRefusal:
    key = keys.load_signing_key(made.homes[site].keys / "signing.key")
    signature = keys.sign(key, context + refusal.to_bytes())
    return SignedRefusal(refusal=refusal, signature=keys.encode(signature))


def test_a_head_counts_only_with_the_sites_signature_and_for_this_request(tmp_path: Path) -> None:
    made = consortium(tmp_path)
    head = spend(made, "siteA")
    ceiling(made, "siteA", 0.01)
    request = request_of(made)
    note = refused(made, request)
    refusal = note.refusal
    assert signed_head(made.run, request, Answer("siteA", "budget", note)) == head == refusal.ledger
    assert signed_head(made.run, request, Answer("siteA", "budget")) is None
    assert signed_head(made.run, request, Answer("siteA", "policy", note)) is None
    longer = refusal.model_copy(update={"ledger": Head(count=99, digest="9" * 64)})
    planted: list[tuple[str, SignedRefusal]] = [
        ("siteA", note.model_copy(update={"refusal": longer})),
        ("siteA", signed(made, "siteB", longer)),
        ("siteB", note),
        ("siteA", signed(made, "siteA", longer, b"rin-update-v1\n")),
    ]
    for site, forged in planted:
        assert signed_head(made.run, request, Answer(site, "budget", forged)) is None
    changes: list[dict[str, Any]] = [{"round": 2}, {"run": "0" * 32}, {"base": "0" * 64}, {"plan": "0" * 64}]
    for change in changes:
        assert signed_head(made.run, request.model_copy(update=change), Answer("siteA", "budget", note)) is None
    assert signed_head(made.run, request, Answer("siteA", "budget", signed(made, "siteA", longer))) == longer.ledger
    members.strike(made.run, "siteA")
    assert signed_head(made.run, request, Answer("siteA", "budget", note)) is None


@pytest.mark.parametrize(
    "plant",
    [
        lambda note: None,
        lambda note: note.model_copy(update={"signature": "A" * 86 + "=="}),
        lambda note: note.model_copy(
            update={"refusal": note.refusal.model_copy(update={"ledger": Head(count=9, digest="9" * 64)})}
        ),
    ],
)
def test_whoever_carries_a_note_can_plant_no_head(
    tmp_path: Path, plant: Callable[[SignedRefusal], SignedRefusal | None]
) -> None:
    made = consortium(tmp_path, policy=POLICY + "min-sites = 2\n", limits=TWO)
    ceiling(made, "siteB", 0.01)
    asked = list[Request]()

    def raised(request: Request) -> None:
        asked.append(request)
        if request.round == 2:
            ceiling(made, "siteB", 50.0)

    made.go(made.port(before=raised, renote=lambda request, note: plant(note) if note else None))
    assert [request.ledger for request in asked if request.site == "siteB"] == [None, None]
    assert "siteB" in record_of(made, 2).receipts


def test_the_privacy_officer_reads_of_it(tmp_path: Path) -> None:
    made = consortium(tmp_path)
    ceiling(made, "siteA", 0.01)
    note = refused(made, request_of(made))
    (line,) = [json.loads(line) for line in made.homes["siteA"].egress_log.read_text().splitlines()]
    assert (line["what"], line["code"], line["round"]) == ("refusal", "budget", 1)
    assert line["ledger"] == note.refusal.ledger.model_dump()
    assert line["sha256"] == keys.sha256(note.to_bytes())


@pytest.mark.parametrize("harm", ["ledger", "signing.key"])
def test_without_a_ledger_or_a_key_the_code_goes_alone(tmp_path: Path, harm: str) -> None:
    made = consortium(tmp_path)
    home = made.homes["siteA"]
    (home.ledger if harm == "ledger" else home.keys / harm).unlink()
    ceiling(made, "siteA", 0.01)
    with pytest.raises(RefusedError) as caught:
        Trainer(home).train(request_of(made), made.run.plan.read_bytes(), lambda _: None, lambda: "")
    assert caught.value.note == b""
    assert not home.egress_log.exists()


def test_a_refusal_of_training_that_is_not_private_says_nothing_of_a_ledger(tmp_path: Path) -> None:
    made = small(tmp_path)
    request = request_of(made).model_copy(update={"round": 99})
    with pytest.raises(RefusedError) as caught:
        Trainer(made.homes["siteA"]).train(request, made.run.plan.read_bytes(), lambda _: None, lambda: "")
    assert (caught.value.code, caught.value.note) == ("bad-request", b"")
