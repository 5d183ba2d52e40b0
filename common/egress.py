"""The egress gate: what an update must be before it may leave a site, and the log of everything that left."""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from rin.common.errors import RefusedError
from rin.common.files import BLOCK, canonical_json, fsync_dir
from rin.common.layout import Layout, Tensor
from rin.common.plan import FigureName, MetricName

SMALLEST_COUNT: Final = 10  # images; a metric over fewer could be about one patient (threat T6)
COUNTS: Final[tuple[MetricName, ...]] = ("images", "top1", "top5")
DIGITS: Final = 4  # significant digits of a metric that leaves


@dataclass(frozen=True, slots=True)
class UpdateFacts:
    """`digest`: hex SHA-256 of the tensor bytes. `norm`: L2 over the parameters, buffers left out."""

    digest: str
    norm: float


def check_update(path: Path, layout: Layout, *, max_norm: float) -> UpdateFacts:
    """Check the update file at `path`; memory stays at a few blocks whatever the network's size.

    Args:
        max_norm: largest L2 norm over the parameters.

    Raises:
        RefusedError: egress-refused (length, header, norm) or not-finite.
    """
    header = layout.header()
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != layout.file_bytes or file.read(len(header)) != header:
            raise RefusedError("egress-refused", "the update file is not in the plan's layout")
        sha, squares = hashlib.sha256(), 0.0
        for tensor in layout.tensors:
            total = _sum_of_squares(file, tensor, sha)
            squares += total if tensor.kind == "parameter" else 0.0
    norm = math.sqrt(squares)
    if norm > max_norm:
        raise RefusedError("egress-refused", f"the update's norm is {norm:.3g}, at most {max_norm:.3g} may leave")
    return UpdateFacts(sha.hexdigest(), norm)


def _sum_of_squares(file: BinaryIO, tensor: Tensor, sha: hashlib._Hash) -> float:
    """Read one tensor block by block into `sha`; the sum of its squares in float64.

    Raises:
        RefusedError: not-finite.
    """
    total, left = 0.0, tensor.nbytes
    while left:
        want = min(left, BLOCK)
        block = file.read(want)
        if len(block) != want:
            raise RefusedError("egress-refused", "the update file became shorter while it was read")
        sha.update(block)
        values = np.frombuffer(block, dtype="<f4")
        if not np.isfinite(values).all():
            raise RefusedError("not-finite")
        total += float(np.sum(np.square(values, dtype=np.float64)))
        left -= len(block)
    return total


def pass_metrics(metrics: Mapping[MetricName, float], allowed: Set[FigureName]) -> dict[MetricName, float]:
    """The metrics that may leave: allowed by plan and site, finite, rounded to four significant digits.

    Counts below ten stay; below ten images the loss stays too, which is a mean over them. What is counted on held-out
    images goes through `rin.common.disclosure.published` instead.
    """
    if not metrics.get("images", 0) >= SMALLEST_COUNT:
        return {}
    names: list[MetricName] = sorted(name for name in metrics if name in allowed)
    large: dict[MetricName, float] = {
        name: _rounded(metrics[name]) for name in names if name not in COUNTS or metrics[name] >= SMALLEST_COUNT
    }
    return {name: value for name, value in large.items() if math.isfinite(value)}  # rounding can overflow


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def record(log: Path, *, what: str, digest: str, to: str, facts: Mapping[str, Any]) -> None:
    """Append one line to the egress log and make it durable; called before anything becomes visible outside.

    Args:
        log: JSON lines, append only.
        what: kind of thing that leaves, e.g. `update`.
        digest: hex SHA-256 of the bytes that leave.
        to: whom it is for.
        facts: round, plan, bytes, the metrics that leave: nothing of a patient.
    """
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "what": what, "sha256": digest, "to": to}
    log.parent.mkdir(parents=True, exist_ok=True)
    fresh = not log.exists()
    data = canonical_json({**facts, **line}) + b"\n"
    fd = os.open(log, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            data = b"\n" + data  # a writer was killed in the middle of its line
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    finally:
        os.close(fd)
    if fresh:
        fsync_dir(log.parent)
