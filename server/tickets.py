"""Tickets: one site's right to fetch one round's weights and to upload its update; only hashes are on disk (T10)."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rin.common.errors import RefusedError, StateError
from rin.common.files import lock, read_json, write_json
from rin.common.plan import Digest, SiteName
from rin.common.wire import RoundNumber
from rin.server import members
from rin.server.rundir import RunDir

# The round stands in front so that one file is read, not all of them; it is no secret.
_TOKEN: Final = re.compile(r"([1-9][0-9]{0,5})\.[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class Grant:
    """What a ticket opens: the weights `base`, and the upload of `site`'s update in round `round`."""

    round: int
    site: str
    plan: str  # digest
    base: str  # digest
    ticket: str  # hex SHA-256 of the token, to count by


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    site: SiteName
    hash: Digest  # of the token


class Tickets(BaseModel):
    """tickets.json of one round."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    round: RoundNumber
    plan: Digest
    base: Digest
    state: Literal["open", "closed"] = "open"
    tickets: list[_Entry] = []


def issue(run: RunDir, number: int, site: str, *, plan: str, base: str) -> str:
    """A new ticket for `site` in round `number`, beside those it has: a restarted coordinator knows no old token.

    Args:
        plan: digest of the plan file.
        base: digest of the round's global weights.

    Raises:
        StateError: the round is closed, or was opened with another plan or base.
    """
    token = f"{number}.{secrets.token_urlsafe(32)}"
    with _edit(run, number):
        now = _read(run, number) or Tickets(round=number, plan=plan, base=base)
        if now.state != "open":
            raise StateError(f"round {number} is closed", step="open the next round")
        if (now.plan, now.base) != (plan, base):
            raise StateError(f"round {number} was opened with another plan or other weights", step="check the run")
        _write(run, now, tickets=[*now.tickets, _Entry(site=site, hash=_hash(token))])
    return token


def check(run: RunDir, token: str) -> Grant:
    """What `token` opens.

    Raises:
        RefusedError: update-stranger for a token that was never issued or is void, or whose site is no member any
            more; update-late for a closed round.
    """
    match = _TOKEN.fullmatch(token)
    now = _read(run, int(match[1])) if match else None
    given = _hash(token)
    found: _Entry | None = None
    for entry in now.tickets if now else []:  # all of them, whatever matches: the time says nothing
        if hmac.compare_digest(entry.hash, given):
            found = entry
    if now is None or found is None:
        raise RefusedError("update-stranger")
    if now.state != "open":
        raise RefusedError("update-late")
    members.member(run, found.site)
    return Grant(now.round, found.site, now.plan, now.base, given)


def close(run: RunDir, number: int) -> None:
    """Void every ticket of round `number` for good and drop what was half uploaded; to be called before the freeze."""
    with _edit(run, number):
        now = _read(run, number)
        if now is not None and now.state == "open":
            _write(run, now, state="closed")
    for part in run.receipts(number).glob(".*.part"):
        part.unlink(missing_ok=True)


def void(run: RunDir, site: str) -> list[int]:
    """Void every ticket of `site` in every open round; the numbers of those rounds."""
    changed = []
    for number in open_rounds(run):
        with _edit(run, number):
            now = _read(run, number)
            if now is not None and any(entry.site == site for entry in now.tickets):
                _write(run, now, tickets=[entry for entry in now.tickets if entry.site != site])
        changed.append(number)
    return changed


def open_rounds(run: RunDir) -> list[int]:
    """The numbers of the rounds whose tickets are open, ascending."""
    rounds = run.round(1).parent
    numbers = sorted(int(path.name) for path in rounds.glob("*") if path.name.isdecimal()) if rounds.is_dir() else []
    return [number for number in numbers if (now := _read(run, number)) is not None and now.state == "open"]


def _path(run: RunDir, number: int) -> Path:
    return run.round(number) / "tickets.json"


def _read(run: RunDir, number: int) -> Tickets | None:
    path = _path(run, number)
    if not path.exists():
        return None
    try:
        return Tickets.model_validate(read_json(path))
    except ValidationError:
        raise StateError(f"{path} is damaged", step="delete it; the coordinator issues new tickets") from None


def _write(run: RunDir, now: Tickets, **changes: object) -> None:
    value = Tickets.model_validate({**dict(now), **changes})
    write_json(_path(run, now.round), value.model_dump(mode="json"), mode=0o600)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


@contextlib.contextmanager
def _edit(run: RunDir, number: int) -> Iterator[None]:
    with lock(run.round(number) / "tickets.lock", holder="rin-server", wait=True):
        yield
