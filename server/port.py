"""The round loop's way to the sites: what it asks of them, what comes back, and what of that is proved."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final, Protocol

from rin.common import keys
from rin.common.chain import Head
from rin.common.errors import RefusedError
from rin.common.wire import Request, SignedRefusal
from rin.server import members
from rin.server.rundir import RunDir

log = logging.getLogger(__name__)

LOST: Final = "lost"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back from `site`.

    Attributes:
        code: "" uploaded, one of CODES the site's own failure, `LOST` to be repeated.
        note: what the site says that it has signed; not verified.
    """

    site: str
    code: str
    note: SignedRefusal | None = None


class Port(Protocol):
    """The way to the sites."""

    def sites(self) -> set[str]:
        """Sites that can be reached now."""
        ...

    def push(self, site: str, request: Request, ticket: str, plan: bytes) -> None:
        """Ask `site` for its work; asking again for the same request is harmless."""
        ...

    def pull(self) -> list[Answer]:
        """The answers since the last call."""
        ...


def signed_head(run: RunDir, request: Request, answer: Answer) -> Head | None:
    """Where the site's ledger ends, if its member's key has signed that with this code and for this `request`.

    A head that anybody else could plant would stop the site: it refuses when its ledger does not hold it (threat T13).
    """
    if answer.note is None:
        return None
    refusal, signature = answer.note.refusal, keys.decode(answer.note.signature)
    try:
        key = members.member(run, answer.site).signing_key
    except RefusedError:
        return None
    mine = refusal.answers(request) and refusal.code == answer.code
    if not mine or signature is None or not keys.verify(key, refusal.signed_bytes(), signature):
        log.warning("round %d: the note of %s is not what it says and is left out", request.round, answer.site)
        return None
    return refusal.ledger
