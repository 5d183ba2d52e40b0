"""Where the two halves of a site meet: the path of the trainer's Unix socket."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import Final

from rin.client.home import Home
from rin.common.errors import StateError

MAX_SOCKET_PATH: Final = 107  # bytes, unix(7)


def socket_path(home: Home) -> Path:
    """Where the socket of `home` is: `RIN_SOCKET`, else a short 0700 directory of this user, which is made.

    Not below the home: such paths may be longer than a Unix socket allows, or on a file system without sockets.

    Raises:
        StateError: the directory is somebody else's, or the path is too long.
    """
    if given := os.environ.get("RIN_SOCKET"):
        path = Path(given)
    else:
        name = hashlib.sha256(os.fsencode(home.root.resolve())).hexdigest()[:8]
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        folder = Path(runtime) / f"rin-{name}" if runtime else Path(f"/tmp/rin-{os.getuid()}-{name}")
        _own_directory(folder)
        path = folder / "t.sock"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise StateError(f"the socket's path is longer than {MAX_SOCKET_PATH} bytes", step="set RIN_SOCKET")
    return path


def _own_directory(folder: Path) -> None:
    """Make `folder` with mode 0700, or check that it is such a directory of this user."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise StateError(f"{folder} is not a private directory of this user", step="remove it, or set RIN_SOCKET")
