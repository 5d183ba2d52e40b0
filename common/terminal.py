"""The edge between a command and its operator: errors with a next step, exit codes, progress that fits its outlet."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import NoReturn

import typer

from rin.common.errors import CODES, RinError


def run_app(app: typer.Typer) -> None:
    """Run `app` and turn what it raises into an exit code: 0 done, 1 an error of ours, 2 usage, 130 Ctrl-C.

    This is a process's edge: the one place that catches everything.
    """
    try:
        app()
    except RinError as error:
        typer.secho(f"error: {error}", err=True, fg="red" if sys.stderr.isatty() else None)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _fault()
        typer.echo(f"error: {CODES['disk-full']}\n  next: free some space", err=True)
        raise SystemExit(1) from None
    except Exception:  # noqa: BLE001 - the edge of the process; the terminal belongs to the operator
        _fault()


def _fault() -> NoReturn:
    traceback.print_exc()
    typer.echo("error: a fault in rin itself; the trace above helps to report it", err=True)
    raise SystemExit(70) from None


def version_option(value: bool) -> None:
    """Callback of `--version`."""
    if value:
        typer.echo(metadata.version("rin"))
        raise typer.Exit


def confirm(question: str, *, yes: bool) -> None:
    """Ask the person at the terminal; `yes` answers for scripts.

    Raises:
        typer.Abort: the answer is no, or nobody is there to answer.
    """
    if not yes:
        typer.confirm(question, abort=True)


def progress_printer(verb: str, *, every_s: float = 5.0) -> Callable[[int, int], None]:
    """A (done, total) callback: one rewritten line on a terminal, a plain line every `every_s` seconds in a log."""
    import time

    last = [0.0]
    tty = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        now = time.monotonic()
        finished = total > 0 and done >= total
        if not finished and now - last[0] < (0.1 if tty else every_s):
            return
        last[0] = now
        share = f" of {total} ({done / total:.0%})" if total else ""
        sys.stderr.write(f"{chr(13) if tty else ''}{verb}: {done}{share}{'' if tty and not finished else chr(10)}")
        sys.stderr.flush()

    return show
