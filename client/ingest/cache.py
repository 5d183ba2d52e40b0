"""The cache: raw uint8 shards of 256x256 images, appended at the tail, read through mmap."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rin.common.errors import RinError, StateError
from rin.common.files import fsync_dir

SIDE: Final = 256
IMAGE_BYTES: Final = SIDE * SIDE
SHARD_IMAGES: Final = 16384  # 1 GiB a file
RESERVE: Final = 64 << 20  # bytes that stay free on the disk
_VECTOR: Final = 512  # images in one call; Linux takes 1024 pieces
_TAG: Final = b"Signature: 8a477f597d28d172789f06886806bc55\n# images of patients; backups should leave them out\n"


MEND: Final = (
    "restore catalog.sqlite and cache/ in the vault from one backup of the same moment; without one remove both"
    " (catalog.sqlite* and cache/, never keys/) and run `rin-client ingest`, with the same key it gives the same split"
)


def shard_path(directory: Path, shard: int) -> Path:
    """`shard-00000.u8`: images of `IMAGE_BYTES` one after the other, nothing else."""
    return directory / f"shard-{shard:05d}.u8"


class Cache:
    """The writer. A slot counts from the start of the whole cache; slots below `slots` are committed.

    The order of a commit is pixels, fsync, catalog transaction: whatever is beyond the committed slots belongs to an
    ingest that was killed, and opening cuts it off.
    """

    def __init__(self, directory: Path, *, slots: int) -> None:
        """Open the cache with `slots` committed images.

        Raises:
            StateError: the shards hold less than the catalog says.
        """
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
        self._directory = directory
        self._slots = slots
        tag = directory / "CACHEDIR.TAG"
        if not tag.exists():
            tag.write_bytes(_TAG)
        self._cut()

    @property
    def slots(self) -> int:
        """Slots in use, those of the open batch included."""
        return self._slots

    def append(self, images: Sequence[bytes]) -> int:
        """Write images at the tail and make them durable; returns the slot of the first one.

        Raises:
            RinError: `disk-full`; what was committed before stays valid.
        """
        first, rest = self._slots, list(images)
        try:
            if shutil.disk_usage(self._directory).free < len(rest) * IMAGE_BYTES + RESERVE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            while rest:
                shard, slot = divmod(self._slots, SHARD_IMAGES)
                part = rest[: SHARD_IMAGES - slot]
                self._write(shard, slot, part)
                rest = rest[len(part) :]
                self._slots += len(part)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            step = "free some space and run the same command again: it goes on where it stopped"
            raise RinError("no space is left for the cache", step=step, code="disk-full") from None
        return first

    def erase(self, slots: Sequence[int]) -> None:
        """Overwrite slots with zeros: the images that were there are gone at once, also for who has mapped them."""
        black = bytes(IMAGE_BYTES)
        for shard, group in itertools.groupby(sorted(slots), key=lambda slot: slot // SHARD_IMAGES):
            with shard_path(self._directory, shard).open("r+b") as file:
                for slot in group:
                    os.pwrite(file.fileno(), black, slot % SHARD_IMAGES * IMAGE_BYTES)
                os.fsync(file.fileno())

    def _write(self, shard: int, slot: int, images: Sequence[bytes]) -> None:
        path = shard_path(self._directory, shard)
        created = not path.exists()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            done, size = 0, len(images) * IMAGE_BYTES
            while done < size:  # one after the other without joining them: a copy of 16 MiB costs more than writing it
                first, cut = divmod(done, IMAGE_BYTES)
                part = [memoryview(images[first])[cut:], *images[first + 1 : first + _VECTOR]]
                done += os.pwritev(fd, part, slot * IMAGE_BYTES + done)
            os.fsync(fd)
        finally:
            os.close(fd)
        if created:
            fsync_dir(self._directory)

    def _cut(self) -> None:
        """Truncate every shard to its committed part."""
        last = self._slots // SHARD_IMAGES
        for path in self._directory.glob("shard-*.u8"):
            if int(path.stem.removeprefix("shard-")) > last:
                path.unlink()
        for shard in range(last + 1):
            path, want = shard_path(self._directory, shard), shard_bytes(self._slots, shard)
            have = path.stat().st_size if path.exists() else 0
            if have < want:
                raise StateError(f"{path.name} holds less than the catalog says", step=MEND)
            if have > want:
                os.truncate(path, want)


class Reading:
    """Keeps removed images in the cache as long as this object lives: whoever maps shards holds one, from before the
    catalog is read, so that no image turns black under its labels. Ingest erases when nobody holds one."""

    def __init__(self, path: Path) -> None:
        """Hold the lock at `path`, with others; waits for an erasing that is under way, a second at most."""
        self._fd = -1
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


@contextlib.contextmanager
def unread(path: Path) -> Iterator[bool]:
    """Whether nobody holds a `Reading` of `path`; while that is so, nobody begins one."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def shard_bytes(slots: int, shard: int) -> int:
    """Committed length of one shard."""
    return min(SHARD_IMAGES, max(0, slots - shard * SHARD_IMAGES)) * IMAGE_BYTES


def map_shards(directory: Path, *, slots: int) -> list[NDArray[np.uint8]]:
    """The committed images as read-only arrays (n, 256, 256), one a shard.

    Raises:
        StateError: a shard is missing or too short.
    """
    shards = []
    for shard in range((slots + SHARD_IMAGES - 1) // SHARD_IMAGES):
        path, size = shard_path(directory, shard), shard_bytes(slots, shard)
        if not path.exists() or path.stat().st_size < size:
            raise StateError(f"{path.name} holds less than the catalog says", step=MEND)
        flat = np.memmap(path, np.uint8, mode="r", shape=(size // IMAGE_BYTES, SIDE, SIDE))
        shards.append(np.asarray(flat))  # a plain view: indexing a memmap costs 40 % more
    return shards
