"""One run of an ingest: files in the order of the walk, each decided by the layout's source; commit, resume, report."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from rin.client.home import Home
from rin.client.ingest.cache import Cache, unread
from rin.client.ingest.catalog import Catalog, ImageRow, Known
from rin.client.ingest.pseudonyms import Pseudonyms
from rin.client.ingest.reasons import Refused
from rin.client.ingest.report import IngestReport, Progress
from rin.client.ingest.walk import Found, walk
from rin.client.ingest.workers import Pool
from rin.common.errors import StateError
from rin.common.labels import label_set

_LOG = logging.getLogger(__name__)
COMMIT_IMAGES: Final = 256
_COMMIT_FILES: Final = 4096
_ERASED: Final = 2048  # images overwritten at once; a reader waits for them
_SCANNED: Final = 65536  # files marked in one transaction
_AHEAD_FRAMES: Final = 4096  # frames under way: 256 MiB of finished pictures


@dataclass(slots=True)
class Item:
    """One file on its way."""

    found: Found
    key: bytes
    stamp: bytes
    known: Known | None
    reason: str | None = None
    open: bool = False  # a label was not known: the file is looked at again in every run
    frames: int = 0  # that are being decoded
    finish: Callable[[], None] | None = None


class Source(Protocol):
    """What a layout answers about its files. `begin` and what it returns raise `Refused` against a file."""

    @property
    def patients_known(self) -> bool:
        """Whether the archive says whose image a file is."""
        ...

    @property
    def digest(self) -> bytes:
        """16 bytes that change when the labels do: every file is then looked at again."""
        ...

    @property
    def unmapped(self) -> Counter[str]:
        """Labels that nothing maps, to images."""
        ...

    def start(self, run: Run) -> None:
        """The catalog is there; nothing was walked yet."""
        ...

    def begin(self, run: Run, item: Item) -> Callable[[], None]:
        """Decide what needs no pixels and hand the rest to the workers; what is returned waits for them, and ends
        with `run.close`."""
        ...

    def end(self, run: Run) -> None:
        """Every file was decided."""
        ...

    def facts(self, run: Run) -> dict[str, int]:
        """Counts of its own for the report."""
        ...


@dataclass(slots=True)
class Run:
    """One ingest: files are decided in the order of the walk, whatever the workers' order."""

    home: Home
    catalog: Catalog
    cache: Cache
    pool: Pool
    names: Pseudonyms
    source: Source
    roots: list[Path]
    progress: Callable[[Progress], None] | None
    ahead: int
    warn: Callable[[str], None]
    number: int = field(init=False)
    digest: bytes = field(init=False)
    pinned: frozenset[bytes] = field(init=False)
    batch: list[bytes] = field(default_factory=list)
    uncommitted: int = 0
    total: int = 0
    done: int = 0
    accepted: int = 0
    refused: int = 0
    told: float = 0.0
    pruned: int = 0
    closed: int = 0  # folders that cannot be listed
    empty: list[Path] = field(default_factory=list)  # roots without a file

    def __post_init__(self) -> None:
        self.number = int(self.catalog.meta("run") or 0) + 1
        self.digest = self.source.digest
        self.pinned = self.catalog.pinned()
        self.catalog.set_meta("run", str(self.number))
        self.source.start(self)
        self.catalog.commit()
        self._erase()

    def files(self) -> Iterator[Found]:
        for root in self.roots:
            yield from walk(root, leave_out=self.home.root)

    def scan(self) -> None:
        """Count the files, and mark those that the catalog knows: an image whose file is gone may have moved."""
        for root in self.roots:
            readable = 0
            for found in walk(root, leave_out=self.home.root):
                self.catalog.mark_seen(self.names.path(found.path), self.number)
                self.total += 1
                self.closed += found.folder
                readable += found.size >= 0
                self._tell("scan")
                if self.total % _SCANNED == 0:
                    self.catalog.commit()
            if not readable:
                self.empty.append(root)
                self.warn(f"{root} holds no file that can be read: is it mounted, and is it the right folder?")
        if self.catalog.gone.since(self.number, int(self.catalog.meta("finished") or 0)):
            self.catalog.gone.look_again("duplicate-instance")  # its twin may be what is gone
        self.catalog.commit()

    def check_prune(self) -> None:
        """See that what this run did not find is gone, and not merely out of sight.

        Raises:
            StateError: a root is empty, a folder cannot be listed, or the last run had other roots.
        """
        step = "mount the archive and look at the folder's permissions, then run it again; nothing was removed"
        if self.empty:
            raise StateError(f"{len(self.empty)} of {len(self.roots)} archive folders hold no file", step=step)
        if self.closed:
            raise StateError(f"{self.closed} folders of the archive cannot be listed", step=step)
        if self.number > 1 and set((self.catalog.meta("roots") or "?").split()) - self._roots():
            raise StateError(
                "the last ingest that came to its end read other archive folders than this one",
                step="name every folder, or run it without --prune first and look at what is gone; nothing was removed",
            )

    def prune(self) -> None:
        """Remove the images whose files are gone, rows and pixels; what repeated one of them is then read again."""
        before = self.catalog.gone.images()
        while gone := self.catalog.gone.files(self.number):
            for key in gone:
                self.catalog.forget_file(key)
            self.commit()
        self.pruned = before - self.catalog.gone.images()
        if self.pruned:
            self.catalog.gone.look_again("duplicate-instance", "duplicate-pixels")
            self.read(again=True)

    def finish(self) -> None:
        """Every file was seen and decided: what was not seen is gone."""
        self.catalog.set_meta("roots", " ".join(sorted(self._roots())))
        self.catalog.set_meta("finished", str(self.number))
        self.commit()

    def read(self, *, again: bool = False) -> None:
        """Decide on every file, or `again` on those that are to be looked at once more."""
        under_way: deque[Item] = deque()
        frames = 0
        for found in self.files():
            item = self._begin(found, again=again)
            if item is None:
                self.done += not again
                self._tell("read")
                continue
            under_way.append(item)
            frames += item.frames
            keep = self.ahead if len(under_way) <= self.ahead else self.ahead // 2  # in bursts: each wait costs
            while under_way and (len(under_way) > keep or frames > _AHEAD_FRAMES):
                frames -= under_way[0].frames
                self._finish(under_way.popleft())
                self.done += not again
        while under_way:
            self._finish(under_way.popleft())
            self.done += not again
        self.source.end(self)
        self.commit()
        self._tell("read", last=True)

    def report(self, seconds: float) -> IngestReport:
        files, good, images = self.catalog.totals(self.number)
        labels = label_set()
        counts = {labels[index].name: count for index, count in self.catalog.label_counts(self.number).items()}
        return IngestReport(
            files=files,
            accepted=images,
            accepted_files=good,
            refused=self.catalog.refused_files(self.number),
            refused_images=self.catalog.refused_images(self.number),
            labels=counts,
            unmapped=dict(sorted(self.source.unmapped.items())),
            decoded=self.accepted,
            seconds=seconds,
            patients_known=self.source.patients_known,
            facts=self.source.facts(self),
            gone=self.catalog.gone.count(self.number, self.digest, patients_known=self.source.patients_known),
            pruned=self.pruned,
            to_erase=len(self.catalog.erased()),
            empty_roots=len(self.empty),
        )

    def add(self, item: Item, row: ImageRow, pixels: bytes) -> int:
        """One more image of a file, into catalog and cache; returns its id."""
        image = self.catalog.add_image(item.key, row, slot=self.cache.slots + len(self.batch))
        self.batch.append(pixels)
        return image

    def close(self, item: Item, reasons: Counter[str], *, accepted: int, decoded: int | None = None) -> None:
        """The file's own row, and its reasons.

        Args:
            accepted: images of the catalog that are this file's.
            decoded: how many of them this run added; None means all.
        """
        if not accepted and not reasons:
            reasons = Counter({"no-pixels": 1})
        for reason, count in reasons.items():
            self.catalog.refuse(item.key, reason, count)
        main = None if accepted else min(reasons, key=lambda reason: (-reasons[reason], reason))
        self.catalog.put_file(
            item.key, stamp=item.stamp, labelling=self.digest, reason=main, open_=item.open, run=self.number
        )
        self.accepted += accepted if decoded is None else decoded
        self.refused += main is not None
        self._commit_if_due()

    def keep(self, item: Item) -> None:
        """A file whose image, or reason, is what it was."""
        known = self.catalog.known(item.key)
        reason = known.reason if known else None
        self.catalog.put_file(
            item.key, stamp=item.stamp, labelling=self.digest, reason=reason, open_=item.open, run=self.number
        )
        self.refused += reason is not None
        self._commit_if_due()

    def forget(self, item: Item) -> None:
        """What was known of the file before."""
        if item.known is not None:
            self.catalog.forget_file(item.key)

    def commit(self) -> None:
        """Pixels, fsync, then the catalog's transaction; only then are removed images overwritten."""
        if self.batch:
            self.cache.append(self.batch)
            self.batch = []
        self.catalog.set_meta("slots", str(self.cache.slots))
        self.catalog.commit()
        self.uncommitted = 0
        self._erase()

    def _roots(self) -> set[str]:
        return {self.names.path(root).hex() for root in self.roots}

    def _begin(self, found: Found, *, again: bool) -> Item | None:
        """None for a file that is known and unchanged."""
        key = self.names.path(found.path)
        stamp = self.names.stamp(found.size, found.mtime_ns)
        known = self.catalog.known(key)
        if known and not known.open and (known.stamp, known.labelling) == (stamp, self.digest):
            return None
        if again and (known is None or known.stamp):
            return None
        item = Item(found, key, stamp, known)
        try:
            if found.size < 0:
                raise Refused("unreadable")
            item.finish = self.source.begin(self, item)
        except OSError:
            item.reason = "unreadable"
        except Refused as refused:
            item.reason = refused.reason
        return item

    def _finish(self, item: Item) -> None:
        try:
            if item.finish is None:
                raise Refused(item.reason or "unreadable")
            item.finish()
        except Refused as refused:
            if refused.reason == "unreadable" and item.known and item.known.reason is None:
                _LOG.warning("a file that was read before cannot be read now; its images are kept")
            else:
                self.forget(item)
                self.close(item, Counter({refused.reason: 1}), accepted=0)
        self._tell("read")

    def _commit_if_due(self) -> None:
        self.uncommitted += 1
        if len(self.batch) >= COMMIT_IMAGES or self.uncommitted >= _COMMIT_FILES:
            self.commit()

    def _erase(self) -> None:
        """Overwrite removed images, but under nobody who reads the cache: then a later commit, or run, does it."""
        while slots := self.catalog.erased(_ERASED):
            with unread(self.home.cache_lock) as free:
                if not free:
                    return
                self.cache.erase(slots)
            self.catalog.clear_erased(slots)
            self.catalog.commit()

    def _tell(self, stage: str, *, last: bool = False) -> None:
        now = time.monotonic()
        if self.progress and (last or now - self.told > 0.2):
            self.told = now
            self.progress(Progress(stage, self.done, self.total, self.accepted, self.refused))
