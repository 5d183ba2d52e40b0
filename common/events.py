"""Progress events as JSON lines: what a run or a site did, for the operator's screen and for `status`.

One event is one line `{"time": ..., "kind": ..., <fields>}`. Lines are appended with one write each, so several
processes may share a file and a reader never sees half an event as a whole one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rin.common.files import canonical_json

# Kind to the fields that it must carry; more may be added. Never a path, an exception's text, anything of a patient.
KINDS: Final[dict[str, tuple[str, ...]]] = {
    "coordinator-started": ("epoch",),
    "coordinator-stopped": (),
    "process": ("name", "state"),  # state: started, ended, ready; with `line`, the next step
    "member-admitted": ("site",),
    "member-revoked": ("site",),
    "site-online": ("site",),
    "site-away": ("site",),
    "flower-run": ("state",),  # state: submitted, ended
    "run-resumed": ("round",),
    "round-opened": ("round", "sites"),
    "request-sent": ("round", "site"),
    "sites-awaited": ("round", "sites"),  # by name, every now and then
    "receipt": ("round", "site"),
    "site-failed": ("round", "site", "code"),
    "scores-ignored": ("round", "site", "reason"),  # a site's validation figures; its update counts
    "round-closed": ("round", "seconds"),
    "round-failed": ("round", "reason"),
    "rounds-stopped": ("reason", "step"),  # an error that no repetition cures
    "run-finished": ("rounds",),
    "training": ("round", "step", "steps"),  # at a site
    "update-ready": ("round",),
    "update-sent": ("round",),
    "request-refused": ("round", "code"),
}


@dataclass(frozen=True, slots=True)
class Event:
    """One line. `time`: UTC, ISO 8601 with milliseconds."""

    time: str
    kind: str
    fields: dict[str, Any] = field(default_factory=dict)


class Events:
    """Appends to one file; safe from several threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, **fields: Any) -> None:
        """Append one event.

        Raises:
            ValueError: the kind is not one of `KINDS`, a field of it is missing, or a value is no JSON.
        """
        if kind not in KINDS:
            raise ValueError(f"no kind of event: {kind}")
        if missing := [name for name in KINDS[kind] if name not in fields]:
            raise ValueError(f"{kind}: lacks {', '.join(missing)}")
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = canonical_json({"time": time, "kind": kind, **fields}) + b"\n"
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            # A writer that was killed, or a full disk, may have left half a line: end it, so that this one stays whole.
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line
            os.write(fd, line)
        finally:
            os.close(fd)


def _events(data: bytes) -> Iterator[Event]:
    for line in data.splitlines():
        try:
            value = json.loads(line)
            yield Event(value.pop("time"), value.pop("kind"), value)
        except (ValueError, AttributeError, KeyError, TypeError):
            continue  # half a line


def read_events(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """Events of `path` from byte `offset` on, and the offset where the next call goes on.

    A missing file is an empty one; a line that is not finished yet is left for the next call.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole = data.rfind(b"\n") + 1
    return list(_events(data[:whole])), offset + whole
