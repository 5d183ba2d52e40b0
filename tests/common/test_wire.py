from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rin.common import keys
from rin.common.chain import Head
from rin.common.errors import CODES, RefusedError
from rin.common.files import canonical_json
from rin.common.wire import (
    Manifest,
    Refusal,
    Reply,
    Request,
    SignedRefusal,
    from_bytes,
    lock_digest,
    read_reply_record,
    read_train_record,
    reply_record,
    train_record,
)

DIGEST = st.text("0123456789abcdef", min_size=64, max_size=64)
SITE = st.from_regex(r"[A-Za-z0-9-]{1,32}", fullmatch=True)
REQUESTS = st.builds(
    Request,
    run=st.text("0123456789abcdef", min_size=32, max_size=32),
    round=st.integers(1, 100_000),
    site=SITE,
    plan=DIGEST,
    base=DIGEST,
    deadline_s=st.floats(0.001, 1e9),
)
METRICS = st.dictionaries(
    st.sampled_from(["loss", "top1", "top5", "images"]), st.floats(allow_nan=False, allow_infinity=False)
)


def manifest(request: Request, /, **changes: Any) -> Manifest:
    facts = {
        "run": request.run,
        "round": request.round,
        "site": request.site,
        "plan": request.plan,
        "base": request.base,
        "request": request.id,
        "update": "e" * 64,
        "steps": 5,
        "labels": (1, 7),
        "metrics": {"loss": 0.25},
        "release": "0.1.0",
        "lock": "f" * 64,
    }
    return Manifest(**(facts | changes))


REQUEST = Request(run="a" * 32, round=3, site="siteA", plan="b" * 64, base="c" * 64, deadline_s=60.0)


@given(REQUESTS)
def test_a_request_survives_the_wire(request: Request) -> None:
    assert from_bytes(Request, request.to_bytes()) == request


@given(REQUESTS, METRICS, st.lists(st.integers(0, 164), min_size=1, max_size=165))
def test_a_manifest_survives_the_wire(request: Request, metrics: dict[Any, float], labels: list[int]) -> None:
    sent = manifest(request, metrics=metrics, labels=tuple(labels))
    got = from_bytes(Manifest, sent.to_bytes(), code="update-manifest")
    assert got == sent and got.signed_bytes() == sent.signed_bytes()
    got.check(request)


@given(REQUESTS, st.sampled_from(sorted(CODES)), st.integers(0, 10**9), DIGEST, st.binary(min_size=64, max_size=64))
def test_a_signed_refusal_survives_the_wire(request: Request, code: str, count: int, head: str, raw: bytes) -> None:
    facts = {"run": request.run, "round": request.round, "site": request.site, "request": request.id, "code": code}
    refusal = Refusal(**facts, ledger=Head(count=count, digest=head))
    reply = Reply(request=request.id, code=code, note=SignedRefusal(refusal=refusal, signature=keys.encode(raw)))
    got = read_reply_record(reply_record(reply))
    assert got == reply and got.note is not None
    assert got.note.refusal.signed_bytes() == b"rin-refusal-v1\n" + refusal.to_bytes()
    assert got.note.refusal.answers(request)
    assert not got.note.refusal.answers(request.model_copy(update={"round": request.round + 1}))


@pytest.mark.parametrize("change", [{"code": "why not"}, {"code": "x" * 33}, {"ledger": None}, {"patients": 3}])
def test_a_refusal_out_of_range_is_refused(change: dict[str, Any]) -> None:
    head = {"count": 1, "digest": "e" * 64}
    facts = {"protocol": 1, "run": "a" * 32, "round": 3, "site": "siteA", "request": "b" * 64, "code": "budget"}
    from_bytes(Refusal, canonical_json({**facts, "ledger": head}))
    with pytest.raises(RefusedError):
        from_bytes(Refusal, canonical_json({**facts, "ledger": head} | change))


@given(st.binary(max_size=200))
def test_bytes_of_a_stranger_are_a_code_and_nothing_else(data: bytes) -> None:
    with pytest.raises(RefusedError) as refused:
        from_bytes(Request, data)
    assert refused.value.code == "bad-request" and refused.value.message == CODES["bad-request"]


@given(REQUESTS, st.sampled_from([b" ", b"\n", b"\t"]), st.integers(0, 400))
def test_only_the_canonical_form_is_read(request: Request, blank: bytes, at: int) -> None:
    data = request.to_bytes()
    at %= len(data)
    with pytest.raises(RefusedError):
        from_bytes(Request, data[:at] + blank + data[at:])


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": 2},
        {"protocol": True},
        {"round": 0},
        {"round": 100_001},
        {"round": 1.0},
        {"round": "1"},
        {"site": "site/A"},
        {"site": "siteA\n"},
        {"site": "a" * 33},
        {"plan": "B" * 64},
        {"base": "c" * 63},
        {"deadline_s": 0},
        {"deadline_s": -1.5},
        {"more": 1},
        {"run": None},
    ],
)
def test_a_request_out_of_range_is_refused(change: dict[str, Any]) -> None:
    value = json.loads(REQUEST.to_bytes()) | change
    with pytest.raises(RefusedError):
        from_bytes(Request, canonical_json(value))


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_not_a_number_never_travels(text: bytes) -> None:
    data = manifest(REQUEST).to_bytes().replace(b"0.25", text)
    with pytest.raises(RefusedError):
        from_bytes(Manifest, data, code="update-manifest")


def test_the_request_id_is_over_plan_round_base_and_site() -> None:
    text = b'["' + b"b" * 64 + b'",3,"' + b"c" * 64 + b'","siteA"]'
    assert REQUEST.id == hashlib.sha256(text).hexdigest()
    assert REQUEST.model_copy(update={"deadline_s": 1.0}).id == REQUEST.id
    for change in ({"plan": "d" * 64}, {"round": 4}, {"base": "d" * 64}, {"site": "siteB"}):
        assert REQUEST.model_copy(update=change).id != REQUEST.id


@pytest.mark.parametrize("field", ["run", "round", "site", "plan", "base", "request"])
def test_a_manifest_answers_one_request(field: str) -> None:
    other: dict[str, Any] = {"run": "0" * 32, "round": 4, "site": "siteB"}
    with pytest.raises(RefusedError) as refused:
        manifest(REQUEST, **{field: other.get(field, "0" * 64)}).check(REQUEST)
    assert refused.value.code == "update-manifest"


def test_a_signature_over_a_manifest_is_over_nothing_else() -> None:
    assert manifest(REQUEST).signed_bytes() == b"rin-update-v1\n" + manifest(REQUEST).to_bytes()


@pytest.mark.parametrize("change", [{"steps": -1}, {"labels": ()}, {"metrics": {"auc": 1.0}}, {"release": "x" * 65}])
def test_a_manifest_out_of_range_is_refused(change: dict[str, Any]) -> None:
    value = json.loads(manifest(REQUEST).to_bytes()) | change
    with pytest.raises(RefusedError) as refused:
        from_bytes(Manifest, canonical_json(value), code="update-manifest")
    assert refused.value.code == "update-manifest"


@given(st.text(max_size=60))
def test_a_reply_shows_our_codes_only(text: str) -> None:
    reply = Reply(request="0" * 64, code=text)
    assert reply.known_code in (*CODES, "") and (reply.known_code == text or reply.known_code == "internal")


def test_a_train_record_round_trip() -> None:
    record = train_record(REQUEST, ticket="3.abc", plan=b"protocol = 1")
    assert read_train_record(record) == (REQUEST, "3.abc", b"protocol = 1")


@pytest.mark.parametrize("change", [{"request": "text"}, {"ticket": b"bytes"}, {"plan": None}, {"request": b"{}"}])
def test_a_malformed_train_record_is_refused(change: dict[str, Any]) -> None:
    record = train_record(REQUEST, ticket="3.abc", plan=b"") | change
    with pytest.raises(RefusedError):
        read_train_record(record)
    with pytest.raises(RefusedError):
        read_train_record({})


def test_the_lock_digest_is_stable() -> None:
    assert lock_digest() == lock_digest() and len(lock_digest()) == 64
