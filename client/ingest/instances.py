"""A DICOM archive as a source of images: skim, select, label, decode in workers; one instance of each UID."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rin.client.ingest.catalog import ImageRow
from rin.client.ingest.header import Header
from rin.client.ingest.labelling import Labelling, Wanted
from rin.client.ingest.pixels import Layout, layout_of
from rin.client.ingest.pseudonyms import split_of
from rin.client.ingest.reasons import Refused
from rin.client.ingest.selection import Identity, anatomy, identity, select
from rin.client.ingest.skim import HEAD, skim
from rin.client.ingest.workers import Job, Outcome

if TYPE_CHECKING:
    from rin.client.ingest.run import Item, Run


@dataclass(slots=True)
class _Instance:
    """One DICOM file on its way."""

    item: Item
    header_job: Future[Outcome] | None = None
    pixel_job: Future[Outcome] | None = None
    header: Header | None = None
    modality: str = ""
    who: Identity | None = None
    layout: Layout | None = None
    wanted: Wanted | None = None
    keep: dict[int, int] | None = None  # frame to image id, where the cache holds the pixels already


class Instances:
    """The source of layout `dicom`, see `run.Source`."""

    patients_known = True

    def __init__(self, labelling: Labelling) -> None:
        self._labelling = labelling

    @property
    def digest(self) -> bytes:
        return self._labelling.digest

    @property
    def unmapped(self) -> Counter[str]:
        return self._labelling.unmapped

    def start(self, run: Run) -> None:
        run.catalog.set_meta("mapping", self._labelling.mapping.digest)

    def begin(self, run: Run, item: Item) -> Callable[[], None]:
        one = _Instance(item)
        with item.found.path.open("rb", buffering=0) as file:
            one.header = skim(file.read(HEAD), size=item.found.size)
        if one.header is None:
            one.header_job = run.pool.submit(Job(item.found.path))
        else:
            self._select(run, one)
        return partial(self._finish, run, one)

    def end(self, run: Run) -> None:
        run.catalog.pin_train()

    def facts(self, run: Run) -> dict[str, int]:
        return {}

    def _select(self, run: Run, one: _Instance) -> None:
        """Everything that can be decided without pixels; submits the decoding of what is left."""
        header, item = one.header, one.item
        if header is None:
            raise Refused("bad-header")
        one.modality = select(header)
        one.who = identity(header)
        one.layout = layout_of(header)
        try:
            one.wanted = self._labelling.wanted(header, one.modality, one.who, (item.found.relative,))
        except Refused as refused:
            item.open = refused.reason == "unmapped-label"
            raise
        item.open = one.wanted.open
        one.keep = _in_cache(run, one, run.names.instance(one.who))
        if one.keep is None:
            job = Job(item.found.path, one.modality, one.wanted.decode(), header)
            one.pixel_job = run.pool.submit(job)
            item.frames = one.layout.frames if job.frames is None else len(job.frames)

    def _finish(self, run: Run, one: _Instance) -> None:
        """Wait for the workers and write what was decided."""
        if one.header_job is not None:
            outcome = one.header_job.result()
            if outcome.reason:
                raise Refused(outcome.reason)
            one.header = outcome.header
            self._select(run, one)
        outcome = one.pixel_job.result() if one.pixel_job else Outcome()
        if outcome.reason:
            raise Refused(outcome.reason)
        if one.keep is not None:
            _relabel(run, one, one.keep)
        else:
            _add(run, one, outcome)


def _in_cache(run: Run, one: _Instance, instance: bytes) -> dict[int, int] | None:
    """The images of the instance if the cache holds all that are wanted: other labels, or a file that moved.

    Raises:
        Refused: `duplicate-instance`, if the file that they came from is still there.
    """
    item = one.item
    frames = run.catalog.frames_of(instance)
    owners = {path_key for _, path_key in frames.values()} - {item.key}
    _no_twin(run, owners)
    if not frames or one.wanted is None or one.layout is None:
        return None
    own_change = not owners and (item.known is None or item.known.stamp != item.stamp)
    wanted = one.wanted.decode() or frozenset(range(1, one.layout.frames + 1))
    return None if own_change or wanted - frames.keys() else {frame: frames[frame][0] for frame in wanted}


def _no_twin(run: Run, owners: set[bytes]) -> None:
    """Asked before and after the decoding: a twin may have been under way at the same time.

    Raises:
        Refused: `duplicate-instance`, one of these files is still there.
    """
    for owner in owners:
        known = run.catalog.known(owner)
        if known and known.seen == run.number:
            raise Refused("duplicate-instance")


def _add(run: Run, one: _Instance, outcome: Outcome) -> None:
    """Catalog rows for the pictures of one file."""
    if one.header is None or one.who is None or one.layout is None or one.wanted is None:
        raise Refused("bad-header")
    run.forget(one.item)
    instance = run.names.instance(one.who)
    owners = {owner for _, owner in run.catalog.frames_of(instance).values()}
    _no_twin(run, owners)
    for owner in owners:
        run.catalog.forget_file(owner)
    reasons: Counter[str] = Counter()
    accepted = 0
    for picture in outcome.pictures:
        digest = run.names.of("pixels", picture.pixels)
        reason = picture.reason or ("duplicate-pixels" if run.catalog.has_digest(digest) else None)
        if reason:
            reasons[reason] += 1
            continue
        row = _row(run, one.header, one.layout, one.who, one.modality, picture.frame, digest, picture.policy)
        run.add(one.item, ImageRow(**row, labels=one.wanted.of(picture.frame)), picture.pixels)
        accepted += 1
    reasons["unmapped-label"] += one.wanted.unmapped_frames
    reasons["unlabelled"] += one.layout.frames - len(outcome.pictures) - one.wanted.unmapped_frames
    run.close(one.item, +reasons, accepted=accepted)


def _row(
    run: Run, header: Header, layout: Layout, who: Identity, modality: str, frame: int, digest: bytes, policy: str
) -> dict[str, Any]:
    names = run.names
    patient = names.patient(who)
    return {
        "patient": patient,
        "study": names.of("study", who.study),
        "series": names.of("series", who.series),
        "instance": names.instance(who),
        "frame": frame,
        "modality": modality,
        "anatomy": anatomy(header, modality),
        "split": "train" if patient in run.pinned else split_of(patient),
        "digest": digest,
        "policy": policy,
        "rows": layout.rows,
        "cols": layout.cols,
        "bits": layout.stored,
        "photometric": layout.photometric,
        "syntax": layout.syntax,
        "lossy": header.text("LossyImageCompression") == "01",
    }


def _relabel(run: Run, one: _Instance, keep: dict[int, int]) -> None:
    """The pixels stay; labels and file change. Frames that are not wanted any more go."""
    if one.wanted is None or one.layout is None or one.who is None:
        raise Refused("bad-header")
    item, catalog = one.item, run.catalog
    owners = {owner for _, owner in catalog.frames_of(run.names.instance(one.who)).values()}
    _no_twin(run, owners - {item.key})
    for frame, image in keep.items():
        catalog.relabel(image, one.wanted.of(frame), b"")
    for key in owners | {item.key}:
        catalog.forget_file(key)
    for frame, image in keep.items():
        catalog.relabel(image, one.wanted.of(frame), item.key)
    left_out = one.layout.frames - len(keep) - one.wanted.unmapped_frames
    reasons = Counter({"unmapped-label": one.wanted.unmapped_frames, "unlabelled": left_out})
    run.close(item, +reasons, accepted=len(keep), decoded=0)
