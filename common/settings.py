"""TOML to frozen, strict pydantic models; all faults of a file at once, in words: file:key, wanted, got."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rin.common.errors import ConfigError


class Table(BaseModel):
    """One TOML table: kebab-case keys, unknown keys refused, strict types, no NaN, frozen."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
    )


T = TypeVar("T", bound=Table)


def parse_toml(text: str, model: type[T], *, name: str) -> T:
    """Parse TOML `text` as `model`; `name` is the file's name in errors.

    Validation goes through JSON because strict models take arrays for tuples and strings for paths only from there.

    Raises:
        ConfigError: listing every fault, one a line.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not valid TOML: {error}", step=f"correct {name} at that place") from None
    try:
        encoded = json.dumps(values)
    except TypeError:
        raise ConfigError(f"{name}: holds a bare date or time", step="write dates as strings in quotes") from None
    try:
        return model.model_validate_json(encoded)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_line(name, fault, model) for fault in error.errors()), step=f"correct {name}"
        ) from None


def read_toml(path: Path, model: type[T]) -> T:
    """Read the file `path` as `model`.

    Raises:
        ConfigError: the file is missing or wrong; every fault is listed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing", step="write it, or check --home or --run") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name}: not UTF-8 text", step="save it as UTF-8") from None
    return parse_toml(text, model, name=path.name)


def _line(name: str, fault: Any, model: type[Table]) -> str:
    """One fault as `file: table.key: wanted ..., got ...`."""
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = ", ".join(sorted(_keys(model, fault["loc"][:-1]))) or "none"
        return f"{name}: unknown key '{where}'; known here: {known}"
    if fault["type"] == "missing":
        return f"{name}: {where}: this key is required"
    text = fault["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    got = "" if isinstance(fault["input"], dict) else f", got {fault['input']!r}"
    return f"{name}: {where}: want {text}{got}" if where else f"{name}: {text}"


def _keys(model: type[Table], path: tuple[int | str, ...]) -> list[str]:
    """The keys known at `path` below `model`."""
    for part in path:
        field = next((f for n, f in model.model_fields.items() if (f.alias or n) == part), None)
        nested = getattr(field, "annotation", None)
        if not (isinstance(nested, type) and issubclass(nested, Table)):
            return []
        model = nested
    return [field.alias or name for name, field in model.model_fields.items()]
