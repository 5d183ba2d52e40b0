"""round.json: what is known of one round; the state machine's memory, written whole at every step."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rin.common.chain import Head
from rin.common.errors import StateError
from rin.common.files import read_json, write_json
from rin.common.plan import Digest, MetricName, SiteName
from rin.common.scores import GroupScores
from rin.common.wire import Claim, RoundNumber
from rin.server.rundir import RunDir
from rin.server.validation import Validation

State = Literal["open", "frozen", "closed", "failed"]

# State to the states that may follow it. A failed round is opened again by the next start, with the receipts it has.
FOLLOWS: Final[dict[str, frozenset[str]]] = {
    "open": frozenset({"open", "frozen", "failed"}),
    "frozen": frozenset({"closed"}),
    "failed": frozenset({"open"}),
    "closed": frozenset(),
}

# Refusals that stay what they are until a person at the site does something: the round goes on without that site, and
# the next one asks it again.
UNTIL_A_PERSON_ACTS: Final = frozenset(
    {"base-conflict", "budget", "labels-mismatch", "ledger", "no-data", "plan-not-accepted", "policy", "round-old"}
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Counted(_Part):
    """An update that passed every check. `norm` is its own, before clipping to the plan's limit."""

    update: Digest
    norm: float
    labels: tuple[int, ...]
    steps: int
    metrics: dict[MetricName, float]
    scores: tuple[GroupScores, ...] = ()
    privacy: Claim | None = None
    release: str
    lock: Digest


class Failure(_Part):
    """One refusal, by the site or of its update; `code` is one of CODES."""

    site: SiteName
    code: str


class Record(_Part):
    """One round.

    Attributes:
        plan: digest of the plan that the round was opened with.
        base: digest of the global weights that it starts from.
        cohort: the sites that are asked, by name.
        labels: head rows that each site has declared so far in the run.
        claims: what each site last signed of its patients' protection in the run, with its ledger's head.
        heads: where a site's ledger ended that has signed a longer one since, with a refusal or an update that was
            refused here.
        elapsed_s: how long the round has been open while a coordinator ran, of the plan's deadline.
        seconds: from opening to closing while a coordinator ran.
        weights: digest of the new global weights, once closed.
        validation: what the weights of `base` came to on the held-out patients of the sites that count, once closed.
        reason: why the round failed.
    """

    round: RoundNumber
    state: State
    plan: Digest
    base: Digest
    cohort: tuple[SiteName, ...]
    labels: dict[SiteName, tuple[int, ...]] = {}
    claims: dict[SiteName, Claim] = {}
    heads: dict[SiteName, Head] = {}
    receipts: dict[SiteName, Counted] = {}
    failures: tuple[Failure, ...] = ()
    elapsed_s: float = 0.0
    seconds: float = 0.0
    weights: str = ""
    validation: Validation | None = None
    reason: str = ""

    def with_(self, **changes: object) -> Record:
        """A copy with `changes`, validated."""
        return Record.model_validate({**dict(self), **changes})

    def gave_up(self, site: str, retries: int) -> bool:
        """Whether asking `site` again in this round is of no use, or more than `retries` allow."""
        codes = [each.code for each in self.failures if each.site == site]
        return len(codes) > retries or not UNTIL_A_PERSON_ACTS.isdisjoint(codes)

    def head_of(self, site: str) -> Head | None:
        """What a request to `site` names: the head in its last claim, or a longer one that it has signed since."""
        claim = self.claims.get(site)
        return self.heads.get(site) or (claim.ledger if claim else None)

    def seen(self, site: str, head: Head) -> Record:
        """The record with `head` remembered, if none as long is."""
        known = self.head_of(site)
        longer = known is None or head.count > known.count
        return self.with_(heads={**self.heads, site: head}) if longer else self

    def counting(self, site: str, counted: Counted) -> Record:
        """The record with the update of `site`; the head in its claim is the newest word on its ledger."""
        claims = {} if counted.privacy is None else {site: counted.privacy}
        return self.with_(
            receipts={**self.receipts, site: counted},
            labels={**self.labels, site: counted.labels},
            claims={**self.claims, **claims},
            heads={name: head for name, head in self.heads.items() if name != site or not claims},
        )


def read_record(run: RunDir, number: int) -> Record | None:
    """The record of round `number`; None if it was never opened.

    Raises:
        StateError: round.json is damaged.
    """
    path = run.round(number) / "round.json"
    if not path.exists():
        return None
    read_json(path)  # says what is wrong in words
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError:
        raise StateError(f"{path} is damaged", step="restore it from a backup of the run directory") from None


def write_record(run: RunDir, record: Record) -> None:
    """Replace round.json of the record's round."""
    write_json(run.round(record.round) / "round.json", record.model_dump(mode="json"))


def last_record(run: RunDir) -> Record | None:
    """The record of the newest round; None before the first."""
    rounds = run.round(1).parent
    numbers = [int(path.parent.name) for path in rounds.glob("[0-9]*/round.json")] if rounds.is_dir() else []
    return read_record(run, max(numbers)) if numbers else None
