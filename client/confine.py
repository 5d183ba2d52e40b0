"""Start a program without network, or without the patients' files: the airlock that the kernel holds (threat T3).

    python -m rin.client.confine --no-network -- COMMAND...
    python -m rin.client.confine --hide DIR --hide FILE -- COMMAND...

Namespaces of Linux (namespaces(7), user_namespaces(7)) by ctypes, for Python has no unshare before 3.12. The command
runs as the same user, without any capability and without a way to new ones, so it cannot undo what was done here, and
it cannot look through /proc at the files of a process outside. A root user keeps some ways round (block devices, kernel
settings): run rin as a user of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

REFUSED: Final = 77  # exit code where the kernel does not allow it; nothing was started

# linux/sched.h, linux/mount.h, linux/prctl.h, linux/sockios.h
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x1000, 0x4000, 1 << 18
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def _call(function: str, *arguments: int | bytes | None) -> None:
    """Call libc's `function`.

    Raises:
        OSError: it answered -1.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{function}: {os.strerror(error)}")


def _unshare(flags: int) -> None:
    """New namespaces inside a new user namespace; root falls back to none where user namespaces are switched off."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        _call("unshare", flags | CLONE_NEWUSER)
    except OSError:
        if uid != 0:
            raise
        _call("unshare", flags)
        return
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _raise_loopback() -> None:
    """Bring lo up: libraries that talk to themselves expect it, and it leads nowhere."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, SIOCGIFFLAGS, struct.pack("16sH14x", b"lo", 0))
        flags = struct.unpack("16sH14x", answer)[1] | IFF_UP
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags))


def _hide(paths: Iterable[Path]) -> None:
    """Cover each path: a directory by an empty one that nobody may open, a file by /dev/null."""
    here = Path.cwd()
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    for path in paths:
        target = path.resolve()
        if target.is_dir():
            flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
            _call("mount", b"tmpfs", os.fsencode(target), b"tmpfs", flags, b"size=4k,mode=000")
        elif target.exists():
            _call("mount", b"/dev/null", os.fsencode(target), None, MS_BIND, None)
    try:
        os.chdir(here)  # otherwise the working directory would still be the one below the cover
    except OSError:
        os.chdir("/")


def _drop_capabilities() -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        _call("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def enter(*, no_network: bool, hide: Sequence[Path]) -> None:
    """Confine this process; what it executes next has no capability left.

    Raises:
        OSError: the kernel does not allow it.
    """
    _unshare((CLONE_NEWNET if no_network else 0) | (CLONE_NEWNS if hide else 0))
    if no_network:
        _raise_loopback()
    if hide:
        _hide(hide)
    _drop_capabilities()


def argv(command: Sequence[str], *, no_network: bool = False, hide: Sequence[Path] = ()) -> list[str]:
    """`command`, started through this module."""
    options = ["--no-network"] if no_network else []
    for path in hide:
        options += ["--hide", str(path)]
    return [sys.executable, "-m", "rin.client.confine", *options, "--", *command]


def works(*, no_network: bool = False, hide: Sequence[Path] = ()) -> bool:
    """Whether this kernel confines a process of this user that way; tried with a process that does nothing."""
    command = argv([sys.executable, "-S", "-c", ""], no_network=no_network, hide=hide)
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main() -> None:
    """Confine, then become the command."""
    parser = argparse.ArgumentParser(prog="rin.client.confine", description="Start COMMAND confined.")
    parser.add_argument("--no-network", action="store_true")
    parser.add_argument("--hide", type=Path, action="append", default=[], metavar="PATH")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    try:
        enter(no_network=options.no_network, hide=options.hide)
    except OSError as error:
        sys.stderr.write(f"the kernel does not confine this user ({os.strerror(error.errno or 0)})\n")
        raise SystemExit(REFUSED) from None
    os.execvp(options.command[0], options.command)


if __name__ == "__main__":
    main()
