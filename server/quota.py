"""What one ticket and one node key may take of the gateway; counted in memory, forgotten at a restart (threat T18)."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from rin.server.exchange import Refusal

AT_ONCE: Final = 4  # transfers of a ticket beside each other
TIMES: Final = 16  # so often may a ticket move the whole file, in both directions together
RATE: Final = 20.0  # Fleet calls a second of one node key, in the long run; a SuperNode makes about one
BURST: Final = 200.0
_KEYS: Final = 4096  # node keys remembered


@dataclass(slots=True)
class _Use:
    active: int = 0
    moved: int = 0  # bytes


class Quota:
    """All counters of one gateway."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tickets: dict[str, _Use] = {}
        self._calls: OrderedDict[object, tuple[float, float]] = OrderedDict()  # key to (tokens left, at)

    @contextlib.contextmanager
    def transfer(self, ticket: str, moved: Callable[[], int], size: int) -> Iterator[None]:
        """One transfer of a file of `size` bytes; `moved` tells at its end how many went.

        Raises:
            Refusal: 429.
        """
        use = self._tickets.setdefault(ticket, _Use())
        if use.active >= AT_ONCE or use.moved > TIMES * size:
            raise Refusal(429, "transfer")
        use.active += 1
        try:
            yield
        finally:
            use.active -= 1
            use.moved += moved()

    def call(self, key: object) -> None:
        """One Fleet call of `key`.

        Raises:
            Refusal: 429.
        """
        now = self._clock()
        left, at = self._calls.pop(key, (BURST, now))
        left = min(BURST, left + (now - at) * RATE)
        self._calls[key] = (max(left - 1, 0.0), now)
        if len(self._calls) > _KEYS:
            self._calls.popitem(last=False)
        if left < 1:
            raise Refusal(429)
