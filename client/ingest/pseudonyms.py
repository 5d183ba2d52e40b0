"""Keyed pseudonyms: what stands in the catalog instead of identifiers, paths and pixels."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rin.client.ingest.selection import Identity
from rin.common.errors import StateError
from rin.common.files import fsync_dir

BYTES: Final = 16  # 128 bits of HMAC-SHA256


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """HMAC-SHA256 with the site's key: unkeyed hashes of record numbers are undone by counting through them."""

    key: bytes

    @property
    def id(self) -> str:
        """16 bytes as hex that name the key and tell nothing of it: the id of this population of patients."""
        return self.of("check").hex()

    def of(self, kind: str, *parts: bytes) -> bytes:
        """16 bytes that stand for `parts`; `kind` keeps a patient's and an instance's apart."""
        return hmac.digest(self.key, b"\0".join((kind.encode(), *parts)), hashlib.sha256)[:BYTES]

    def patient(self, identity: Identity) -> bytes:
        """One person at one issuer of record numbers."""
        return self.of("patient", identity.issuer, identity.patient)

    def instance(self, identity: Identity) -> bytes:
        """One SOP instance; computable again from its UID, for deletion."""
        return self.of("instance", identity.instance)

    def path(self, path: Path | str) -> bytes:
        """One file, by its absolute path."""
        return self.of("path", os.fsencode(path))

    def stamp(self, size: int, mtime_ns: int) -> bytes:
        """Size and time of change of a file, so that an unchanged one is known without keeping a date."""
        return self.of("stamp", f"{size} {mtime_ns}".encode())


def split_of(patient: bytes) -> str:
    """75 % train, 10 % val, 15 % test by threshold on the pseudonym: stable for ever, whatever else is ingested."""
    share = int.from_bytes(patient[:8], "big") / 2**64
    return "train" if share < 0.75 else "val" if share < 0.85 else "test"


def site_pseudonyms(path: Path, *, create: bool) -> Pseudonyms:
    """The site's key at `path`, made (32 random bytes, 0600, directory 0700) if `create` and missing.

    Raises:
        StateError: the key is missing or has another length.
    """
    if create and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.chmod(0o700)
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(part, path)  # a second ingest that was quicker keeps its key
        part.unlink()
        fsync_dir(path.parent)
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        raise StateError(f"{path} is missing", step="run `rin-client ingest` first, or restore the key") from None
    if len(key) != 32:
        raise StateError(f"{path} is not a pseudonym key", step="restore it from its own backup")
    return Pseudonyms(key)
