"""The round loop over real trainers: what happens to weights, updates and records, and what each fault costs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rin.common.backbones import Network, initial
from rin.common.errors import CODES, RefusedError, StateError
from rin.common.events import read_events
from rin.common.files import read_json, write_json
from rin.common.layout import Layout
from rin.common.weights import read_facts, read_into
from rin.common.wire import Manifest, Request
from rin.server import checkpoints, members, receipts, rounds, tickets
from rin.server.aggregate import inspect
from rin.server.port import Answer
from rin.server.record import UNTIL_A_PERSON_ACTS, Record, last_record, write_record
from tests import simulator
from tests.simulator import Consortium, final, quicken, record_of, rewrite, small

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def kinds(made: Consortium) -> list[str]:
    return [event.kind for event in read_events(made.run.log / "events.jsonl")[0]]


def network_at(made: Consortium, number: int) -> Network:
    network = initial(made.plan.model, 0)
    read_into(network, made.run.checkpoint(number))
    return network


# --- the undisturbed way


def test_rounds_run_to_their_end_and_say_what_happened(tmp_path: Path) -> None:
    made = small(tmp_path)
    port = made.go()
    assert port.pushed == [(site, number) for number in (1, 2) for site in ("siteA", "siteB", "siteC")]
    first, second = record_of(made, 1), record_of(made, 2)
    assert second.base == first.weights
    assert final(made) == second.weights
    assert sorted(first.receipts) == ["siteA", "siteB", "siteC"]
    assert first.receipts["siteA"].metrics["images"] == 64
    assert first.receipts["siteA"].labels == (0, 1, 2, 3)
    assert first.failures == ()
    assert kinds(made)[:4] == ["round-opened", *["request-sent"] * 3]
    assert kinds(made)[-2:] == ["round-closed", "run-finished"]
    said = read_facts(made.run.checkpoint(2))
    assert said["updates"] == {site: row.update for site, row in second.receipts.items()}
    assert list(made.run.receipts(1).glob("[!.]*")) == list(made.run.receipts(2).glob("[!.]*")) == []
    assert tickets.open_rounds(made.run) == []
    assert [path.stem for path in made.run.weights.iterdir()] == [second.weights]


def test_the_next_weights_are_the_weighted_mean(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1}, retention={"receipts": "keep"})
    made.go()
    before, after = network_at(made, 0).state_dict(), network_at(made, 1).state_dict()
    parts = []
    for site in made.homes:
        part = initial(made.plan.model, 0)
        read_into(part, made.run.receipts(1) / f"{site}.safetensors")
        parts.append(part.state_dict())
    for name, value in after.items():
        if value.is_floating_point():
            mean = sum(w * p[name].double() for w, p in zip((1 / 6, 2 / 6, 3 / 6), parts, strict=True))
            rows = slice(0, 4) if name.startswith("head") else slice(None)
            expected = (before[name].double() + mean)[rows]
            torch.testing.assert_close(value.double()[rows], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(after["head.weight"][4:], before["head.weight"][4:])
    assert (after["backbone.bn1.running_var"] > 0).all()


def test_one_site_alone_is_plain_training(tmp_path: Path) -> None:
    """A federation of one adds (local - global) to global; that is local, up to one rounding of float32."""
    from rin.common.fit import fit_round

    made = small(tmp_path, rows={"siteA": (0, 1, 2)}, limits={"quorum": 1, "min_sites": 1, "max_share": 1.0})
    made.go()
    alone = initial(made.plan.model, 0)
    images = simulator.stripes((0, 1, 2), 48, 0)

    class Held:
        def __len__(self) -> int:
            return 48

        def batch(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            labels = np.zeros((len(index), 165), bool)
            labels[np.arange(len(index)), [images.labels[i][0] for i in index]] = True
            return np.stack([simulator._full_size(images.pixels[i]) for i in index]), labels

    for number in (1, 2):
        fit_round(
            alone, Held(), made.plan, rows=(0, 1, 2), round=number, site="siteA", device=torch.device("cpu"), threads=1
        )
    got = network_at(made, 2)
    for name, value in alone.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(got.state_dict()[name], value, rtol=2e-3, atol=2e-5)


def test_class_subset_sites_move_only_rows_of_enough_sites(tmp_path: Path) -> None:
    rows = {"siteA": (0, 1, 2), "siteB": (1, 2, 3), "siteC": (1, 3, 4)}
    made = small(tmp_path, rows=rows, training={"rounds": 1}, limits={"min_sites": 2})
    made.go()
    before, after = network_at(made, 0).head, network_at(made, 1).head
    moved = [row for row in range(165) if not torch.equal(before.weight[row], after.weight[row])]
    assert moved == [1, 2, 3]  # 0 and 4 are one site's only


def test_fedadam_steps_parameters_and_leaves_variances_positive(tmp_path: Path) -> None:
    made = small(tmp_path, strategy={"name": "fedadam", "server_learning_rate": 0.01})
    made.go()
    final(made)
    network = network_at(made, 2)
    assert (network.get_buffer("backbone.bn1.running_var") > 0).all()
    assert [p.name for p in made.run.state.glob("strategy*")] == ["strategy-0002.safetensors"]


# --- sites that fail


def test_a_failing_site_is_asked_again_and_then_given_up(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1}, limits={"quorum": 2, "min_sites": 2, "retries": 2})
    port = made.go(made.port(before=lambda request: "memory" if request.site == "siteB" else None))
    assert port.pushed.count(("siteB", 1)) == 3
    record = record_of(made, 1)
    assert [(each.site, each.code) for each in record.failures] == [("siteB", "memory")] * 3
    assert sorted(record.receipts) == ["siteA", "siteC"]
    assert kinds(made).count("site-failed") == 3


@pytest.mark.parametrize("code", ["budget", "plan-not-accepted"])
def test_what_only_a_person_can_change_is_not_asked_again_before_the_next_round(tmp_path: Path, code: str) -> None:
    assert code in UNTIL_A_PERSON_ACTS <= set(CODES)
    made = small(tmp_path, limits={"quorum": 2, "min_sites": 2, "retries": 5})
    port = made.go(made.port(before=lambda request: code if request.site == "siteB" else None))
    assert [site for site, _ in port.pushed].count("siteB") == 2
    for number in (1, 2):
        assert port.pushed.count(("siteB", number)) == 1
        assert [(each.site, each.code) for each in record_of(made, number).failures] == [("siteB", code)]
        assert sorted(record_of(made, number).receipts) == ["siteA", "siteC"]


def test_a_refusal_that_leaves_too_few_sites_fails_the_round_aloud_and_the_next_start_asks_once_more(
    tmp_path: Path,
) -> None:
    made = small(tmp_path, training={"rounds": 1}, limits={"retries": 5})
    with pytest.raises(StateError, match=r"2 of 3 updates arrived; missing: siteB \(budget\)"):
        made.go(made.port(before=lambda request: "budget" if request.site == "siteB" else None))
    port = made.go()
    assert port.pushed == [("siteB", 1)]
    assert final(made) == record_of(made, 1).weights


def test_lost_messages_do_not_count_and_unknown_codes_are_internal(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1}, limits={"retries": 1})
    answers = iter(["lost", "lost", "lost", "<script>", *[None] * 9])
    port = made.go(made.port(before=lambda request: next(answers) if request.site == "siteA" else None))
    assert port.pushed.count(("siteA", 1)) == 5
    assert [each.code for each in record_of(made, 1).failures] == ["internal"]
    assert len(record_of(made, 1).receipts) == 3


def test_without_a_quorum_the_round_fails_aloud_and_can_be_tried_again(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1}, limits={"retries": 0})
    with pytest.raises(StateError, match=r"2 of 3 updates arrived; missing: siteC \(disk-full\)"):
        made.go(made.port(before=lambda request: "disk-full" if request.site == "siteC" else None))
    record = record_of(made, 1)
    assert (record.state, record.weights) == ("failed", "")
    assert "siteC (disk-full)" in record.reason
    assert not made.run.checkpoint(1).exists()
    assert kinds(made)[-1] == "round-failed"
    port = made.go()
    assert port.pushed == [("siteC", 1)]
    assert final(made) == record_of(made, 1).weights


def test_the_deadline_ends_the_wait(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1}, limits={"deadline_s": 3.0, "quorum": 2, "min_sites": 2})
    made.go(made.port(away={"siteA"}))
    record = record_of(made, 1)
    assert sorted(record.receipts) == ["siteB", "siteC"]
    assert record.elapsed_s >= 3.0


def test_a_site_that_was_away_is_asked_when_it_is_back(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1})
    port = made.port(away={"siteA"})
    port.before = lambda request: port.away.clear() if request.site == "siteC" else None
    made.go(port)
    assert port.pushed == [("siteB", 1), ("siteC", 1), ("siteA", 1)]


def test_a_request_that_fell_silent_with_its_site_is_sent_again(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1})
    port = made.port()
    real, silenced = port.pull, []

    def pull() -> list[Answer]:
        if port._queue and port._queue[0][0] == "siteA" and not silenced:
            silenced.append(port._queue.popleft())
            port.away.add("siteA")
            return []
        port.away.clear()
        return real()

    port.pull = pull  # type: ignore[method-assign]
    made.go(port)
    assert port.pushed.count(("siteA", 1)) == 2


# --- updates that do not count


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_never_counts(tmp_path: Path, value: float) -> None:
    made = small(tmp_path, training={"rounds": 1}, limits={"quorum": 2, "min_sites": 2, "retries": 1})

    def poison(request: Request, path: Path) -> None:
        if request.site == "siteB":
            rewrite(path, lambda flat: flat.__setitem__(50, value))

    made.go(made.port(forge=poison))
    record = record_of(made, 1)
    assert [each.code for each in record.failures] == ["update-not-finite"] * 2
    assert sorted(record.receipts) == ["siteA", "siteC"]
    assert not (made.run.receipts(1) / "siteB.safetensors").exists()
    flat = checkpoints.read_flat(made.run.weights_file(record.weights), receipts.read_layout(made.run), record.weights)
    assert np.isfinite(flat).all()


def test_a_huge_update_is_clipped_to_the_plans_norm(tmp_path: Path) -> None:
    made = small(
        tmp_path,
        training={"rounds": 1},
        limits={"max_update_norm": 0.1, "max_share": 1.0},
        retention={"receipts": "keep"},
    )
    made.go()
    layout = receipts.read_layout(made.run)
    assert all(row.norm > 0.2 for row in record_of(made, 1).receipts.values())
    before, after = network_at(made, 0), network_at(made, 1)
    squares = sum(float((a - b).detach().double().pow(2).sum()) for a, b in _pairs(after, before))
    assert 0 < squares**0.5 <= 0.1 * (1 + 1e-5)
    assert inspect(made.run.receipts(1) / "siteA.safetensors", layout).norm > 0.2


def _pairs(a: Network, b: Network) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "number", "code"),
    [
        ({"steps": 9}, 1, "update-manifest"),
        ({"labels": (3, 2, 1, 0)}, 1, "update-labels"),
        ({"labels": (0, 1, 2, 165)}, 1, "update-labels"),
        ({"labels": (0, 1, 2)}, 2, "update-labels"),
    ],
)
def test_a_manifest_must_fit_plan_and_earlier_rounds(
    tmp_path: Path, changes: dict[str, Any], number: int, code: str
) -> None:
    made = small(tmp_path, training={"rounds": number}, limits={"quorum": 2, "min_sites": 2, "retries": 0})

    def relabel(request: Request, manifest: Manifest) -> Manifest:
        chosen = (request.site, request.round) == ("siteB", number)
        return manifest.model_copy(update=changes) if chosen else manifest

    made.go(made.port(relabel=relabel))
    assert [each.code for each in record_of(made, number).failures] == [code]
    assert sorted(record_of(made, number).receipts) == ["siteA", "siteC"]


def test_metrics_that_the_plan_does_not_name_are_left_out(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1})
    text = made.run.plan.read_text().replace("[sites]", 'metrics = ["images"]\n[sites]', 1)
    data = text.encode()
    other = simulator.make(
        tmp_path / "other",
        {site: [simulator.stripes((0, 1), 48, 0)] for site in made.homes},
        dict.fromkeys(made.homes, (0, 1)),
        data,
    )
    other.go()
    assert record_of(other, 1).receipts["siteA"].metrics == {"images": 64.0}


# --- members, plan, epoch


def test_a_revoked_members_receipt_is_dropped(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1}, limits={"quorum": 2, "min_sites": 2})

    def revoke(request: Request) -> None:
        if request.site == "siteC" and "siteA" in members.members(made.run):
            members.strike(made.run, "siteA")

    made.go(made.port(before=revoke))
    record = record_of(made, 1)
    assert sorted(record.receipts) == ["siteB", "siteC"]
    assert "siteA" not in read_facts(made.run.checkpoint(1))["updates"]


def test_too_few_members_open_no_round(tmp_path: Path) -> None:
    made = small(tmp_path)
    members.strike(made.run, "siteA")
    with pytest.raises(StateError, match="2 are admitted"):
        made.go()
    assert last_record(made.run) is None


def test_a_later_coordinator_ends_an_earlier_one(tmp_path: Path) -> None:
    made = small(tmp_path)
    facts = read_json(made.run.facts)

    def overtake(request: Request) -> None:
        write_json(made.run.facts, {**facts, "epoch": 2})

    with pytest.raises(StateError, match="later coordinator"):
        made.go(made.port(before=overtake))
    record = record_of(made, 1)
    assert record.state == "open"
    made.go(epoch=2)
    final(made)


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1})
    made.go()
    before = final(made)
    assert made.go().pushed == []
    assert final(made) == before


def test_a_round_cannot_skip_a_state(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1})
    made.go()
    record = record_of(made, 1)
    loop = rounds._Loop(made.run, made.port(), 1, made.plan, b"", record.plan, Layout(()), simulator.RUN_ID)
    with pytest.raises(StateError, match="closed and cannot become open"):
        loop.write(record.with_(state="open"))


def test_a_damaged_record_is_said(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1})
    made.go()
    path = made.run.round(1) / "round.json"
    value = read_json(path)
    write_json(path, {**value, "state": "half open"})
    with pytest.raises(StateError, match="damaged"):
        made.go()
    write_record(made.run, Record.model_validate_json(path.read_bytes().replace(b"half open", b"closed")))
    made.go()


def test_no_ticket_opens_anything_after_the_round(tmp_path: Path) -> None:
    made = small(tmp_path, training={"rounds": 1})
    seen: list[str] = []
    port = made.port()
    real = port.push

    def push(site: str, request: Request, ticket: str, plan: bytes) -> None:
        seen.append(ticket)
        real(site, request, ticket, plan)

    port.push = push  # type: ignore[method-assign]
    made.go(port)
    assert len(seen) == 3
    for ticket in seen:
        with pytest.raises(RefusedError):
            tickets.check(made.run, ticket)
