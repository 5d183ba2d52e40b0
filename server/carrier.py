"""The in-process twin of rin.common.transfer.HttpCarrier: the same checks, with files copied instead of sent."""

from __future__ import annotations

import os
from pathlib import Path

from rin.common.errors import RefusedError
from rin.common.files import fsync_dir
from rin.common.layout import file_digest
from rin.server import tickets
from rin.server.receipts import accept_file, blocks, receipt, weights_for
from rin.server.rundir import RunDir


class FileCarrier:
    """A `Carrier` (rin.common.transfer) between a site and a run directory on the same machine."""

    def __init__(self, run: RunDir) -> None:
        self._run = run

    def fetch(self, digest: str, ticket: str, target: Path) -> None:
        """Copy the weights that `ticket` opens to `target`, whole and checked."""
        if target.exists():
            return
        source = weights_for(self._run, ticket, digest)
        part = target.with_name(f".{target.name}.part")
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            for block in blocks(source):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        if file_digest(part) != digest:
            part.unlink()
            raise RefusedError("bad-weights")
        part.replace(target)
        fsync_dir(target.parent)

    def send(self, number: int, site: str, ticket: str, path: Path, manifest: bytes, signature: bytes) -> None:
        """Make the update at `path` a receipt of round `number`, by the ticket's right."""
        grant = tickets.check(self._run, ticket)
        if (grant.round, grant.site) != (number, site):
            raise RefusedError("update-stranger")
        there = receipt(self._run, number, site)
        if there is not None and there.manifest.to_bytes() == manifest:  # the answer was lost, not the update
            return
        accept_file(self._run, ticket, manifest, signature, path)
