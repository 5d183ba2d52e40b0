"""What stands in the ledger: entries, heads and the anchor as strict models, the chain that they form; no I/O here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rin.common.errors import ConfigError, StateError
from rin.common.files import canonical_json
from rin.common.plan import Digest

MECHANISM: Final = "patient-poisson-gaussian-1"  # Poisson over patients, one clip a patient, Gaussian noise once a step
ZERO: Final = "0" * 64  # what the first entry names as the hash before it

Hex16 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]  # 16 bytes as hex
Count = Annotated[int, Field(ge=0, le=10**9)]
Some = Annotated[int, Field(ge=1, le=10**9)]

# --- faults ---------------------------------------------------------------------------------------------------------

Fault = Literal[
    "missing", "no-anchor", "anchor", "unreadable", "edited", "newer", "population", "short", "long", "head"
]

# Where the ledger's own commands refuse to print a head: what is there is compared by hand.
_COMPARE: Final = (
    "compare its number of lines (`wc -l`) with the head kept in a second place, or with the journal "
    '(`journalctl | grep "rin privacy ledger"`), then run `rin-client ledger adopt --reason TEXT`'
)

# What is wrong, and what the operator does. None of it leaves the site: that is the code `ledger`.
FAULTS: Final[dict[Fault, tuple[str, str]]] = {
    "missing": (
        "the ledger {name} is missing",
        "restore its newest backup and run `rin-client ledger verify`; where there is none, `rin-client ledger adopt "
        "--reason TEXT` begins a new one; only where these patients never had a ledger (a home of an earlier release) "
        "`rin-client ingest` makes it",
    ),
    "no-anchor": (
        "the anchor of the ledger {name} is missing",
        f"restore it from the newest backup of the keys; where there is none, look at the ledger: {_COMPARE}",
    ),
    "anchor": (
        "the anchor of the ledger {name} is damaged",
        f"restore it from the newest backup of the keys; where there is none, look at the ledger: {_COMPARE}",
    ),
    "unreadable": (
        "the ledger {name} or its anchor cannot be read: {detail}",
        "run the command as the user who owns the vault; look at the disk if that user cannot read it either",
    ),
    "edited": (
        "the ledger {name} was edited at line {line}",
        "restore its newest backup; where there is none, `rin-client ledger adopt --reason TEXT` keeps every line "
        "that can still be read, and the damaged file under another name",
    ),
    "newer": (
        "line {line} of the ledger {name} is of a kind that this release does not know",
        "install the release of rin that wrote it; if none did, the line was edited: restore the newest backup",
    ),
    "population": (
        "the ledger {name} belongs to another population of patients than the pseudonym key",
        "restore the key that belongs to it, or the ledger that belongs to the key; other patients want another --home",
    ),
    "short": (
        "the ledger {name} was rolled back: its anchor knows {anchored} entries, {found} are there",
        "restore the newest backup; where there is none, `rin-client ledger adopt --reason TEXT` takes it as it is",
    ),
    "long": (
        "the anchor of the ledger {name} was rolled back: it knows {anchored} entries, {found} are there",
        f"restore the newest backup of the keys; where there is none, look at the ledger: {_COMPARE}",
    ),
    "head": (
        "the ledger {name} does not hold entry {line}, which the coordinator has seen signed",
        "an older copy or a second ledger is in use: restore the newest; where there is none, `rin-client ledger adopt "
        "--reason TEXT` takes this one as it is",
    ),
}
HELPLESS: Final[frozenset[Fault]] = frozenset({"unreadable", "newer", "population"})  # nobody's word settles these


class LedgerError(StateError):
    """The ledger is not what it must be; the site trains nothing privately until a person has put it right."""

    def __init__(self, fault: Fault, path: Path, **facts: Any) -> None:
        message, step = FAULTS[fault]
        super().__init__(message.format(name=path.name, **facts), step=step, code="ledger")
        self.fault: Fault = fault


# --- entries --------------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Head(_Strict):
    """Where a ledger ends: how many entries, and the hex SHA-256 of the last one's line."""

    count: Count
    digest: Digest

    @classmethod
    def parse(cls, text: str) -> Self:
        """Inverse of `str`.

        Raises:
            ConfigError: `text` is not COUNT:DIGEST.
        """
        match = re.fullmatch(r"([0-9]{1,9}):([0-9a-f]{64})", text.strip())
        if match is None:
            raise ConfigError("not a ledger's head", step="give COUNT:DIGEST as `rin-client ledger anchor` writes it")
        return cls(count=int(match[1]), digest=match[2])

    def __str__(self) -> str:
        return f"{self.count}:{self.digest}"


START: Final = Head(count=0, digest=ZERO)


class Debit(_Strict):
    """One round of private training, charged before its first step and never refunded."""

    run: Hex16
    round: Some
    plan: Digest
    request: Digest
    attempt: Hex16  # of this trajectory: a request that is trained anew is another debit
    mechanism: Literal["patient-poisson-gaussian-1"] = MECHANISM
    sigma: Annotated[float, Field(ge=0.3, le=1e6)]  # noise over clip; no accountant answers below 0.3
    rate: Annotated[float, Field(gt=0, le=1)]  # with which a step draws each patient, as it is accounted
    steps: Some
    clip: Annotated[float, Field(gt=0)]  # L2 norm
    images: Some  # at most, of one patient in a step
    patients: Some  # N as the site declared it
    delta: Annotated[float, Field(gt=0, lt=1)]
    release: Annotated[str, Field(min_length=1, max_length=64)]


class Adopt(_Strict):
    """A person's word that this history is taken as it is although another head was known (threat T13)."""

    reason: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,500}$")]  # stays at the site
    fault: Fault  # which one it was
    anchor: Head | None  # what the anchor knew, where it could be read
    coordinator: Head | None  # what the coordinator had seen, where it had asked for it in vain


Payload = Debit | Adopt
KINDS: Final[dict[str, type[Payload]]] = {"debit": Debit, "adopt": Adopt}


class _Line(_Strict):
    number: Some
    previous: Digest
    time: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\+00:00$")]
    population: Hex16
    kind: str
    payload: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """One verified line. `time` is for people: no decision depends on the clock."""

    number: int
    time: str
    payload: Payload
    digest: str  # hex SHA-256 of the line

    @property
    def head(self) -> Head:
        """Where the ledger ended with this entry."""
        return Head(count=self.number, digest=self.digest)


def debits(entries: Sequence[Entry]) -> list[Debit]:
    """The debits among `entries`, in order."""
    return [entry.payload for entry in entries if isinstance(entry.payload, Debit)]


class Anchor(_Strict):
    """The second file: the head, and the line that is being written, so that a kill in its middle loses nothing."""

    population: Hex16
    head: Head
    line: str = ""  # the entry after `head` while it is on its way into the ledger
    digest: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""  # of `line`

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump())

    @property
    def tail(self) -> bytes:
        """The bytes that may follow the anchored entries, all of them, in part or not at all."""
        return self.line.encode() + b"\n" if self.line else b""


# --- the chain ------------------------------------------------------------------------------------------------------


def compose(last: Head, population: str, time: str, kind: str, payload: Payload) -> bytes:
    """The line of the entry after `last`, in canonical JSON, without its newline."""
    line = _Line(
        number=last.count + 1,
        previous=last.digest,
        time=time,
        population=population,
        kind=kind,
        payload=payload.model_dump(),
    )
    return canonical_json(line.model_dump())


def walk(data: bytes, population: str, path: Path) -> Iterator[Entry]:
    """The entries of a ledger's bytes one by one, until the first that does not belong there.

    Args:
        path: of the ledger, for its name in errors.

    Raises:
        LedgerError: edited, newer, population.
    """
    previous = ZERO
    lines = data.split(b"\n")
    for number, text in enumerate(lines[:-1], 1):
        line, payload = _parse(text, number, path)
        if line.number != number:
            raise LedgerError("edited", path, line=number)
        if line.previous != previous:  # the line before it was changed, or the hash that this one holds of it
            raise LedgerError("edited", path, line=f"{number - 1} or {number}" if number > 1 else 1)
        if line.population != population:  # a whole ledger of others begins with them
            raise LedgerError("population", path) if number == 1 else LedgerError("edited", path, line=number)
        previous = hashlib.sha256(text).hexdigest()
        yield Entry(number, line.time, payload, previous)
    if lines[-1]:
        raise LedgerError("edited", path, line=len(lines))


def rechain(data: bytes, population: str, path: Path) -> bytes:
    """Every entry of a damaged ledger that can be read by itself, in order, as a whole chain; a whole one as it is.

    Nothing that can still be counted is dropped: whoever damages a line must not gain the budget of those after it.

    Raises:
        LedgerError: newer, population.
    """
    last, chained = START, b""
    for number, text in enumerate(data.split(b"\n"), 1):
        try:
            line, payload = _parse(text, number, path)
        except LedgerError as error:
            if error.fault in HELPLESS:
                raise
            continue
        if number == 1 and line.population != population:
            raise LedgerError("population", path)
        text = compose(last, population, line.time, line.kind, payload)
        last = Head(count=last.count + 1, digest=hashlib.sha256(text).hexdigest())
        chained += text + b"\n"
    return chained


def _parse(text: bytes, number: int, path: Path) -> tuple[_Line, Payload]:
    try:
        line = _Line.model_validate_json(text)
        if line.kind not in KINDS:
            raise LedgerError("newer", path, line=number)
        payload = KINDS[line.kind].model_validate(line.payload)
    except ValidationError:
        raise LedgerError("edited", path, line=number) from None
    if canonical_json(line.model_dump() | {"payload": payload.model_dump()}) != text:
        raise LedgerError("edited", path, line=number)
    return line, payload


def parse_anchor(data: bytes, path: Path) -> Anchor:
    """The anchor in its file's bytes.

    Args:
        path: of the ledger, for its name in errors.

    Raises:
        LedgerError: anchor.
    """
    try:
        anchor = Anchor.model_validate_json(data)
    except ValidationError:
        raise LedgerError("anchor", path) from None
    held = hashlib.sha256(anchor.line.encode()).hexdigest() if anchor.line else ""
    if anchor.to_bytes() != data or anchor.digest != held:
        raise LedgerError("anchor", path)
    return anchor


def end_of_line(data: bytes, number: int) -> int:
    """Where line `number` of `data` ends, its newline included; 0 for number 0.

    Raises:
        ValueError: there are fewer lines.
    """
    end = 0
    for _ in range(number):
        end = data.index(b"\n", end) + 1
    return end
