"""members.json: who may take part; the truth that the SuperLink's node list is reconciled with (threat T15)."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rin.common.errors import RefusedError, StateError
from rin.common.files import lock, read_json, write_json
from rin.common.plan import Digest, SiteName
from rin.server.rundir import RunDir


class Member(BaseModel):
    """One admitted site."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    site: SiteName
    node_key: str  # OpenSSH line, for Flower's node authentication
    signing_key: Digest  # 64 hex digits, Ed25519, for manifests
    since: str  # ISO 8601, UTC; for people, no decision depends on it
    serial: Annotated[int, Field(ge=1)]  # rises by one with every admission of the run


class Members(BaseModel):
    """The whole file. `retired` holds every signing key that was revoked or replaced: none of them comes back."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    serial: int = 0
    members: dict[SiteName, Member] = {}
    retired: list[Digest] = []


def read_members(run: RunDir) -> Members:
    """members.json of `run`.

    Raises:
        StateError: missing or damaged.
    """
    try:
        return Members.model_validate(read_json(run.members))
    except ValidationError:
        raise StateError(f"{run.members} is damaged", step="restore it from a backup") from None


def members(run: RunDir) -> dict[str, Member]:
    """The admitted sites in name order."""
    found = read_members(run).members
    return {site: found[site] for site in sorted(found)}


def member(run: RunDir, site: str) -> Member:
    """The admitted site `site`.

    Raises:
        RefusedError: update-stranger.
    """
    found = read_members(run).members.get(site)
    if found is None:
        raise RefusedError("update-stranger")
    return found


def register(run: RunDir, site: str, *, node_key: str, signing_key: str) -> Member:
    """Admit `site` with these keys; its former keys, if it had others, are retired.

    Raises:
        RefusedError: the keys belong to another site or have been retired.
    """
    with _edit(run):
        now = read_members(run)
        if signing_key in now.retired:
            raise RefusedError("update-stranger", "these keys were revoked or replaced", step="join with --renew")
        for other in now.members.values():
            if other.site != site and (other.signing_key == signing_key or other.node_key == node_key):
                raise RefusedError("update-stranger", f"these keys are {other.site}'s", step="make keys at each site")
        old = now.members.get(site)
        if old and (old.node_key, old.signing_key) == (node_key, signing_key):
            return old
        since = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        new = Member(site=site, node_key=node_key, signing_key=signing_key, since=since, serial=now.serial + 1)
        _write(run, new.serial, {**now.members, site: new}, _retire(now, old, keep=signing_key))
        return new


def strike(run: RunDir, site: str) -> Member:
    """Take `site` off the list and retire its keys.

    Raises:
        StateError: no such member.
    """
    with _edit(run):
        now = read_members(run)
        old = now.members.get(site)
        if old is None:
            raise StateError(f"{site} is not a member", step="see the members with `rin-server status`")
        rest = {name: each for name, each in now.members.items() if name != site}
        _write(run, now.serial, rest, _retire(now, old))
        return old


def create(run: RunDir) -> None:
    """Write the empty list of a new run."""
    _write(run, 0, {}, [])


def _retire(now: Members, old: Member | None, *, keep: str = "") -> list[str]:
    if old is None or old.signing_key == keep:
        return now.retired
    return [*now.retired, old.signing_key]


def _write(run: RunDir, serial: int, found: dict[str, Member], retired: list[str]) -> None:
    value = Members(serial=serial, members=found, retired=retired)
    write_json(run.members, value.model_dump(mode="json"))


@contextlib.contextmanager
def _edit(run: RunDir) -> Iterator[None]:
    with lock(run.root / "members.lock", holder="rin-server", wait=True):
        yield
