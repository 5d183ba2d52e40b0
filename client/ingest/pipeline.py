"""Ingest: walk, skim, select, label, decode in workers, commit in order; resumable at every image."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rin.client.home import Home
from rin.client.ingest.cache import Cache
from rin.client.ingest.catalog import Catalog, ImageRow, Known
from rin.client.ingest.explain import explain
from rin.client.ingest.header import Header
from rin.client.ingest.labelling import Labelling, Wanted
from rin.client.ingest.mapping import own_names, read_labels, read_mapping
from rin.client.ingest.pixels import Layout, layout_of
from rin.client.ingest.pseudonyms import Pseudonyms, site_pseudonyms, split_of
from rin.client.ingest.reasons import Refused
from rin.client.ingest.report import IngestReport, Progress
from rin.client.ingest.selection import Identity, anatomy, identity, select
from rin.client.ingest.skim import HEAD, skim
from rin.client.ingest.walk import Found, check_roots, walk
from rin.client.ingest.workers import TIMEOUT_S, WORKERS, Job, Outcome, Pool
from rin.common.errors import ConfigError
from rin.common.files import lock
from rin.common.labels import label_set, label_set_digest

_LOG = logging.getLogger(__name__)
__all__ = ["IngestReport", "Progress", "explain", "ingest"]
COMMIT_IMAGES: Final = 256
_COMMIT_FILES: Final = 4096
_SCANNED: Final = 65536  # files marked in one transaction
_AHEAD: Final = 24  # files under way for each worker
_AHEAD_FRAMES: Final = 4096  # frames under way: 256 MiB of finished pictures
_SITE: Final = re.compile(r"[A-Za-z0-9-]{1,32}")


def ingest(
    home: Home,
    *,
    site: str,
    roots: Sequence[Path],
    labels: Path | None = None,
    mapping: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    workers: int = WORKERS,
    timeout_s: float = TIMEOUT_S,
) -> IngestReport:
    """Bring catalog and cache of `home` in line with the archive below `roots`.

    With `labels` only the images that it names are accepted; without it every image is, without labels. Killed at any
    moment, the next call goes on. An unchanged file (path, size, time, labels) is not read again.

    Raises:
        ConfigError: site name, roots, labels or mapping are wrong.
        StateError: the home belongs to another site or key, or is in use.
        RinError: `disk-full`.
    """
    start = time.monotonic()
    if not _SITE.fullmatch(site):
        raise ConfigError(f"'{site}' is no site name", step="use 1 to 32 letters, digits and hyphens")
    checked = check_roots(roots)
    labelling = Labelling(read_labels(labels) if labels else None, read_mapping(mapping) if mapping else own_names())
    home.catalog.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with lock(home.catalog.with_name("ingest.lock"), holder="rin-client ingest"):
        names = site_pseudonyms(home.pseudonym_key, create=not home.catalog.exists())
        catalog = Catalog(home.catalog)
        pool = Pool(workers=workers, timeout_s=timeout_s)
        try:
            _tie(catalog, names, site)
            cache = Cache(home.cache, slots=catalog.slots)
            run = _Run(home, catalog, cache, pool, names, labelling, checked, progress, _AHEAD * workers)
            run.scan()
            run.read()
            pool.close()
            return run.report(time.monotonic() - start)
        except BaseException:
            pool.cancel()
            raise
        finally:
            catalog.close()


def _tie(catalog: Catalog, names: Pseudonyms, site: str) -> None:
    """One site, one key and one label set for ever."""
    catalog.tie("site", site, step="use --site with the name that this home was made for, or another --home")
    step = "restore the pseudonym key of this catalog, or ingest into another --home"
    catalog.tie("key", names.of("check").hex(), step=step)
    catalog.tie("labels", label_set_digest(), step="ingest into another --home with this release of rin")


@dataclass(slots=True)
class _Item:
    """One file on its way."""

    found: Found
    key: bytes
    stamp: bytes
    known: Known | None
    reason: str | None = None
    header_job: Future[Outcome] | None = None
    pixel_job: Future[Outcome] | None = None
    header: Header | None = None
    modality: str = ""
    who: Identity | None = None
    layout: Layout | None = None
    wanted: Wanted | None = None
    keep: dict[int, int] | None = None  # frame to image id, where the cache holds the pixels already
    open: bool = False
    frames: int = 0  # that are being decoded


@dataclass(slots=True)
class _Run:
    """One ingest: files are decided in the order of the walk, whatever the workers' order."""

    home: Home
    catalog: Catalog
    cache: Cache
    pool: Pool
    names: Pseudonyms
    labelling: Labelling
    roots: list[Path]
    progress: Callable[[Progress], None] | None
    ahead: int
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

    def __post_init__(self) -> None:
        self.number = int(self.catalog.meta("run") or 0) + 1
        self.digest = self.labelling.digest
        self.pinned = self.catalog.pinned()
        self.catalog.set_meta("run", str(self.number))
        self.catalog.set_meta("mapping", self.labelling.mapping.digest)
        self.catalog.commit()
        self._erase()

    def files(self) -> Iterator[Found]:
        for root in self.roots:
            yield from walk(root, leave_out=self.home.root)

    def scan(self) -> None:
        """Count the files, and mark those that the catalog knows: an image whose file is gone may have moved."""
        for found in self.files():
            self.catalog.mark_seen(self.names.path(found.path), self.number)
            self.total += 1
            self._tell("scan")
            if self.total % _SCANNED == 0:
                self.catalog.commit()
        self.catalog.commit()

    def read(self) -> None:
        """Decide on every file."""
        under_way: deque[_Item] = deque()
        frames = 0
        for found in self.files():
            item = self._begin(found)
            if item is None:
                self._count()
                continue
            under_way.append(item)
            frames += item.frames
            while under_way and (len(under_way) > self.ahead or frames > _AHEAD_FRAMES):
                frames -= under_way[0].frames
                self._finish(under_way.popleft())
        while under_way:
            self._finish(under_way.popleft())
        self.catalog.pin_train()
        self._commit()
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
            unmapped=dict(sorted(self.labelling.unmapped.items())),
            decoded=self.accepted,
            seconds=seconds,
        )

    def _begin(self, found: Found) -> _Item | None:
        """Skim and select; None for a file that is known and unchanged."""
        key = self.names.path(found.path)
        stamp = self.names.stamp(found.size, found.mtime_ns)
        known = self.catalog.known(key)
        if known and not known.open and (known.stamp, known.labelling) == (stamp, self.digest):
            return None
        item = _Item(found, key, stamp, known)
        try:
            if found.size < 0:
                raise Refused("unreadable")
            with found.path.open("rb", buffering=0) as file:
                item.header = skim(file.read(HEAD), size=found.size)
            if item.header is None:
                item.header_job = self.pool.submit(Job(found.path))
            else:
                self._select(item)
        except OSError:
            item.reason = "unreadable"
        except Refused as refused:
            item.reason = refused.reason
        return item

    def _select(self, item: _Item) -> None:
        """Everything that can be decided without pixels; submits the decoding of what is left."""
        header = item.header
        if header is None:
            raise Refused("bad-header")
        item.modality = select(header)
        item.who = identity(header)
        item.layout = layout_of(header)
        try:
            item.wanted = self.labelling.wanted(header, item.modality, item.who, (item.found.relative,))
        except Refused as refused:
            item.open = refused.reason == "unmapped-label"
            raise
        item.open = item.wanted.open
        item.keep = self._in_cache(item, self.names.instance(item.who))
        if item.keep is None:
            job = Job(item.found.path, item.modality, item.wanted.decode(), header)
            item.pixel_job = self.pool.submit(job)
            item.frames = item.layout.frames if job.frames is None else len(job.frames)

    def _in_cache(self, item: _Item, instance: bytes) -> dict[int, int] | None:
        """The images of the instance if the cache holds all that are wanted: other labels, or a file that moved.

        Raises:
            Refused: `duplicate-instance`, if the file that they came from is still there.
        """
        frames = self.catalog.frames_of(instance)
        owners = {path_key for _, path_key in frames.values()} - {item.key}
        for owner in owners:
            known = self.catalog.known(owner)
            if known and known.seen == self.number:
                raise Refused("duplicate-instance")
        if not frames or item.wanted is None or item.layout is None:
            return None
        own_change = not owners and (item.known is None or item.known.stamp != item.stamp)
        wanted = item.wanted.decode() or frozenset(range(1, item.layout.frames + 1))
        return None if own_change or wanted - frames.keys() else {frame: frames[frame][0] for frame in wanted}

    def _finish(self, item: _Item) -> None:
        """Wait for the workers and write what was decided."""
        try:
            if item.header_job is not None:
                outcome = item.header_job.result()
                if outcome.reason:
                    raise Refused(outcome.reason)
                item.header = outcome.header
                self._select(item)
            outcome = item.pixel_job.result() if item.pixel_job else Outcome(reason=item.reason)
            if outcome.reason:
                raise Refused(outcome.reason)
            if item.keep is not None:
                self._relabel(item, item.keep)
            else:
                self._add(item, outcome)
        except Refused as refused:
            if refused.reason == "unreadable" and item.known and item.known.reason is None:
                _LOG.warning("a file that was read before cannot be read now; its images are kept")
            else:
                self._forget(item)
                self._close(item, Counter({refused.reason: 1}), accepted=0)
        self._count()

    def _add(self, item: _Item, outcome: Outcome) -> None:
        """Catalog rows for the pictures of one file."""
        if item.header is None or item.who is None or item.layout is None or item.wanted is None:
            raise Refused("bad-header")
        self._forget(item)
        instance = self.names.instance(item.who)
        for owner in {owner for _, owner in self.catalog.frames_of(instance).values()}:
            known = self.catalog.known(owner)
            if known and known.seen == self.number:
                raise Refused("duplicate-instance")  # its twin was under way at the same time
            self.catalog.forget_file(owner)
        reasons: Counter[str] = Counter()
        accepted = 0
        for picture in outcome.pictures:
            digest = self.names.of("pixels", picture.pixels)
            reason = picture.reason or ("duplicate-pixels" if self.catalog.has_digest(digest) else None)
            if reason:
                reasons[reason] += 1
                continue
            row = self._row(item.header, item.layout, item.who, item.modality, picture.frame, digest, picture.policy)
            labelled = ImageRow(**row, labels=item.wanted.of(picture.frame))
            self.catalog.add_image(item.key, labelled, slot=self.cache.slots + len(self.batch))
            self.batch.append(picture.pixels)
            accepted += 1
        reasons["unmapped-label"] += item.wanted.unmapped_frames
        reasons["unlabelled"] += item.layout.frames - len(outcome.pictures) - item.wanted.unmapped_frames
        self._close(item, +reasons, accepted=accepted)

    def _row(
        self, header: Header, layout: Layout, who: Identity, modality: str, frame: int, digest: bytes, policy: str
    ) -> dict[str, Any]:
        patient = self.names.patient(who)
        return {
            "patient": patient,
            "study": self.names.of("study", who.study),
            "series": self.names.of("series", who.series),
            "instance": self.names.instance(who),
            "frame": frame,
            "modality": modality,
            "anatomy": anatomy(header, modality),
            "split": "train" if patient in self.pinned else split_of(patient),
            "digest": digest,
            "policy": policy,
            "rows": layout.rows,
            "cols": layout.cols,
            "bits": layout.stored,
            "photometric": layout.photometric,
            "syntax": layout.syntax,
            "lossy": header.text("LossyImageCompression") == "01",
        }

    def _relabel(self, item: _Item, keep: dict[int, int]) -> None:
        """The pixels stay; labels and file change. Frames that are not wanted any more go."""
        if item.wanted is None or item.layout is None or item.who is None:
            raise Refused("bad-header")
        owners = {owner for _, owner in self.catalog.frames_of(self.names.instance(item.who)).values()}
        for frame, image in keep.items():
            self.catalog.relabel(image, item.wanted.of(frame), b"")
        for key in owners | {item.key}:
            self.catalog.forget_file(key)
        for frame, image in keep.items():
            self.catalog.relabel(image, item.wanted.of(frame), item.key)
        left_out = item.layout.frames - len(keep) - item.wanted.unmapped_frames
        reasons = Counter({"unmapped-label": item.wanted.unmapped_frames, "unlabelled": left_out})
        self._close(item, +reasons, accepted=len(keep))
        self.accepted -= len(keep)

    def _close(self, item: _Item, reasons: Counter[str], *, accepted: int) -> None:
        """The file's own row, and its reasons."""
        if not accepted and not reasons:
            reasons = Counter({"no-pixels": 1})
        for reason, count in reasons.items():
            self.catalog.refuse(item.key, reason, count)
        main = None if accepted else min(reasons, key=lambda reason: (-reasons[reason], reason))
        self.catalog.put_file(
            item.key, stamp=item.stamp, labelling=self.digest, reason=main, open_=item.open, run=self.number
        )
        self.accepted += accepted
        self.refused += main is not None
        self.uncommitted += 1
        if len(self.batch) >= COMMIT_IMAGES or self.uncommitted >= _COMMIT_FILES:
            self._commit()

    def _forget(self, item: _Item) -> None:
        if item.known is not None:
            self.catalog.forget_file(item.key)

    def _commit(self) -> None:
        """Pixels, fsync, then the catalog's transaction; only then are removed images overwritten."""
        if self.batch:
            self.cache.append(self.batch)
            self.batch = []
        self.catalog.set_meta("slots", str(self.cache.slots))
        self.catalog.commit()
        self.uncommitted = 0
        self._erase()

    def _erase(self) -> None:
        if slots := self.catalog.erased():
            self.cache.erase(slots)
            self.catalog.clear_erased(slots)
            self.catalog.commit()

    def _count(self) -> None:
        self.done += 1
        self._tell("read")

    def _tell(self, stage: str, *, last: bool = False) -> None:
        now = time.monotonic()
        if self.progress and (last or now - self.told > 0.2):
            self.told = now
            self.progress(Progress(stage, self.done, self.total, self.accepted, self.refused))
