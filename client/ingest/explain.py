"""Which file was refused and why: paths are recomputed from the archive, shown, and stored nowhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rin.client.home import Home
from rin.client.ingest.catalog import Catalog
from rin.client.ingest.pseudonyms import site_pseudonyms
from rin.client.ingest.walk import check_roots, walk
from rin.common.errors import StateError


def explain(home: Home, roots: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Each refused file below `roots` with its reasons: for the terminal only, paths are stored nowhere.

    Raises:
        ConfigError: a root is no directory.
        StateError: nothing was ingested yet.
    """
    names = site_pseudonyms(home.pseudonym_key, create=False)
    if not home.catalog.exists():
        raise StateError(f"{home.catalog.name} is missing", step="run `rin-client ingest` first")
    catalog = Catalog(home.catalog)
    try:
        for root in check_roots(roots):
            for found in walk(root, leave_out=home.root):
                for reason in catalog.reasons(names.path(found.path)):
                    yield found.path, reason
    finally:
        catalog.close()
