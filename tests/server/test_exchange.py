"""Weights and updates through the port: tickets, uploads that are cut, killed, wrong or repeated; over real TLS."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rin.common import keys
from rin.common.layout import NOTHING
from rin.common.transfer import HttpCarrier, content_range
from rin.common.wire import MAX_MANIFEST
from rin.server import receipts, tickets
from tests.common.test_scores import largest
from tests.small_run import SmallRun, Update, read_answer, wait_for


def request(update: Update, method: str = "PUT", body: bytes = b"", **headers: str) -> bytes:
    rows = update.headers | {"Host": "localhost", "Content-Length": str(len(body))}
    rows |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in rows.items() if value)
    return f"{method} /v1/updates/{update.number}/{update.site} HTTP/1.1\r\n{lines}\r\n".encode() + body


def head(small: SmallRun, update: Update) -> tuple[int, dict[str, str], bytes]:
    return small.raw(request(update, "HEAD", Content_Length=""))


def send(small: SmallRun, update: Update) -> None:
    with HttpCarrier(small.address, small.ca, tries=2) as carrier:
        carrier.send(
            update.number, update.site, update.ticket, update.path, update.manifest.to_bytes(), update.signature
        )


def last_put(small: SmallRun, update: Update) -> tuple[int, int]:
    """Status and bytes of the last PUT of the update's round, from the access log, whose line follows the answer."""

    def rows() -> list[dict[str, int]]:
        lines = [json.loads(line) for line in (small.run.log / "access.jsonl").read_text().splitlines()]
        return [row for row in lines if row["method"] == "PUT" and row.get("round") == update.number]

    wait_for(lambda: rows() and rows()[-1]["status"])
    return rows()[-1]["status"], rows()[-1]["in"]


# --- tickets ----------------------------------------------------------------------------------------------------


def weights(small: SmallRun, digest: str, *rows: str, path: str = "") -> tuple[int, dict[str, str], bytes]:
    lines = "".join(row + "\r\n" for row in rows)
    return small.raw(f"GET {path or f'/v1/weights/{digest}'} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())


def test_weights_need_the_ticket_of_their_round(small: SmallRun) -> None:
    ticket = f"Authorization: Bearer {small.ticket(small.next_round(), 'siteA')}"
    content, _ = small.content(b"global")
    assert weights(small, small.base, ticket)[::2] == (200, content)
    status, headers, part = weights(small, small.base, ticket, "Range: bytes=10-19")
    assert (status, part, headers["content-range"]) == (206, content[10:20], f"bytes 10-19/{len(content)}")
    assert weights(small, small.base, ticket, f"Range: bytes={len(content)}-")[0] == 416
    assert weights(small, small.base, ticket, "Range: bytes=0-1,5-6")[0] == 416
    other = small.publish(b"of another round")
    refused = [
        weights(small, other, ticket),
        weights(small, "0" * 64, ticket),
        weights(small, small.base),
        weights(small, small.base, "Authorization: Bearer " + "x" * 43),
        weights(small, small.base, ticket, ticket),
        weights(small, small.base, ticket.replace("Bearer", "Basic")),
        weights(small, small.base, path=f"/v1/weights/{small.base}?{ticket[22:]}"),
    ]
    assert [status for status, _, _ in refused] == [404, 404, 401, 401, 401, 401, 404]
    assert all(body == b"" for _, _, body in refused)


@pytest.mark.parametrize(
    "name", ["../plan.toml", "..%2frun.json", "A" * 64, "%2e%2e/members.json", "0" * 63, "0" * 65, ""]
)
def test_weights_are_named_by_digest_only(small: SmallRun, name: str) -> None:
    ticket = f"Authorization: Bearer {small.ticket(small.next_round(), 'siteA')}"
    assert weights(small, "", ticket, path=f"/v1/weights/{name}")[0] == 404
    assert weights(small, "", ticket, path=f"/v1/weights/../../ca/{name}")[0] == 404


def test_a_foreign_wrong_stale_or_void_ticket_opens_nothing(small: SmallRun) -> None:
    mine, theirs = small.update("siteA"), small.update("siteB")
    wrong = {
        "another site's path": (replace(mine, site="siteB"), 403),
        "another round's path": (replace(mine, number=mine.number + 1), 403),
        "never issued": (replace(mine, ticket=mine.ticket[:-1] + ("A" if mine.ticket[-1] != "A" else "B")), 401),
        "of no round": (replace(mine, ticket="99999." + "A" * 43), 401),
        "another site's ticket": (replace(mine, ticket=theirs.ticket), 403),
        "no ticket": (replace(mine, ticket=""), 401),
    }
    for what, (update, status) in wrong.items():
        assert head(small, update)[0] == status, what
        assert small.raw(request(update, body=mine.path.read_bytes()))[0] in (status, 0), what
    tickets.close(small.run, mine.number)
    assert head(small, mine)[0] == 410
    assert weights(small, small.base, f"Authorization: Bearer {mine.ticket}")[0] == 410
    tickets.void(small.run, "siteB")
    assert head(small, theirs)[0] == 401
    assert not receipts.receipts(small.run, mine.number) and not receipts.receipts(small.run, theirs.number)


@pytest.mark.parametrize(
    "path", ["/v1/updates/0001/siteA", "/v1/updates/1/..", "/v1/updates/1/siteA/", "/v1/updates/1"]
)
def test_update_paths_are_literal(small: SmallRun, path: str) -> None:
    update = small.update("siteA")
    ask = request(update).replace(f"/v1/updates/{update.number}/siteA".encode(), path.encode(), 1)
    assert small.raw(ask)[0] == 404


def test_no_byte_of_an_upload_is_read_before_the_ticket_holds(small: SmallRun) -> None:
    update = small.update("siteA")
    size = str(small.layout.file_bytes)
    stranger = replace(update, ticket="1." + "A" * 43)
    assert small.raw(request(stranger, Content_Length=size, Expect="100-continue"))[0] == 401
    assert small.raw(request(update, Content_Length=size, Expect="100-continue"))[0] == 100


def test_the_largest_manifest_comes_through(small: SmallRun) -> None:
    update = small.update("siteA")
    paper = update.manifest.model_copy(update={"scores": largest(), "labels": tuple(range(165))})
    paper = paper.model_copy(update={"release": "9" * 64, "metrics": {"loss": 1.234e-05}})
    assert len(paper.to_bytes()) > 0.8 * MAX_MANIFEST
    send(small, replace(update, manifest=paper, signature=small.sign("siteA", paper)))
    found = receipts.receipt(small.run, update.number, "siteA")
    assert found and found.manifest == paper


def test_an_update_of_the_closing_round_has_no_tensors(small: SmallRun, tmp_path: Path) -> None:
    update = small.update("siteA")
    with HttpCarrier(small.address, small.ca) as carrier:  # by the same ticket: far more bytes than the update has
        carrier.fetch(small.base, update.ticket, tmp_path / "weights")
    update.path.write_bytes(NOTHING.header())
    paper = update.manifest.model_copy(update={"steps": 0, "update": hashlib.sha256(b"").hexdigest()})
    send(small, replace(update, manifest=paper, signature=small.sign("siteA", paper)))
    found = receipts.receipt(small.run, update.number, "siteA")
    assert found and found.path.read_bytes() == NOTHING.header()


# --- uploads ----------------------------------------------------------------------------------------------------


def test_an_upload_becomes_a_receipt_once(small: SmallRun) -> None:
    update = small.update("siteA")
    send(small, update)
    found = receipts.receipt(small.run, update.number, "siteA")
    assert found and found.manifest == update.manifest and found.path.read_bytes() == update.path.read_bytes()
    assert found.path.stat().st_mode & 0o777 == 0o400
    status, headers, _ = head(small, update)
    assert (status, headers["x-rin-update"], headers["x-rin-code"]) == (409, update.manifest.update, "update-duplicate")
    assert small.raw(request(update, body=update.path.read_bytes()))[0] in (409, 0)
    send(small, update)  # an answer that was lost: the same update again is a success
    assert weights(small, small.base, f"Authorization: Bearer {update.ticket}")[0] == 409  # a spent ticket
    other = small.update("siteA", number=update.number, seed=b"second")
    with pytest.raises(Exception, match="already has a receipt"):
        send(small, other)
    assert found.path.read_bytes() == update.path.read_bytes()


def cut(small: SmallRun, update: Update, size: int) -> None:
    """Send the first `size` bytes of an upload and break the connection."""
    content = update.path.read_bytes()
    with small.connect() as link:
        link.sendall(request(update, Content_Length=str(len(content))) + content[:size])
        wait_for(lambda: part_size(small, update) >= size - (256 << 10))


def part_size(small: SmallRun, update: Update) -> int:
    return sum(path.stat().st_size for path in small.run.receipts(update.number).glob(f".{update.site}.*.part"))


def offset(small: SmallRun, update: Update) -> int:
    return int(head(small, update)[1]["x-rin-offset"])


def settled(small: SmallRun, update: Update) -> int:
    """The offset, once the gateway has noticed that the connection is gone."""
    seen = [offset(small, update)]

    def stands_still() -> bool:
        time.sleep(0.5)
        seen.append(offset(small, update))
        return seen[-1] == seen[-2]

    wait_for(stands_still)
    return seen[-1]


def test_a_cut_upload_goes_on_where_it_stopped(small: SmallRun) -> None:
    update = small.update("siteA")
    cut(small, update, 3_000_000)
    arrived = settled(small, update)
    assert 3_000_000 - (256 << 10) <= arrived <= 3_000_000  # a broken connection may lose what nobody had read yet
    assert receipts.receipts(small.run, update.number) == []
    send(small, update)
    assert receipts.receipt(small.run, update.number, "siteA")
    assert last_put(small, update) == (201, small.layout.file_bytes - arrived)


def test_kill_9_of_the_gateway_in_an_upload_costs_nothing(tmp_path: Path) -> None:
    small = SmallRun(tmp_path)
    update = small.update("siteA")
    with small.gateway() as process:
        content = update.path.read_bytes()
        with small.connect() as link:
            link.sendall(request(update, Content_Length=str(len(content))) + content[:4_000_000])
            wait_for(lambda: part_size(small, update) > 3_000_000)
            process.kill()
            process.wait()
    with small.gateway():
        arrived = offset(small, update)
        assert arrived > 3_000_000
        send(small, update)
        found = receipts.receipt(small.run, update.number, "siteA")
        assert found and found.path.read_bytes() == content
        assert last_put(small, update) == (201, len(content) - arrived)


def test_a_damaged_part_is_dropped_and_sent_again(small: SmallRun) -> None:
    update = small.update("siteA")
    cut(small, update, 2_000_000)
    wait_for(lambda: offset(small, update) == 2_000_000)
    (part,) = small.run.receipts(update.number).glob(".siteA.*.part")
    damaged = bytearray(part.read_bytes())
    damaged[1_000_000] ^= 1
    part.write_bytes(damaged)
    send(small, update)
    found = receipts.receipt(small.run, update.number, "siteA")
    assert found and found.path.read_bytes() == update.path.read_bytes()


def bad_uploads(small: SmallRun, update: Update) -> dict[str, tuple[Update, bytes, dict[str, str], int]]:
    content = update.path.read_bytes()
    total = len(content)
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    size = {"Content_Length": str(total)}
    another = update.manifest.model_copy(update={"round": update.number + 1})
    return {
        "short": (update, content[:-4], {"Content_Length": str(total - 4)}, 422),
        "long": (update, content + b"1234", {}, 422),
        "a range of another total": (update, content, {"Content_Range": content_range(0, total + 4)}, 422),
        "a range that begins later": (update, content[8:], {"Content_Range": content_range(8, total)}, 503),
        "a range without sense": (update, content, {"Content_Range": "bytes 0-"}, 422),
        "no length": (update, b"0\r\n\r\n", {"Content_Length": "", "Transfer_Encoding": "chunked"}, 411),
        "another header": (update, b"\x01" + content[1:], size, 422),
        "metadata in the header": (update, content[:9] + b'"__metadata__"' + content[23:], size, 422),
        "another digest": (update, flipped, size, 422),
        "signed by another site": (replace(update, signature=small.sign("siteB", update.manifest)), content, size, 422),
        "signature of another round": (replace(update, manifest=another), content, size, 422),
        "no signature": (replace(update, signature=b""), content, size, 400),
    }


@pytest.mark.parametrize("what", [
    "short", "long", "a range of another total", "a range that begins later", "a range without sense", "no length",
    "another header", "metadata in the header", "another digest", "signed by another site",
    "signature of another round", "no signature",
])  # fmt: skip
def test_a_wrong_upload_never_becomes_a_receipt(small: SmallRun, what: str) -> None:
    update = small.update("siteA")
    sent, body, headers, status = bad_uploads(small, update)[what]
    assert small.raw(request(sent, body=body, **headers))[0] in (status, 0)
    assert last_put(small, update)[0] == status
    assert receipts.receipts(small.run, update.number) == []
    assert not list(small.run.receipts(update.number).glob("*.safetensors"))
    send(small, update)  # and the right one still may
    assert len(receipts.receipts(small.run, update.number)) == 1


def test_two_writers_of_one_update_are_kept_apart(small: SmallRun) -> None:
    update = small.update("siteA")
    content = update.path.read_bytes()
    with small.connect() as link:
        link.sendall(request(update, Content_Length=str(len(content))) + content[:1_000_000])
        wait_for(lambda: part_size(small, update) > 500_000)
        assert small.raw(request(update, body=content))[0] in (503, 0)
        link.sendall(content[1_000_000:])
        assert read_answer(link)[0] == 201


def test_the_round_that_closes_meanwhile_takes_no_receipt(small: SmallRun) -> None:
    update = small.update("siteA")
    content = update.path.read_bytes()
    with small.connect() as link:
        link.sendall(request(update, Content_Length=str(len(content))) + content[:1_000_000])
        wait_for(lambda: part_size(small, update) > 500_000)
        tickets.close(small.run, update.number)
        link.sendall(content[1_000_000:])
        assert read_answer(link)[0] == 410
    assert receipts.receipts(small.run, update.number) == []
    assert part_size(small, update) == 0


def test_a_link_in_the_place_of_a_part_is_not_followed(small: SmallRun, tmp_path: Path) -> None:
    update = small.update("siteA")
    folder = small.run.receipts(update.number)
    folder.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_bytes(b"")
    (folder / f".siteA.{update.manifest.request}.{update.manifest.update}.part").symlink_to(victim)
    assert small.raw(request(update, body=update.path.read_bytes()))[0] in (500, 503, 0)
    assert victim.read_bytes() == b"" and receipts.receipts(small.run, update.number) == []


def test_507_when_the_disk_reserve_is_reached(tmp_path: Path) -> None:
    small = SmallRun(tmp_path)
    update = small.update("siteA")
    with small.gateway("--reserve-gib", "1e6"):
        status, headers, _ = head(small, update)
    assert (status, headers["x-rin-code"]) == (507, "disk-full")


def test_no_ticket_is_on_disk_but_as_a_hash(small: SmallRun) -> None:
    update = small.update("siteA")
    assert small.raw(request(update).replace(b" HTTP/1.1", f"?ticket={update.ticket} HTTP/1.1".encode(), 1))[0] == 404
    send(small, update)
    texts = [path.read_bytes() for path in small.run.root.rglob("*") if path.is_file()]
    texts.append((small.folder / "gateway.out").read_bytes())
    assert not any(update.ticket.encode() in text for text in texts)
    assert keys.sha256(update.ticket.encode()).encode() in b"".join(texts)
