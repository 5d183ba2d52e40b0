from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from rin.common.errors import ConfigError
from rin.common.settings import Table, parse_toml, read_toml


class Inner(Table):
    step_size: Annotated[float, Field(gt=0)] = 1.0
    names: tuple[str, ...] = ()


class Outer(Table):
    count: int
    where: Path | None = None
    inner: Inner = Inner()


def fault(text: str) -> str:
    with pytest.raises(ConfigError) as failed:
        parse_toml(text, Outer, name="x.toml")
    assert failed.value.step
    return failed.value.message


def test_a_file_becomes_a_frozen_model() -> None:
    found = parse_toml('count = 1\nwhere = "/a"\n[inner]\nstep-size = 2\nnames = ["a"]', Outer, name="x.toml")
    assert found == Outer.model_validate({"count": 1, "where": Path("/a"), "inner": found.inner})
    assert found.inner.step_size == 2.0 and found.inner.names == ("a",)
    with pytest.raises(ValueError):
        found.count = 2  # type: ignore[misc]


def test_all_faults_come_at_once_in_words() -> None:
    text = fault('count = "3"\ncuont = 1\n[inner]\nstep-size = 0\nnames = [1]')
    assert text.splitlines() == [
        "x.toml: count: want a valid integer, got '3'",
        "x.toml: inner.step-size: want greater than 0, got 0",
        "x.toml: inner.names.0: want a valid string, got 1",
        "x.toml: unknown key 'cuont'; known here: count, inner, where",
    ]


@pytest.mark.parametrize(
    "text,words",
    [
        ("", "count: this key is required"),
        ("count = true", "count: want a valid integer, got True"),
        ("count = 1.0", "count: want a valid integer"),
        ("count = 1\n[inner]\nstep_size = 1.0", "unknown key 'inner.step_size'; known here: names, step-size"),
        ("count = 1\n[inner]\nstep-size = nan", "inner.step-size"),
        ("count = 1\n[inner]\nstep-size = inf", "inner.step-size"),
        ("count = 2026-11-23", "bare date"),
        ("count = ", "not valid TOML"),
        ("count = 1\ncount = 2", "not valid TOML"),
    ],
)
def test_each_fault_is_named(text: str, words: str) -> None:
    assert words in fault(text)


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        read_toml(tmp_path / "x.toml", Outer)
    (tmp_path / "x.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_toml(tmp_path / "x.toml", Outer)


@given(st.text(max_size=80))
def test_any_text_is_a_model_or_a_config_error(text: str) -> None:
    try:
        parse_toml(text, Outer, name="x.toml")
    except ConfigError as error:
        assert error.message.startswith("x.toml: ")
