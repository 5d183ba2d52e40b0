"""CPU seconds and peak memory of whole process trees, read from /proc."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    cpu_s: float  # its own, and that of children which it has waited for
    command: str


def _read(pid: int) -> Process | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (OSError, IndexError):
        return None
    return Process(pid, int(fields[1]), sum(map(int, fields[11:15])) / TICK, command)


def tree(root: int | None = None) -> list[Process]:
    """All live descendants of `root` (default: this process), without `root` itself."""
    processes = [p for pid in Path("/proc").iterdir() if pid.name.isdigit() and (p := _read(int(pid.name)))]
    children: dict[int, list[Process]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process)
    found, queue = [], [root or os.getpid()]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += [process.pid for process in below]
    return found


def cpu_seconds(root: int | None = None) -> float:
    """CPU seconds of all descendants so far, dead ones included as long as their parent lives and waited for them."""
    return sum(process.cpu_s for process in tree(root))


def peak_mb(pid: int) -> float:
    """VmHWM of one process in MB (10^6 bytes); 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), 0.0)
