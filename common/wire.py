"""What crosses between site and coordinator beside the weights: request, manifest, reply; canonical JSON, strict.


Nothing here does I/O. The words are those of DESIGN: a request names one site's work in one round; a manifest is the
site's signed statement about one update.
"""

from __future__ import annotations

import functools
import hashlib
from importlib import metadata
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rin.common.chain import Head
from rin.common.errors import CODES, RefusedError
from rin.common.files import canonical_json
from rin.common.plan import PROTOCOL, Digest, MetricName, SiteName
from rin.common.scores import GroupScores

MAX_MANIFEST: Final = 24 << 10  # bytes of canonical JSON; one of all labels and `scores.MAX_CELLS` cells fits
# Each keeps a signature over one kind of paper from being one over anything else.
SIGNATURE_CONTEXT: Final = b"rin-update-v1\n"
REFUSAL_CONTEXT: Final = b"rin-refusal-v1\n"
RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
RoundNumber = Annotated[int, Field(ge=1, le=100_000)]


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def to_bytes(self) -> bytes:
        """Canonical JSON: the bytes that are sent, hashed and signed."""
        return canonical_json(self.model_dump(mode="json"))


W = TypeVar("W", bound=_Wire)


def from_bytes(model: type[W], data: bytes, *, code: str = "bad-request") -> W:
    """Parse `data` as `model`, accepting only the canonical form.

    Raises:
        RefusedError: with `code`; pydantic's text, which quotes the input, is dropped.
    """
    try:
        value = model.model_validate_json(data)
    except ValidationError:
        raise RefusedError(code) from None
    if value.to_bytes() != data:
        raise RefusedError(code)
    return value


class Claim(_Wire):
    """What a site says about the protection of its patients, with the update's own round in it.

    Attributes:
        epsilon: of everything that the site's ledger holds, at `delta`; for one patient added or removed.
        mechanism: see rin.common.chain.MECHANISM.
        ledger: the ledger's head after the debit of this round.
        adopted: how often a person took the ledger over as it was found (`rin-client ledger adopt`).
    """

    unit: Literal["patient"] = "patient"
    epsilon: Annotated[float, Field(ge=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    mechanism: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
    accountant: Literal["prv"] = "prv"
    ledger: Head
    adopted: Annotated[int, Field(ge=0)] = 0


class Request(_Wire):
    """One site's work in one round. `run` separates two run directories with the same plan."""

    protocol: Literal[1] = PROTOCOL
    run: RunId
    round: RoundNumber
    site: SiteName
    plan: Digest
    base: Digest  # of the global weights' tensor bytes
    deadline_s: Annotated[float, Field(gt=0)]  # what is left of the round when the message is made, a duration
    ledger: Head | None = None  # the last that this site has signed for: its ledger must contain it (threat T13)

    @property
    def id(self) -> str:
        """Hex SHA-256 over (plan, round, base, site): the key of trainer job, checkpoint and stored update."""
        return hashlib.sha256(canonical_json([self.plan, self.round, self.base, self.site])).hexdigest()


class Manifest(_Wire):
    """What a site says about one update, signed with the site's key."""

    protocol: Literal[1] = PROTOCOL
    run: RunId
    round: RoundNumber
    site: SiteName
    plan: Digest
    base: Digest
    request: Digest
    update: Digest  # of the update's tensor bytes
    steps: Annotated[int, Field(ge=0)]  # optimizer steps: the plan's, never a count of patients; 0: closing, no tensors
    labels: Annotated[tuple[int, ...], Field(min_length=1, max_length=4096)]  # head rows that the site declares
    metrics: dict[MetricName, float]  # what the egress gate let through
    scores: Annotated[tuple[GroupScores, ...], Field(max_length=64)] = ()  # of the base's weights, on held-out images
    privacy: Claim | None = None  # of private training
    release: Annotated[str, Field(max_length=64)]  # version of rin at the site
    lock: Digest  # of the site's installed distributions, see `lock_digest`

    def signed_bytes(self) -> bytes:
        """What the site's key signs."""
        return SIGNATURE_CONTEXT + self.to_bytes()

    def check(self, request: Request) -> None:
        """Raise RefusedError('update-manifest') unless this manifest answers `request`."""
        mine = (self.run, self.round, self.site, self.plan, self.base, self.request)
        theirs = (request.run, request.round, request.site, request.plan, request.base, request.id)
        if mine != theirs:
            raise RefusedError("update-manifest")


class Refusal(_Wire):
    """What a site says about a request of private training that it does not fulfil; signed with the site's key.

    Attributes:
        ledger: where the site's ledger ends. A round may be debited and then fail, and only so does the coordinator
            know of it (threat T13).
    """

    protocol: Literal[1] = PROTOCOL
    run: RunId
    round: RoundNumber
    site: SiteName
    request: Digest  # over plan, round, base and site
    code: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,32}$")]
    ledger: Head

    def signed_bytes(self) -> bytes:
        """What the site's key signs."""
        return REFUSAL_CONTEXT + self.to_bytes()

    def answers(self, request: Request) -> bool:
        """Whether this is about `request`."""
        mine = (self.run, self.round, self.site, self.request)
        return mine == (request.run, request.round, request.site, request.id)


class SignedRefusal(_Wire):
    """A refusal and its signature (base64url of 64 bytes), as the trainer makes them and others carry them."""

    refusal: Refusal
    signature: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{86}==$")]


class Reply(_Wire):
    """The wake-up that a site's ClientApp sends when it is done: empty code means the update has been uploaded.

    Attributes:
        note: the trainer's word on why not, of private training; whoever reads it verifies it.
    """

    request: Digest
    code: str = ""
    note: SignedRefusal | None = None

    @property
    def known_code(self) -> str:
        """`code` if it is one of ours, else `internal`: foreign text is never shown or stored."""
        return self.code if self.code in CODES or not self.code else "internal"


@functools.cache
def lock_digest() -> str:
    """Hex SHA-256 over the sorted `name==version` of every installed distribution."""
    names = sorted({f"{dist.name.lower()}=={dist.version}" for dist in metadata.distributions()})
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


# Flower's records hold flat scalars; a train message carries these keys in one ConfigRecord named `rin`.
RECORD: Final = "rin"


def train_record(request: Request, *, ticket: str, plan: bytes) -> dict[str, Any]:
    """Flat scalars of a train message. `plan` are the plan file's exact bytes; the site compares their digest."""
    return {"request": request.to_bytes(), "ticket": ticket, "plan": plan}


def read_train_record(record: dict[str, Any]) -> tuple[Request, str, bytes]:
    """Inverse of `train_record`.

    Raises:
        RefusedError: bad-request.
    """
    request, ticket, plan = record.get("request"), record.get("ticket"), record.get("plan")
    if not (isinstance(request, bytes) and isinstance(ticket, str) and isinstance(plan, bytes)):
        raise RefusedError("bad-request")
    return from_bytes(Request, request), ticket, plan


def reply_record(reply: Reply) -> dict[str, Any]:
    """Flat scalars of a reply message, in one ConfigRecord named `rin` too."""
    return {"reply": reply.to_bytes()}


def read_reply_record(record: dict[str, Any]) -> Reply:
    """Inverse of `reply_record`.

    Raises:
        RefusedError: bad-request.
    """
    reply = record.get("reply")
    if not isinstance(reply, bytes):
        raise RefusedError("bad-request")
    return from_bytes(Reply, reply)
