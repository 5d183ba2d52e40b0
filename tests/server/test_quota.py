from __future__ import annotations

import pytest

from rin.server.exchange import Refusal
from rin.server.quota import AT_ONCE, BURST, RATE, TIMES, Quota


def test_a_ticket_moves_a_bounded_number_of_bytes() -> None:
    quota = Quota()
    for _ in range(TIMES + 1):
        with quota.transfer("t", lambda: 100, 100):
            pass
    with pytest.raises(Refusal) as refused, quota.transfer("t", lambda: 100, 100):
        pass
    assert refused.value.status == 429
    with quota.transfer("another", lambda: 100, 100):
        pass


def test_a_ticket_has_few_transfers_at_once() -> None:
    quota = Quota()
    running = [quota.transfer("t", lambda: 1, 100) for _ in range(AT_ONCE)]
    for transfer in running:
        transfer.__enter__()
    with pytest.raises(Refusal), quota.transfer("t", lambda: 1, 100):
        pass
    running[0].__exit__(None, None, None)
    with quota.transfer("t", lambda: 1, 100):
        pass


def test_a_node_key_may_burst_and_then_keeps_to_the_rate() -> None:
    now = [0.0]
    quota = Quota(clock=lambda: now[0])
    for _ in range(int(BURST)):
        quota.call("key")
    with pytest.raises(Refusal) as refused:
        quota.call("key")
    assert refused.value.status == 429
    quota.call("another key")
    now[0] += 1.0
    for _ in range(int(RATE)):
        quota.call("key")
    with pytest.raises(Refusal):
        quota.call("key")
