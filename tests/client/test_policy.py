"""The table of rules: each rule alone decides, the stricter side wins, and what is refused has a reason for people."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rin.client.policy import MAX_PLAN, RULES, allowed_metrics, check, open_plan
from rin.client.site import Site
from rin.common.errors import CODES, RefusedError
from rin.common.labels import label_set_digest
from rin.common.plan import Plan, parse_plan

TEXT = f"""
protocol = 1
name = "p"
label-set = "{label_set_digest()}"
[sites]
siteA = 1.0
siteB = 1.0
siteC = 1.0
[training]
rounds = 10
local-steps = 8
batch-size = 8
"""
DIGEST = "d" * 64


def plan(*changes: tuple[str, str]) -> Plan:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse_plan(text.encode())


def site(name: str = "siteA", /, **policy: Any) -> Site:
    agreed = {"privacy": "none", "none-agreed-by": "A", "none-agreed-on": "2026-11-23"}
    return Site.model_validate({"site": name, "policy": agreed | policy})


def codes(plan: Plan, site: Site, *, accepted: set[str] | None = None, patients: int = 20) -> list[str]:
    return [r.code for r in check(plan, DIGEST, site, {DIGEST} if accepted is None else accepted, patients=patients)]


def test_a_plan_at_every_floor_is_trained() -> None:
    assert codes(plan(), site()) == []


def test_the_defaults_are_the_strictest() -> None:
    reasons = check(plan(), DIGEST, Site.model_validate({"site": "siteA"}), set(), patients=20)
    assert {reason.code for reason in reasons} == {"plan-not-accepted", "policy"}


@pytest.mark.parametrize(
    ("changes", "here", "arguments", "code"),
    [
        ((), site(), {"accepted": {"e" * 64}}, "plan-not-accepted"),
        ((), Site.model_validate({"site": "siteA"}), {}, "policy"),
        ((), site("siteD"), {}, "policy"),
        ((("local-steps = 8", "local-steps = 7"),), site(), {}, "policy"),
        ((("batch-size = 8", "batch-size = 7"),), site(), {}, "policy"),
        ((), site(), {"patients": 19}, "policy"),
        ((("[training]", "[limits]\nmin-sites = 2\n[training]"),), site(), {}, "policy"),
        ((), site(**{"max-rounds": 9}), {}, "policy"),
    ],
)
def test_each_rule_refuses_alone(
    changes: tuple[tuple[str, str], ...], here: Site, arguments: dict[str, Any], code: str
) -> None:
    assert codes(plan(*changes), here, **arguments) == [code]


def test_any_plan_within_the_policy_where_the_site_says_so() -> None:
    assert codes(plan(), site(plans="any"), accepted=set()) == []


def test_every_reason_is_a_code_with_words_and_a_next_step() -> None:
    reasons = check(plan(("= 8", "= 7")), DIGEST, Site.model_validate({"site": "x"}), set(), patients=0)
    assert len(reasons) >= len(RULES) - 2
    for reason in reasons:
        assert reason.code in CODES
        assert reason.text
        assert reason.step
        assert "{" not in reason.text


@given(steps=st.integers(1, 100), floor=st.integers(1, 100))
def test_the_stricter_side_wins(steps: int, floor: int) -> None:
    refused = bool(codes(plan(("local-steps = 8", f"local-steps = {steps}")), site(**{"min-steps": floor})))
    assert refused == (steps < floor)


def test_metrics_leave_only_where_both_sides_allow_them() -> None:
    narrow = plan(("[sites]", 'metrics = ["loss", "top1"]\n[sites]'))
    assert allowed_metrics(narrow, site(metrics=("top1", "top5"))) == {"top1"}
    assert allowed_metrics(plan(), site()) == frozenset()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_plan_must_be_the_one_that_the_request_names() -> None:
    data = TEXT.encode()
    assert open_plan(data, digest(data)) == plan()
    for other in (data + b"\n", b"", data[:-1]):
        with pytest.raises(RefusedError) as caught:
            open_plan(other, digest(data))
        assert caught.value.code == "bad-request"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (TEXT.replace(label_set_digest(), "0" * 64).encode(), "labels-mismatch"),
        (b"\xff\xfe", "bad-request"),
        (b"protocol = 1", "bad-request"),
        (TEXT.replace("protocol = 1", "protocol = 2").encode(), "bad-request"),
        (TEXT.encode() + b"#" * MAX_PLAN, "bad-request"),
    ],
)
def test_a_plan_that_this_release_cannot_follow(data: bytes, code: str) -> None:
    with pytest.raises(RefusedError) as caught:
        open_plan(data, digest(data))
    assert caught.value.code == code


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_a_refusal(data: bytes) -> None:
    with pytest.raises(RefusedError):
        open_plan(data, digest(data))
