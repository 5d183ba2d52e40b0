"""The ledger of privacy: every debit of a patient population, append-only, a hash chain, its anchor apart from it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import syslog
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from rin.common.chain import (
    HELPLESS,
    START,
    Adopt,
    Anchor,
    Debit,
    Entry,
    Fault,
    Head,
    LedgerError,
    Payload,
    compose,
    debits,
    end_of_line,
    parse_anchor,
    rechain,
    walk,
)
from rin.common.errors import ConfigError, RefusedError, StateError
from rin.common.files import canonical_json, fsync_dir, lock, write_atomic

__all__ = ["Adopt", "Debit", "Entry", "Head", "Ledger", "LedgerError", "debits"]
log = logging.getLogger(__name__)


class Ledger:
    """The ledger at `path` of one population.

    What an entry goes through: its line into the anchor, the line into the ledger, its head into the anchor; each is on
    the disk before the next begins, and only then is it acknowledged. So at any moment the ledger is exactly what its
    anchor says, but for a part of the one line that the anchor holds as well; the next writer completes it. An entry
    that was on its way when the process died counts as spent. Every other difference is a fault.
    """

    def __init__(self, path: Path, anchor: Path, population: str) -> None:
        """
        Args:
            anchor: the second file, apart from the ledger.
            population: 16 bytes as hex, the id of the pseudonym key.
        """
        self.path, self.anchor, self.population = path, anchor, population
        self._lock = path.with_suffix(".lock")
        self._seen = path.with_suffix(".seen")  # the coordinator's head that was last looked for in vain

    def create(self) -> bool:
        """Make an empty ledger (0600) where neither it nor its anchor exists; whether it was made.

        A creation that was interrupted is completed; anything else that is there is left as it is.
        """
        fresh = Anchor(population=self.population, head=START).to_bytes()
        with self._locked():
            if self.path.exists() or (self.anchor.exists() and self.anchor.read_bytes() != fresh):
                return False
            write_atomic(self.anchor, fresh, mode=0o600)
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            fsync_dir(self.path.parent)
        return True

    def entries(self) -> list[Entry]:
        """All entries, after the whole chain, its numbers, its population and its anchor have been verified.

        Raises:
            LedgerError: any fault.
        """
        return self._read()[1]

    @property
    def head(self) -> Head:
        """Where the verified ledger ends.

        Raises:
            LedgerError: any fault.
        """
        entries = self.entries()
        return entries[-1].head if entries else START

    def contains(self, count: int, digest: str) -> bool:
        """Whether the verified chain went through this head, or a person adopted it since.

        Raises:
            LedgerError: any fault.
        """
        heads = [START]
        for entry in self.entries():
            heads.append(entry.head)
            if isinstance(entry.payload, Adopt):
                heads += filter(None, (entry.payload.anchor, entry.payload.coordinator))
        return any((count, digest) == (head.count, head.digest) for head in heads)

    def require(self, seen: Head) -> None:
        """Refuse unless the chain contains the head that the coordinator last saw; `adopt` then knows which it was.

        Raises:
            LedgerError: `head`, or any other fault.
        """
        if not self.contains(seen.count, seen.digest):
            write_atomic(self._seen, canonical_json(seen.model_dump()), mode=0o600)
            raise LedgerError("head", self.path, line=seen.count)
        self._seen.unlink(missing_ok=True)

    def debit(self, debit: Debit, allow: Callable[[Sequence[Entry]], None]) -> Entry:
        """Append `debit`; when this returns it is on the disk and stays there, whatever dies.

        Args:
            allow: called with all entries so far while the ledger is locked; raises RefusedError to stop the debit.

        Raises:
            LedgerError: any fault.
            RefusedError: `allow` refused, or the attempt has been debited before.
            OSError: the disk is full, or worse. The debit then may count or not; it does not count twice.
        """
        with self._locked():
            entries = self._settle()
            if any(debit.attempt == old.attempt for old in debits(entries)):
                raise RefusedError("ledger", "this attempt has its debit", step="draw a new attempt for a new training")
            allow(entries)
            return self._append(entries, "debit", debit)

    def adopt(self, reason: str) -> Entry:
        """Take the history as it is on a person's word, and write the word down.

        Where lines were damaged the others are kept, and the damaged file under another name.

        Raises:
            LedgerError: unreadable, or of another population or a newer release: nobody's word helps there.
            StateError: nothing is wrong.
            ConfigError: the reason is empty, too long, or holds control characters.
        """
        with self._locked():
            fault = self._dispute()
            try:
                word = Adopt(reason=reason, fault=fault, anchor=self._anchored(), coordinator=self._wanted())
            except ValidationError:
                raise ConfigError("no such reason", step="give --reason in 1 to 500 letters, in one line") from None
            entry = self._append(self._mend(), "adopt", word)
            self._seen.unlink(missing_ok=True)
            return entry

    # --- reading

    def _read(self) -> tuple[Anchor, list[Entry], bytes]:
        """The anchor, all entries, and the bytes of the last one that are not in the ledger yet."""
        while True:  # a writer renews the anchor before and after each entry: until it stands still
            before = self._bytes(self.anchor, "no-anchor")
            data = self._bytes(self.path, "missing")
            if self._bytes(self.anchor, "no-anchor") == before:
                break
        anchor = parse_anchor(before, self.path)
        if anchor.population != self.population:
            raise LedgerError("population", self.path)
        count, found = anchor.head.count, data.count(b"\n")
        if found < count:
            raise LedgerError("short", self.path, anchored=count, found=found)
        rest = data[end_of_line(data, count) :]
        if anchor.line and not (anchor.tail.startswith(rest) or rest.startswith(anchor.tail)):
            raise LedgerError("edited", self.path, line=count + 1)
        missing = anchor.tail[len(rest) :]
        entries = list(walk(data + missing, self.population, self.path))
        if count == 0 and anchor.head != START:
            raise LedgerError("anchor", self.path)
        if count and entries[count - 1].digest != anchor.head.digest:
            raise LedgerError("edited", self.path, line=count)
        if len(entries) > count + bool(anchor.line):
            raise LedgerError("long", self.path, anchored=count, found=found)
        return anchor, entries, missing

    def _bytes(self, path: Path, absent: Fault) -> bytes:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise LedgerError(absent, self.path) from None
        except OSError as error:
            raise LedgerError("unreadable", self.path, detail=os.strerror(error.errno or 0)) from None

    # --- writing, under the lock

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock(self._lock, holder="rin-client", wait=True))
            except OSError as error:
                raise LedgerError("unreadable", self.path, detail=os.strerror(error.errno or 0)) from None
            yield

    def _settle(self) -> list[Entry]:
        """All entries; the one that a dead process left half written is completed first."""
        anchor, entries, missing = self._read()
        if anchor.line:
            log.info("completing entry %d, which was being written when its process died", entries[-1].number)
            self._write(missing)
            self._anchor_at(entries[-1].head)
        return entries

    def _append(self, entries: Sequence[Entry], kind: str, payload: Payload) -> Entry:
        last = entries[-1].head if entries else START
        now = datetime.now(UTC).isoformat(timespec="seconds")
        text = compose(last, self.population, now, kind, payload)
        digest = hashlib.sha256(text).hexdigest()
        entry = Entry(last.count + 1, now, payload, digest)
        anchor = Anchor(population=self.population, head=last, line=text.decode(), digest=digest)
        write_atomic(self.anchor, anchor.to_bytes(), mode=0o600)
        self._write(anchor.tail)
        self._anchor_at(entry.head)
        # Apart from the vault there is then a second witness; it says how many entries, and nothing of what is in them.
        syslog.syslog(syslog.LOG_NOTICE, f"rin privacy ledger: {entry.number} entries, head {digest}")
        return entry

    def _write(self, data: bytes) -> None:
        """Append `data` with one write, durably."""
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        finally:
            os.close(fd)

    def _anchor_at(self, head: Head) -> None:
        write_atomic(self.anchor, Anchor(population=self.population, head=head).to_bytes(), mode=0o600)

    # --- a person's word

    def _dispute(self) -> Fault:
        """What a person's word would settle."""
        try:
            self._settle()
        except LedgerError as error:
            if error.fault in HELPLESS:
                raise
            return error.fault
        wanted = self._wanted()
        if wanted is None or self.contains(wanted.count, wanted.digest):
            raise StateError("nothing is wrong with the ledger", step="look at it with `rin-client ledger show`")
        return "head"

    def _mend(self) -> list[Entry]:
        """A whole chain of what can be read, whatever the anchor says; its entries.

        Where that loses an anchored entry, the fault stays one until the anchor holds the person's word, which is the
        next thing to be written.
        """
        data = self.path.read_bytes() if self.path.exists() else None
        whole = rechain(data or b"", self.population, self.path)
        if data and whole != data:
            name = f"{self.path.stem}.damaged-{hashlib.sha256(data).hexdigest()[:8]}{self.path.suffix}"
            write_atomic(self.path.with_name(name), data, mode=0o600)
        if whole != data:
            write_atomic(self.path, whole, mode=0o600)
        return list(walk(whole, self.population, self.path))

    def _anchored(self) -> Head | None:
        with contextlib.suppress(LedgerError):
            return parse_anchor(self._bytes(self.anchor, "no-anchor"), self.path).head
        return None

    def _wanted(self) -> Head | None:
        with contextlib.suppress(LedgerError, ValidationError):
            return Head.model_validate_json(self._bytes(self._seen, "missing"))
        return None
