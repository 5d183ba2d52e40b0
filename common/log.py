"""Logging of every process of rin: JSON lines in a file, short lines on stderr, and no identifier in either.

What is kept out, because exception messages quote headers and paths and other libraries quote values:

- the message of an exception: only its class, our code, and file:line:function of the frames are written;
- an exception or a path among the arguments of a record: replaced by its class and code, or by `<path>`;
- the text of every record of another library: of a warning or worse only its logger's name and level are kept.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from rin.common.errors import RinError

OURS: Final = ("rin", "__main__")


def name_of(error: BaseException) -> str:
    """What may be written about `error`: its class, and our code where it has one."""
    name = type(error).__qualname__
    return f"{name}({error.code})" if isinstance(error, RinError) else name


def chain_of(error: BaseException) -> list[str]:
    """`name_of` the error and of its causes, newest first."""
    names: list[str] = []
    current: BaseException | None = error
    while current is not None and len(names) < 8:
        names.append(name_of(current))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return names


def frames_of(trace: TracebackType | None) -> list[str]:
    """`file:line:function` of a traceback, outermost first; file names without their directories."""
    return [f"{Path(frame.filename).name}:{frame.lineno}:{frame.name}" for frame in traceback.extract_tb(trace)]


def _clean(value: Any) -> Any:
    if isinstance(value, BaseException):
        return name_of(value)
    if isinstance(value, os.PathLike):
        return "<path>"
    return value


class Filter(logging.Filter):
    """Takes out of a record what must not be written; put on every handler, so nothing goes round it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.split(".", 1)[0] not in OURS:
            if record.levelno < logging.WARNING:
                return False
            record.msg, record.args = "a message of another library; its text is not kept", None
        elif isinstance(record.msg, BaseException):
            record.msg = name_of(record.msg)
        if isinstance(record.args, dict):
            record.args = {key: _clean(value) for key, value in record.args.items()}
        elif record.args:
            record.args = tuple(_clean(value) for value in record.args)
        if record.exc_info and record.exc_info[1] is not None:
            record.rin_error, record.rin_trace = chain_of(record.exc_info[1]), frames_of(record.exc_info[2])
        record.exc_info = record.exc_text = record.stack_info = None
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time (UTC), level, logger, text, and error and trace where there is an exception."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "text": record.getMessage(),
        }
        if error := getattr(record, "rin_error", None):
            row |= {"error": error, "trace": getattr(record, "rin_trace", [])}
        return json.dumps(row, ensure_ascii=True)


class LineFormatter(logging.Formatter):
    """One short line for a person; control characters are shown escaped, so a text cannot draw on the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if error := getattr(record, "rin_error", None):
            text = f"{text}: {' from '.join(error)}"
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        return f"{datetime.fromtimestamp(record.created):%H:%M:%S} {text}"


def _file_handler(path: Path) -> logging.Handler:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="a", encoding="utf-8", delay=True)
    handler.setFormatter(JsonFormatter())
    return handler


def setup(path: Path | None, level: int | str = logging.INFO, *, stderr: bool = True) -> None:
    """Send every record of this process to `path` (JSON lines, appended) and to stderr; may be called again.

    Uncaught exceptions and `warnings` go the same way, so their text stays out too.
    """
    handlers: list[logging.Handler] = [_file_handler(path)] if path else []
    if stderr:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[-1].setFormatter(LineFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.addFilter(Filter())
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    logging.getLogger("rin").critical("uncaught exception", exc_info=(kind, error, trace))
