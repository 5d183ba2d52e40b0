"""Logging keeps identifiers out: exception texts, paths, texts of other libraries."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rin.common import log
from rin.common.errors import RefusedError

CANARY = "DOE^JANE 12345"


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root, hook = logging.getLogger(), sys.excepthook
    handlers, level = list(root.handlers), root.level
    yield
    for handler in list(root.handlers):
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    for handler in handlers:
        if handler not in root.handlers:
            root.addHandler(handler)
    root.setLevel(level)
    sys.excepthook = hook
    logging.captureWarnings(False)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_exception_leaves_its_class_code_and_place_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log" / "x.jsonl"
    log.setup(path)
    logger = logging.getLogger("rin.test")
    try:
        try:
            raise ValueError(CANARY)
        except ValueError as error:
            raise RefusedError("policy", CANARY) from error
    except RefusedError as error:
        logger.exception("could not train, %s", error)
    logger.warning("bad file %s", Path(f"/data/{CANARY}.dcm"))
    logger.error(OSError(CANARY))
    row = rows(path)[0]
    assert row["error"] == ["RefusedError(policy)", "ValueError"]
    assert row["trace"][-1].startswith("test_log.py:")
    assert row["text"] == "could not train, RefusedError(policy)"
    assert rows(path)[1]["text"] == "bad file <path>"
    assert rows(path)[2]["text"] == "OSError"
    assert CANARY not in path.read_text() + capsys.readouterr().err


def test_other_libraries_lose_their_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    log.setup(path, stderr=False)
    logging.getLogger("pydicom").warning("Invalid value for VR PN: %s", CANARY)
    logging.getLogger("pydicom").info("not even this")
    assert [(r["logger"], r["level"]) for r in rows(path)] == [("pydicom", "warning")]
    assert CANARY not in path.read_text()


def test_a_second_setup_replaces_the_first(tmp_path: Path) -> None:
    log.setup(tmp_path / "a.jsonl", stderr=False)
    log.setup(tmp_path / "b.jsonl", "DEBUG", stderr=False)
    logging.getLogger("rin.x").debug("hello")
    assert [r["text"] for r in rows(tmp_path / "b.jsonl")] == ["hello"]
    assert not (tmp_path / "a.jsonl").exists()


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(None)
    logging.getLogger("rin.x").info("a\x1b[31m[bold]b\nc")
    assert capsys.readouterr().err.endswith(r"a\x1b[31m[bold]b\nc" + "\n")


def test_an_uncaught_exception_and_a_warning_show_no_text(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, warnings; from rin.common import log\n"
        "log.setup(pathlib.Path(sys.argv[1]))\n"
        f"warnings.warn({CANARY!r})\n"
        f"raise KeyError({CANARY!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.jsonl")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "KeyError" in done.stderr
    assert CANARY not in done.stderr + (tmp_path / "x.jsonl").read_text()
    assert [r["logger"] for r in rows(tmp_path / "x.jsonl")] == ["py.warnings", "rin"]
