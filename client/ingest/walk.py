"""The files below the archive's roots, in a fixed order."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rin.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Found:
    """One file; `size` is -1 where it cannot be examined (a broken link, no permission). `folder` is True for a whole
    folder that cannot be listed."""

    path: Path
    relative: str
    size: int
    mtime_ns: int
    folder: bool = False


def check_roots(roots: Sequence[Path]) -> list[Path]:
    """Absolute roots without those that lie inside another one.

    Raises:
        ConfigError: one of them is no directory; all are listed.
    """
    faults = [f"{root} is not a directory" for root in roots if not root.is_dir()]
    if faults or not roots:
        raise ConfigError("\n".join(faults) or "no archive root is named", step="check --root")
    absolute = sorted({Path(os.path.abspath(root)) for root in roots})  # noqa: PTH100 - keeps links as they are named
    return [root for root in absolute if not any(root != other and root.is_relative_to(other) for other in absolute)]


def walk(root: Path, *, leave_out: Path) -> Iterator[Found]:
    """Regular files below `root` in code-point order of their names; links to files count, links to folders do not.

    Args:
        leave_out: a directory that is no part of the archive (the site's own home).
    """
    yield from _walk(root, "", Path(os.path.abspath(leave_out)))  # noqa: PTH100


def _walk(folder: Path, prefix: str, leave_out: Path) -> Iterator[Found]:
    if folder == leave_out:
        return
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name, reverse=True)
    except OSError:
        yield Found(folder, prefix.rstrip("/"), -1, 0, folder=True)
        return
    while listed:
        entry = listed.pop()  # and what it remembers of its file: a folder may hold 100,000
        path = folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path, f"{prefix}{entry.name}/", leave_out)
            continue
        try:
            info = entry.stat()
        except OSError:
            yield Found(path, prefix + entry.name, -1, 0)
            continue
        if stat.S_ISREG(info.st_mode):  # a pipe would block, a link to a folder may be a circle
            yield Found(path, prefix + entry.name, info.st_size, info.st_mtime_ns)
