"""The edge of a command: one line for what an operator can mend, a trace for what only we can."""

from __future__ import annotations

import errno
import os

import pytest
import typer

from rin.common.errors import StateError
from rin.common.terminal import run_app


@pytest.mark.parametrize(
    ("error", "code", "words", "trace"),
    [
        (StateError("it is so", step="do this"), 1, "error: it is so\n  next: do this", False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "no space is left on the device\n  next:", False),
        (OSError(errno.EIO, os.strerror(errno.EIO)), 70, "a fault in rin itself", True),
        (ValueError("x"), 70, "a fault in rin itself", True),
    ],
)
def test_every_error_has_its_exit_code(
    error: Exception,
    code: int,
    words: str,
    trace: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def command() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(SystemExit) as caught:
        run_app(app)
    assert caught.value.code == code
    shown = capsys.readouterr().err
    assert words in shown
    assert ("Traceback" in shown) == trace
