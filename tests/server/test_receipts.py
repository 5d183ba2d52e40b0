"""One acceptance for both carriers: what becomes a receipt, what never does, and what a crash leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rin.common.errors import RefusedError, TransferError
from rin.common.layout import Layout
from rin.common.wire import MAX_MANIFEST
from rin.server import consortium, members, receipts, tickets
from rin.server.carrier import FileCarrier
from rin.server.receipts import Receiver, accept_file, receipt
from tests.small_run import SmallRun, Update

LAYOUT = Layout.of([("w", (50, 40), "parameter"), ("b", (3,), "buffer")])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun(tmp_path_factory.mktemp("receipts"), layout=LAYOUT)


def take(small: SmallRun, update: Update) -> receipts.Receipt:
    return accept_file(small.run, update.ticket, update.manifest.to_bytes(), update.signature, update.path)


def receiver(small: SmallRun, update: Update) -> Receiver:
    return Receiver(small.run, update.ticket, update.manifest.to_bytes(), update.signature)


def refusal(small: SmallRun, update: Update) -> str:
    with pytest.raises(RefusedError) as refused:
        take(small, update)
    assert receipt(small.run, update.number, update.site) is None
    return refused.value.code


def names(small: SmallRun, number: int) -> set[str]:
    return {path.name for path in small.run.receipts(number).iterdir() if not path.name.endswith(".lock")}


def test_an_update_becomes_a_receipt(small: SmallRun) -> None:
    update = small.update("siteA")
    made = take(small, update)
    assert made == receipt(small.run, update.number, "siteA")
    assert made.path.read_bytes() == update.path.read_bytes() and made.manifest == update.manifest
    assert names(small, update.number) == {"siteA.safetensors", "siteA.json"}
    assert all(path.stat().st_mode & 0o777 == 0o400 for path in (made.path, made.path.with_suffix(".json")))
    LAYOUT.check(made.path, made.manifest.update)


def test_receipts_come_in_the_order_of_the_sites(small: SmallRun) -> None:
    number = small.next_round()
    for site in ("siteC", "siteA", "siteB"):
        take(small, small.update(site, number=number))
    assert [each.site for each in receipts.receipts(small.run, number)] == ["siteA", "siteB", "siteC"]
    assert receipts.receipts(small.run, number + 1000) == []


def test_the_second_update_of_a_round_is_a_duplicate(small: SmallRun) -> None:
    update = small.update("siteA")
    first = take(small, update)
    other = small.update("siteA", number=update.number, seed=b"other")
    with pytest.raises(RefusedError) as refused:
        take(small, other)
    assert refused.value.code == "update-duplicate"
    assert receipt(small.run, update.number, "siteA") == first


def test_wrong_files_are_refused_and_leave_nothing(small: SmallRun) -> None:
    update = small.update("siteA")
    content = update.path.read_bytes()
    wrong = {
        "update-length": content + b"x",
        "update-header": content.replace(b'"w"', b'"v"', 1),
        "update-digest": content[:-1] + bytes([content[-1] ^ 1]),
    }
    for code, data in wrong.items():
        update.path.write_bytes(data)
        assert refusal(small, update) == code
        assert names(small, update.number) == set()
    update.path.write_bytes(content[:-1])
    assert refusal(small, update) == "update-length"  # cut, so what has arrived stays
    update.path.write_bytes(content)
    take(small, update)


def test_a_manifest_is_checked_before_a_byte_of_the_file(small: SmallRun) -> None:
    update = small.update("siteA")
    other = update.manifest.model_copy(update={"base": "0" * 64})
    for manifest, signature, code in [
        (b"{}", update.signature, "update-manifest"),
        (update.manifest.to_bytes() + b" ", update.signature, "update-manifest"),
        (b" " * (MAX_MANIFEST + 1), update.signature, "update-manifest"),
        (other.to_bytes(), small.sign("siteA", other), "update-manifest"),
        (update.manifest.to_bytes(), small.sign("siteB", update.manifest), "update-signature"),
        (update.manifest.to_bytes(), bytes(64), "update-signature"),
        (update.manifest.to_bytes(), b"", "update-signature"),
    ]:
        with pytest.raises(RefusedError) as refused:
            Receiver(small.run, update.ticket, manifest, signature)
        assert refused.value.code == code
    assert not small.run.receipts(update.number).exists()


@pytest.mark.parametrize("change", [{"run": "0" * 32}, {"plan": "0" * 64}, {"request": "0" * 64}, {"round": 999}])
def test_a_signed_manifest_of_something_else_is_refused(small: SmallRun, change: dict[str, object]) -> None:
    update = small.update("siteA")
    other = update.manifest.model_copy(update=change)
    assert refusal(small, replace(update, manifest=other, signature=small.sign("siteA", other))) == "update-manifest"


def test_a_ticket_of_another_site_is_no_right_to_speak_for_this_one(small: SmallRun) -> None:
    mine = small.update("siteA")
    theirs = small.ticket(mine.number, "siteB")
    assert refusal(small, replace(mine, ticket=theirs)) == "update-manifest"


def test_an_upload_goes_on_from_what_has_arrived(small: SmallRun) -> None:
    update = small.update("siteA")
    content = update.path.read_bytes()
    for first, last in ((0, 5), (5, 400), (400, 400), (400, 6000)):
        with receiver(small, update) as open_one:
            assert open_one.offset() == first
            open_one.append([content[first:last]])
    take(small, update)
    found = receipt(small.run, update.number, "siteA")
    assert found and found.path.read_bytes() == content


def test_another_update_of_the_site_takes_the_place_of_a_half_one(small: SmallRun) -> None:
    update = small.update("siteA")
    with receiver(small, update) as half:
        half.append([update.path.read_bytes()[:3000]])
    other = small.update("siteA", number=update.number, seed=b"other")
    with receiver(small, other) as second:
        assert second.offset() == 0
    assert len([name for name in names(small, update.number) if name.endswith(".part")]) == 1


def test_there_is_one_writer(small: SmallRun) -> None:
    update = small.update("siteA")
    with receiver(small, update), pytest.raises(TransferError) as busy, receiver(small, update):
        pass
    assert busy.value.retry
    take(small, update)


def test_the_disk_reserve_is_kept(small: SmallRun) -> None:
    update = small.update("siteA")
    greedy = Receiver(small.run, update.ticket, update.manifest.to_bytes(), update.signature, reserve=1 << 60)
    with pytest.raises(TransferError) as full:
        greedy.reserve()
    assert full.value.code == "disk-full"
    receiver(small, update).reserve()


def test_a_crash_between_file_and_record_is_repaired(small: SmallRun) -> None:
    update = small.update("siteA")
    made = take(small, update)
    made.path.with_suffix(".json").unlink()  # as if the power had failed between the two links
    assert receipt(small.run, update.number, "siteA") is None
    assert receiver(small, update).offset() == LAYOUT.file_bytes  # nothing needs to be sent again
    take(small, update)
    assert names(small, update.number) == {"siteA.safetensors", "siteA.json"}


def test_a_crash_with_another_file_is_repaired_too(small: SmallRun) -> None:
    update = small.update("siteA")
    take(small, update).path.with_suffix(".json").unlink()
    other = small.update("siteA", number=update.number, seed=b"other")
    with pytest.raises(RefusedError) as refused:
        take(small, other)
    assert refused.value.code == "update-digest"  # what lay there is gone now, and the site begins again
    assert take(small, other).manifest == other.manifest


def test_a_crash_after_the_last_byte_needs_no_byte(small: SmallRun) -> None:
    update = small.update("siteA")
    with receiver(small, update) as whole:
        whole.append([update.path.read_bytes()])
    with receiver(small, update) as again:
        assert again.offset() == LAYOUT.file_bytes
        again.finish()
    assert receipt(small.run, update.number, "siteA")


@pytest.mark.parametrize("damage", ["record", "signature", "file"])
def test_a_damaged_receipt_is_none_and_may_be_sent_again(small: SmallRun, damage: str) -> None:
    update = small.update("siteA")
    made = take(small, update)
    record = made.path.with_suffix(".json")
    record.chmod(0o600)
    if damage == "record":
        record.write_bytes(b"{")
    elif damage == "signature":
        record.write_text(record.read_text().replace('"signature": "', '"signature": "A'))
    else:
        made.path.unlink()
    assert receipt(small.run, update.number, "siteA") is None
    assert receipts.receipts(small.run, update.number) == []
    take(small, update)
    assert receipt(small.run, update.number, "siteA")


def test_a_receipt_ends_with_its_sites_membership(tmp_path: Path) -> None:
    small = SmallRun(tmp_path, layout=LAYOUT)
    update = small.update("siteA")
    take(small, update)
    members.strike(small.run, "siteA")  # the list alone, as in a crash right after it
    assert receipt(small.run, update.number, "siteA") is None


def test_a_round_that_closes_during_an_upload_takes_nothing(small: SmallRun) -> None:
    update = small.update("siteA")
    with receiver(small, update) as open_one:
        open_one.append([update.path.read_bytes()])
        tickets.close(small.run, update.number)
        with pytest.raises(RefusedError) as refused:
            open_one.finish()
    assert refused.value.code == "update-late" and names(small, update.number) == set()


def test_a_revocation_during_an_upload_takes_nothing(tmp_path: Path) -> None:
    small = SmallRun(tmp_path, layout=LAYOUT)
    update = small.update("siteA")
    with receiver(small, update) as open_one:
        open_one.append([update.path.read_bytes()])
        consortium.revoke(small.run, "siteA")
        with pytest.raises(RefusedError) as refused:
            open_one.finish()
    assert refused.value.code == "update-stranger" and names(small, update.number) == set()


def test_a_link_in_the_place_of_the_part_is_an_error(small: SmallRun, tmp_path: Path) -> None:
    update = small.update("siteA")
    folder = small.run.receipts(update.number)
    folder.mkdir(parents=True)
    (tmp_path / "victim").write_bytes(b"")
    part = folder / f".siteA.{update.manifest.request}.{update.manifest.update}.part"
    part.symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        take(small, update)
    assert (tmp_path / "victim").read_bytes() == b""


def test_drop_forgets_receipt_and_half_uploads(small: SmallRun) -> None:
    number = small.next_round()
    mine, theirs = small.update("siteA", number=number), small.update("siteB", number=number)
    take(small, mine)
    with receiver(small, theirs) as half:
        half.append([theirs.path.read_bytes()[:100]])
    receipts.drop(small.run, number, "siteA")
    receipts.drop(small.run, number, "siteB")
    receipts.drop(small.run, number, "siteC")
    assert names(small, number) == set()


# --- the in-process carrier -------------------------------------------------------------------------------------


def test_the_file_carrier_does_what_https_does(small: SmallRun, tmp_path: Path) -> None:
    update, carrier = small.update("siteA"), FileCarrier(small.run)
    target = tmp_path / "inbox" / small.base
    carrier.fetch(small.base, update.ticket, target)
    carrier.fetch(small.base, "it is there", target)
    assert target.read_bytes() == small.content(b"global")[0] and list(target.parent.iterdir()) == [target]
    everything = (update.number, "siteA", update.ticket, update.path, update.manifest.to_bytes(), update.signature)
    carrier.send(*everything)
    carrier.send(*everything)
    assert receipt(small.run, update.number, "siteA")
    with pytest.raises(RefusedError) as spent:
        carrier.fetch(small.base, update.ticket, tmp_path / "again")
    assert spent.value.code == "update-duplicate"


def test_the_file_carrier_refuses_what_https_refuses(small: SmallRun, tmp_path: Path) -> None:
    update, carrier = small.update("siteA"), FileCarrier(small.run)
    with pytest.raises(RefusedError, match="not a member"):
        carrier.fetch(small.base, "1." + "A" * 43, tmp_path / "w")
    with pytest.raises(RefusedError):
        carrier.fetch("0" * 64, update.ticket, tmp_path / "w")
    with pytest.raises(RefusedError):
        carrier.send(update.number, "siteB", update.ticket, update.path, update.manifest.to_bytes(), update.signature)
    altered = small.run.weights_file(small.base)
    content = altered.read_bytes()
    altered.write_bytes(content[:-1] + b"\x00")
    with pytest.raises(RefusedError) as refused:
        carrier.fetch(small.base, update.ticket, tmp_path / "w")
    altered.write_bytes(content)
    assert refused.value.code == "bad-weights" and not (tmp_path / "w").exists()
