"""TOML to frozen, strict pydantic models; all faults of a file at once, in words: file:key, wanted, got."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rin.common.errors import ConfigError

# What a file of a stranger may cost: tomllib's time and memory grow with the parts of its longest dotted key, times all
# other parts and lines. A key is on one line; a line `sites = {...}` of a thousand sites stays below.
DOTS: Final = 2_000_000  # the most on a line, times all of them and all lines
FAULTS: Final = 50  # that are listed
LINE: Final = 500  # letters of a fault


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


def load_toml(text: str, *, name: str) -> dict[str, Any]:
    """The values of TOML `text`, whoever wrote it; `name` is the file's name in errors.

    Raises:
        ConfigError: it is no TOML, or none that can be read: nested too deeply, keys or numbers too long.
    """
    try:
        dots = [line.count(".") for line in text.split("\n")]
        if max(dots) * (sum(dots) + len(dots)) > DOTS:
            raise ConfigError(f"{name}: a line holds too many dots", step=f"break the long lines of {name}")
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_short(f"{name}: not valid TOML: {error}"), step=f"correct {name} at that place") from None
    except ValueError:  # of int(), beyond 4300 digits
        raise ConfigError(f"{name}: holds a number of thousands of digits", step=f"correct {name}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply", step=f"correct {name}") from None


def parse_toml(text: str, model: type[T], *, name: str) -> T:
    """Parse TOML `text` as `model`; `name` is the file's name in errors.

    Validation goes through JSON because strict models take arrays for tuples and strings for paths only from there.

    Raises:
        ConfigError: listing every fault, one a line.
    """
    values = load_toml(text, name=name)
    try:
        encoded = json.dumps(values)
    except TypeError:
        raise ConfigError(f"{name}: holds a bare date or time", step="write dates as strings in quotes") from None
    except (ValueError, RecursionError):  # hexadecimal numbers have no limit before; keys nest deeper than arrays
        raise ConfigError(f"{name}: a number too long, or nested too deeply", step=f"correct {name}") from None
    try:
        return model.model_validate_json(encoded)
    except ValidationError as error:
        faults = error.errors()
        lines = [_short(_line(name, fault, model)) for fault in faults[:FAULTS]]
        more = [f"{name}: and {len(faults) - FAULTS} more"] if len(faults) > FAULTS else []
        raise ConfigError("\n".join(lines + more), step=f"correct {name}") from None


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


def _short(text: str) -> str:
    return text if len(text) <= LINE else f"{text[:LINE]} ..."


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
