"""Receipts: the one way in which an update of a site comes to lie, checked and for good, on the coordinator's disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from rin.common.errors import RefusedError, RinError, TransferError
from rin.common.files import BLOCK, lock, publish, read_json, write_json
from rin.common.keys import decode, encode, verify
from rin.common.layout import NOTHING, Layout
from rin.common.plan import SITE_NAME
from rin.common.wire import MAX_MANIFEST, Manifest, Request, from_bytes
from rin.server import members, tickets
from rin.server.rundir import RunDir
from rin.server.tickets import Grant

RESERVE: Final = 1 << 30  # bytes that stay free on the run directory's disk


@dataclass(frozen=True, slots=True)
class Receipt:
    """One site's checked update of one round: `path` is its weight file, mode 0400."""

    site: str
    manifest: Manifest
    signature: bytes
    path: Path


def read_layout(run: RunDir) -> Layout:
    """The plan's weight layout, from layout.json."""
    return Layout.from_json(read_json(run.layout))


def receipt(run: RunDir, number: int, site: str) -> Receipt | None:
    """The receipt of `site` in round `number`; None if there is none that holds with the site's key of today.

    The signature is verified again at each read; the tensor bytes are not hashed again (`Layout.check` does that).
    """
    path = run.receipts(number) / f"{site}.safetensors"
    record = path.with_suffix(".json")
    if not record.exists() or not path.exists():
        return None
    try:
        value = read_json(record)
        manifest = from_bytes(Manifest, value["manifest"].encode(), code="update-manifest")
        signature = decode(value["signature"])
        key = members.member(run, site).signing_key
    except (RinError, KeyError, TypeError, AttributeError):
        return None
    if signature is None or (manifest.round, manifest.site) != (number, site):
        return None
    if not verify(key, manifest.signed_bytes(), signature):
        return None
    return Receipt(site, manifest, signature, path)


def receipts(run: RunDir, number: int) -> list[Receipt]:
    """Every receipt of round `number`, sorted by site name."""
    names = sorted(path.stem for path in run.receipts(number).glob("*.json") if SITE_NAME.fullmatch(path.stem))
    return [found for name in names if (found := receipt(run, number, name)) is not None]


def drop(run: RunDir, number: int, site: str) -> None:
    """Forget the uncounted receipt of `site` in an open round, and what was half uploaded; its tickets go first.

    An upload that runs meanwhile ends at its own check of the ticket.
    """
    folder = run.receipts(number)
    (folder / f"{site}.json").unlink(missing_ok=True)
    (folder / f"{site}.safetensors").unlink(missing_ok=True)
    for part in folder.glob(f".{site}.*.part"):
        part.unlink(missing_ok=True)


def _lock_path(run: RunDir, number: int, site: str) -> Path:
    return run.receipts(number) / f".{site}.lock"


class Receiver:
    """Takes in one update. `with` makes it the only writer for this site and round.

    The manifest is checked before a byte of the update is asked for; the file's header is compared as it arrives with
    the one that the plan's layout prescribes; `finish` publishes. What has arrived stays on disk, named by site,
    request and digest, until it is whole, wrong, or the round closes.

    Args:
        token: the ticket; it is checked again before publishing, because rounds close and sites are revoked meanwhile.

    Raises:
        RefusedError: update-stranger, update-late, update-duplicate, update-manifest, update-signature.
    """

    def __init__(self, run: RunDir, token: str, manifest: bytes, signature: bytes, *, reserve: int = RESERVE) -> None:
        self.run, self._token, self._reserve = run, token, reserve
        self.grant = tickets.check(run, token)
        self.manifest = self._checked(manifest, signature)
        self.signature = signature
        whole = read_layout(run)
        self.weights_bytes = whole.file_bytes  # of a file of the plan's layout, whatever this update is
        self.layout = whole if self.manifest.steps else NOTHING
        self.total = self.layout.file_bytes
        self._header = self.layout.header()
        name = f".{self.grant.site}.{self.manifest.request}.{self.manifest.update}.part"
        self._part = run.receipts(self.grant.round) / name
        self._target = run.receipts(self.grant.round) / f"{self.grant.site}.safetensors"
        self._held = contextlib.ExitStack()
        self._file: BinaryIO | None = None
        self._sha = hashlib.sha256()
        self._size = 0
        self._refuse_duplicate()

    def _checked(self, data: bytes, signature: bytes) -> Manifest:
        if len(data) > MAX_MANIFEST:
            raise RefusedError("update-manifest")
        manifest = from_bytes(Manifest, data, code="update-manifest")
        manifest.check(expected_request(self.run, self.grant))
        if not verify(members.member(self.run, self.grant.site).signing_key, manifest.signed_bytes(), signature):
            raise RefusedError("update-signature")
        return manifest

    def _refuse_duplicate(self) -> None:
        if receipt(self.run, self.grant.round, self.grant.site) is not None:
            raise RefusedError("update-duplicate")

    def offset(self) -> int:
        """Bytes of this very update that have arrived."""
        with contextlib.suppress(FileNotFoundError):
            return self._part.lstat().st_size
        with contextlib.suppress(FileNotFoundError):  # a crash fell between file and record
            return self._target.lstat().st_size
        return 0

    def reserve(self) -> None:
        """Check that the rest of the update fits the disk.

        Raises:
            TransferError: disk-full.
        """
        free = shutil.disk_usage(self.run.root).free
        if free < self.total - self.offset() + self._reserve:
            raise TransferError("the coordinator's disk reserve is reached", code="disk-full", step="free disk space")

    def __enter__(self) -> Self:
        """Become the one writer, and hash again what has arrived.

        Raises:
            TransferError: another connection is still writing; try again later.
            RefusedError: update-duplicate, update-header.
        """
        try:
            path = _lock_path(self.run, self.grant.round, self.grant.site)
            self._held.enter_context(lock(path, holder="rin-server"))
        except RinError:
            raise TransferError("another connection is sending this update") from None
        try:
            self._refuse_duplicate()
            self._adopt()
            self._file = self._open()
            self._rehash(self._file)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go; what has arrived stays. May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._held.close()

    def _adopt(self) -> None:
        """Make a published file without a valid record the partial file again; drop partials of other updates."""
        folder = self._part.parent
        for part in folder.glob(f".{self.grant.site}.*.part"):
            if part != self._part:
                part.unlink(missing_ok=True)
        self._target.with_suffix(".json").unlink(missing_ok=True)
        if self._target.exists():
            self._target.chmod(0o600)
            self._target.replace(self._part)

    def _open(self) -> BinaryIO:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        return os.fdopen(os.open(self._part, flags, 0o600), "rb+", buffering=0)

    def _rehash(self, file: BinaryIO) -> None:
        file.seek(0)
        while block := file.read(BLOCK):
            self._take(block)
        if self._size > self.total:
            self._refuse("update-length")

    def _take(self, block: bytes) -> None:
        """Compare and hash the next bytes of the file."""
        ahead = self._header[self._size : self._size + len(block)]
        if block[: len(ahead)] != ahead:
            self._refuse("update-header")
        self._sha.update(memoryview(block)[len(ahead) :])
        self._size += len(block)

    def append(self, pieces: Iterable[bytes]) -> None:
        """Take the next bytes.

        Raises:
            RefusedError: update-header, update-length; what had arrived is dropped.
        """
        assert self._file is not None, "append outside of with"
        for piece in pieces:
            if self._size + len(piece) > self.total:
                self._refuse("update-length")
            self._take(piece)
            view = memoryview(piece)
            while view:
                view = view[self._file.write(view) :]

    def finish(self) -> Receipt:
        """Publish the whole update: the weight file first, its record second, which makes it a receipt.

        Raises:
            RefusedError: update-length, update-digest (both drop what had arrived), update-late, update-stranger.
        """
        assert self._file is not None, "finish outside of with"
        if self._size != self.total:
            raise RefusedError("update-length")
        if self._sha.hexdigest() != self.manifest.update:
            self._refuse("update-digest")
        os.fsync(self._file.fileno())
        tickets.check(self.run, self._token)
        try:
            if not publish(self._part, self._target):
                raise RefusedError("update-duplicate")
        except FileNotFoundError:  # the round closed and took the partial file along
            raise RefusedError("update-late") from None
        manifest = self.manifest.to_bytes().decode()
        record = {"manifest": manifest, "signature": encode(self.signature)}
        write_json(self._target.with_suffix(".json"), record, mode=0o400)
        return Receipt(self.grant.site, self.manifest, self.signature, self._target)

    def _refuse(self, code: str) -> None:
        self._part.unlink(missing_ok=True)
        raise RefusedError(code)


def weights_for(run: RunDir, token: str, digest: str) -> Path:
    """The file of the global weights `digest`, if `token` opens it.

    Raises:
        RefusedError: update-stranger, update-late, update-duplicate (the ticket is spent), bad-weights (other weights
            than the ticket's, or none there).
    """
    grant = tickets.check(run, token)
    if receipt(run, grant.round, grant.site) is not None:
        raise RefusedError("update-duplicate")
    path = run.weights_file(digest)
    if digest != grant.base or not path.is_file():
        raise RefusedError("bad-weights")
    return path


def expected_request(run: RunDir, grant: Grant) -> Request:
    """The request that a manifest under `grant` has to answer; its deadline plays no part in that."""
    facts: dict[str, Any] = read_json(run.facts)
    return Request(
        run=facts["run"], round=grant.round, site=grant.site, plan=grant.plan, base=grant.base, deadline_s=1.0
    )


def blocks(path: Path, *, offset: int = 0) -> Iterator[bytes]:
    """The bytes of `path` from `offset` on."""
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(BLOCK):
            yield block


def accept_file(run: RunDir, token: str, manifest: bytes, signature: bytes, path: Path) -> Receipt:
    """Take in the update at `path` from the same machine, by the same checks as the gateway's.

    Raises:
        RefusedError: with the reason; no receipt exists then.
    """
    with Receiver(run, token, manifest, signature) as receiver:
        receiver.append(blocks(path, offset=receiver.offset()))
        return receiver.finish()
