"""Files that survive kill -9: write beside, fsync, rename; publish without replacing; lock a directory."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rin.common.errors import StateError

BLOCK = 4 << 20  # bytes a read: large enough for the disk, small enough to stay out of peak memory


def fsync_dir(path: Path) -> None:
    """Make a rename or link inside directory `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dir(path: Path, *, private: bool = False) -> None:
    """Make directory `path` and its parents where they are missing; a private one is for its owner alone (0700).

    Raises:
        StateError: it cannot be there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if private:
            path.chmod(0o700)
    except OSError as error:
        raise StateError(f"{path} cannot be made: {error.strerror}", step="choose another place for it") from None


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `data` so that a reader sees the old bytes or the new ones, never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    fsync_dir(path.parent)


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, ASCII, no NaN: the same value gives the same bytes everywhere.

    Raises:
        ValueError: `value` holds NaN or infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def write_json(path: Path, value: Any, *, mode: int = 0o644) -> None:
    """Write `value` as indented, key-sorted JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode(), mode=mode)


def read_json(path: Path) -> Any:
    """Read JSON written by `write_json`.

    Raises:
        StateError: the file is missing or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StateError(f"{path} is missing", step="check --home or --run, or run the set-up command again") from None
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}", step="name a file, and one to be read") from None
    except ValueError:
        raise StateError(f"{path} is not valid JSON", step="restore it from a backup; rin writes it whole") from None


def publish(source: Path, target: Path, *, mode: int = 0o400) -> bool:
    """Give the finished file `source` its final name unless that name exists; `source` is gone afterwards.

    Returns:
        True if `target` is now this file, False if another file already had the name.
    """
    source.chmod(mode)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    finally:
        source.unlink(missing_ok=True)
    fsync_dir(target.parent)
    return True


def sha256_file(path: Path, *, offset: int = 0) -> str:
    """Hex SHA-256 of the bytes of `path` from `offset` on, read block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def lock(path: Path, *, holder: str, wait: bool = False, shown: bool = True) -> Iterator[None]:
    """Hold an exclusive advisory lock on `path`; the kernel drops it when the process dies.

    With `wait` it queues behind the holder, for edits that take milliseconds.

    Args:
        holder: the command, for whoever comes second.
        shown: whether the status of that program shows the holder.

    Raises:
        StateError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            look = f", or look at it with `{holder.partition(' ')[0]} status`" if shown else ""
            raise StateError(f"another {holder} already works in {path.parent}", step=f"stop it first{look}") from None
        yield
