"""Ingest: bring catalog and cache of a home in line with an archive; resumable at every image."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from rin.client.home import Home
from rin.client.ingest.cache import Cache
from rin.client.ingest.catalog import Catalog, undamaged
from rin.client.ingest.explain import explain
from rin.client.ingest.instances import Instances
from rin.client.ingest.labelling import Labelling
from rin.client.ingest.mapping import own_names, read_labels, read_mapping
from rin.client.ingest.pseudonyms import Pseudonyms, site_pseudonyms
from rin.client.ingest.radimagenet import RadImageNet
from rin.client.ingest.report import PATIENTS_UNKNOWN, PATIENTS_WARNING, IngestReport, Progress
from rin.client.ingest.run import Run, Source
from rin.client.ingest.walk import check_roots
from rin.client.ingest.workers import TIMEOUT_S, WORKERS, Pool
from rin.client.ledger import make_ledger
from rin.common.errors import ConfigError
from rin.common.files import lock
from rin.common.labels import label_set_digest

__all__ = ["IngestReport", "Progress", "explain", "ingest"]
_AHEAD: Final = 24  # files under way for each worker
_SITE: Final = re.compile(r"[A-Za-z0-9-]{1,32}")


def ingest(
    home: Home,
    *,
    site: str,
    roots: Sequence[Path],
    labels: Path | None = None,
    mapping: Path | None = None,
    layout: str = "dicom",
    csv: Sequence[Path] = (),
    prune: bool = False,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] = lambda text: None,
    workers: int = WORKERS,
    timeout_s: float = TIMEOUT_S,
) -> IngestReport:
    """Bring catalog and cache of `home` in line with the archive below `roots`.

    With `labels` only the images that it names are accepted; without it every image is, without labels. Killed at any
    moment, the next call goes on. An unchanged file (path, size, time, labels) is not read again.

    Args:
        layout: `dicom`, or `radimagenet` for the published PNG folders, whose names are the labels.
        csv: the published split of layout `radimagenet`.
        prune: remove the images whose files are gone; without it they stay, for an archive may not be mounted.
        warn: called with what a person must know before the work, once every argument was found right; for a terminal,
            never for a log: it may name a root.

    Raises:
        ConfigError: site name, roots, layout, labels, mapping or csv are wrong.
        StateError: the home belongs to another site, key or layout, is damaged or in use; or it cannot be told what is
            gone.
        RinError: `disk-full`.
    """
    start = time.monotonic()
    if not _SITE.fullmatch(site):
        raise ConfigError(f"'{site}' is no site name", step="use 1 to 32 letters, digits and hyphens")
    checked = check_roots(roots)
    source = _source(layout, checked, labels, mapping, csv)
    home.catalog.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with lock(home.catalog.with_name("ingest.lock"), holder="rin-client ingest"), undamaged(home.catalog):
        names = site_pseudonyms(home.pseudonym_key, create=not home.catalog.exists())
        catalog = Catalog(home.catalog)
        pool = Pool(workers=workers, timeout_s=timeout_s)
        try:
            _tie(catalog, names, site, layout)
            make_ledger(home, catalog, names)
            catalog.set_meta("patients", "known" if source.patients_known else PATIENTS_UNKNOWN)
            cache = Cache(home.cache, slots=catalog.slots)
            run = Run(home, catalog, cache, pool, names, source, checked, progress, _AHEAD * workers, warn)
            if not source.patients_known:
                warn(PATIENTS_WARNING)  # before the hours, not after them
            run.scan()
            if prune:
                run.check_prune()
            run.read()
            if prune:
                run.prune()
            pool.close()
            run.finish()
            return run.report(time.monotonic() - start)
        except BaseException:
            pool.cancel()
            raise
        finally:
            catalog.close()


def _source(
    layout: str, roots: Sequence[Path], labels: Path | None, mapping: Path | None, csv: Sequence[Path]
) -> Source:
    """The source of a layout, its files checked."""
    if layout == "dicom":
        if csv:
            raise ConfigError("a published split belongs to layout radimagenet", step="pass --layout, or --labels")
        return Instances(
            Labelling(read_labels(labels) if labels else None, read_mapping(mapping) if mapping else own_names())
        )
    if layout == "radimagenet":
        if labels or mapping:
            raise ConfigError("layout radimagenet takes its labels from folders", step="leave labels and mapping out")
        return RadImageNet(roots, csv)
    raise ConfigError(f"layout '{layout}' is not known", step="use dicom or radimagenet")


def _tie(catalog: Catalog, names: Pseudonyms, site: str, layout: str) -> None:
    """One site, one key, one label set and one layout for ever."""
    catalog.tie("site", site, step="use --site with the name that this home was made for, or another --home")
    step = "restore the pseudonym key of this catalog, or ingest into another --home"
    catalog.tie("key", names.id, step=step)
    catalog.tie("labels", label_set_digest(), step="ingest into another --home with this release of rin")
    if catalog.meta("run") is not None and catalog.meta("layout") is None:
        catalog.set_meta("layout", "dicom")  # made before there was another one
    catalog.tie("layout", layout, step="ingest into another --home: patients are counted in one way within a home")
