"""Facts of weight files: anything that is no fact is refused, and nothing that is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rin.common import checkpoint, statement
from rin.common.chain import MECHANISM, START
from rin.common.errors import RefusedError
from rin.common.facts import Facts, check_facts
from rin.common.plan import parse_plan
from rin.common.wire import Claim
from tests.simulator import plan_text

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(Facts.model_fields)) | st.text(max_size=5), ANYTHING, max_size=4))
def test_whatever_a_file_says_is_taken_or_refused(facts: dict[str, Any]) -> None:
    try:
        check_facts("w", facts)
    except RefusedError as error:
        assert error.code == "bad-weights"
    else:
        assert isinstance(facts.get("round", 0), int)
        assert isinstance(facts.get("updates", {}), dict)
        assert all(isinstance(value, str) for value in facts.get("updates", {}).values())
        assert facts.get("release", "") is not None


def test_what_our_own_checkpoints_say_is_known() -> None:
    facts = checkpoint.facts_of(
        parse_plan(plan_text(["a", "b", "c"])), plan_digest="ab", round=1, updates={"siteA": "cd"}
    )
    check_facts("w", facts)
    claim = Claim(epsilon=1.0, delta=1e-5, mechanism=MECHANISM, ledger=START)
    private = facts | statement.facts({"siteA": claim})
    check_facts("w", private)
    assert facts.keys() < private.keys() <= Facts.model_fields.keys()


@pytest.mark.parametrize("facts", [{"round": True}, {"round": 10**9}, {"mean": [0.5, 0.5, float("nan")]}])
def test_odd_numbers_are_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match="odd things"):
        check_facts("w", facts)
