"""The site's labels CSV and its mapping to the label set; what the mapping does not know is counted, never guessed."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rin.common.errors import ConfigError
from rin.common.labels import label_index

# Column sets of a labels file; `frame` (from 1) and `coding_scheme` may be added to each.
LABEL_COLUMNS: Final = (("sop_instance_uid",), ("series_uid", "instance_number"), ("path",))
_MORE: Final = frozenset({"label", "frame", "coding_scheme"})
MAPPING_COLUMNS: Final = ("modality", "body_part", "local_label", "coding_scheme", "rin_class")
_SHOWN: Final = 20  # faults listed before the rest is only counted


@dataclass(frozen=True, slots=True)
class LocalLabel:
    """One label as the site writes it; `frame` counts from 1, None means every frame."""

    name: str
    scheme: str = ""
    frame: int | None = None


@dataclass(frozen=True, slots=True)
class LocalLabels:
    """The labels file: `rows` by instance UID, by (series UID, instance number) or by path below a root."""

    columns: tuple[str, ...]
    rows: Mapping[tuple[str, ...], tuple[LocalLabel, ...]]
    digest: str

    def of(self, *, instance: str, series: str, number: str, paths: Iterable[str]) -> tuple[LocalLabel, ...]:
        """The labels of one file."""
        if self.columns == LABEL_COLUMNS[0]:
            return self.rows.get((instance,), ())
        if self.columns == LABEL_COLUMNS[1]:
            return self.rows.get((series, number), ())
        return next((found for path in paths if (found := self.rows.get((path,)))), ())


@dataclass(frozen=True, slots=True)
class MappingRow:
    """One row of the mapping; `*` is any. A label without a coding scheme matches the rows of every scheme."""

    modality: str
    body_part: str
    scheme: str
    index: int

    def weight(self, scheme: str, modality: str, body_parts: tuple[str, ...]) -> int:
        """How specifically the row matches: the more of its columns are no wildcard, the higher; -1 if it does not."""
        if self.modality not in ("*", modality) or self.body_part not in ("*", *body_parts):
            return -1
        if scheme and self.scheme not in ("*", scheme):
            return -1
        return 4 * (self.scheme != "*") + 2 * (self.body_part != "*") + (self.modality != "*")


@dataclass(frozen=True, slots=True)
class LabelMapping:
    """(modality, body part, local label, coding scheme) to label indices."""

    rows: Mapping[str, tuple[MappingRow, ...]]
    digest: str

    def of(self, label: LocalLabel, *, modality: str, body_parts: tuple[str, ...]) -> tuple[int, ...]:
        """Label indices of the most specific rows that match; none if the mapping does not know the label."""
        best: dict[int, set[int]] = {}
        for row in self.rows.get(label.name, ()):
            best.setdefault(row.weight(label.scheme.upper(), modality, body_parts), set()).add(row.index)
        best.pop(-1, None)
        return tuple(sorted(best[max(best)])) if best else ()


@dataclass(slots=True)
class _Faults:
    """All faults of one file at once."""

    name: str
    lines: list[str] = field(default_factory=list)

    def add(self, line: int, text: str) -> None:
        self.lines.append(f"{self.name}:{line}: {text}")

    def check(self, step: str) -> None:
        if self.lines:
            more = len(self.lines) - _SHOWN
            tail = [f"... and {more} more"] if more > 0 else []
            raise ConfigError("\n".join(self.lines[:_SHOWN] + tail), step=step)


def read_labels(path: Path) -> LocalLabels:
    """Read the labels CSV.

    Raises:
        ConfigError: it is missing, its columns are not one of the three forms, or rows are wrong; all faults at once.
    """
    header, rows, digest = _read(path)
    forms = [form for form in LABEL_COLUMNS if set(form) <= set(header)]
    extra = set(header) - _MORE - set(forms[0] if forms else ())
    if len(forms) != 1 or "label" not in header or extra:
        raise ConfigError(
            f"{path.name}: the columns are {','.join(header) or 'missing'}",
            step="use `sop_instance_uid[,frame],label`, `series_uid,instance_number,label` or `path,label`"
            " (optional: frame, coding_scheme)",
        )
    columns, faults = forms[0], _Faults(path.name)
    found: dict[tuple[str, ...], list[LocalLabel]] = {}
    for line, row in _dicts(header, rows, path.name):
        key = tuple(_key(column, row[column]) for column in columns)
        frame, label = row.get("frame", ""), row["label"]
        if not all(key) or not label:
            faults.add(line, "a value is missing")
        elif frame and not (frame.isascii() and frame.isdigit() and int(frame) > 0):
            faults.add(line, "frame must be a whole number from 1")
        else:
            local = LocalLabel(label, row.get("coding_scheme", ""), int(frame) if frame else None)
            found.setdefault(key, []).append(local)
    faults.check(f"correct {path.name}")
    return LocalLabels(columns, {key: tuple(labels) for key, labels in found.items()}, digest)


def read_mapping(path: Path) -> LabelMapping:
    """Read the mapping CSV.

    Raises:
        ConfigError: it is missing, its columns are wrong, or a row names an unknown label; all faults at once.
    """
    header, rows, digest = _read(path)
    if set(header) != set(MAPPING_COLUMNS):
        raise ConfigError(
            f"{path.name}: the columns are {','.join(header) or 'missing'}", step=f"use `{','.join(MAPPING_COLUMNS)}`"
        )
    index, faults = label_index(), _Faults(path.name)
    found: dict[str, list[MappingRow]] = {}
    for line, row in _dicts(header, rows, path.name):
        if not row["local_label"]:
            faults.add(line, "local_label is missing")
        elif row["rin_class"] not in index:
            faults.add(line, f"rin_class '{row['rin_class']}' is not in the label set")
        else:
            modality, part, scheme = (row[k].upper() or "*" for k in ("modality", "body_part", "coding_scheme"))
            found.setdefault(row["local_label"], []).append(MappingRow(modality, part, scheme, index[row["rin_class"]]))
    faults.check(f"correct {path.name}; the known names are in `rin/common/labels.csv`")
    return LabelMapping({name: tuple(entries) for name, entries in found.items()}, digest)


def own_names() -> LabelMapping:
    """Without a mapping file the names of the label set stand for themselves."""
    return LabelMapping({name: (MappingRow("*", "*", "*", i),) for name, i in label_index().items()}, "own-names")


def _key(column: str, value: str) -> str:
    if column == "instance_number" and value.isascii() and value.isdigit():
        return str(int(value))
    return value.replace("\\", "/").removeprefix("./") if column == "path" else value


def _read(path: Path) -> tuple[list[str], list[tuple[int, list[str]]], str]:
    """Header, rows with line numbers, and the file's digest."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError:
        raise ConfigError(f"{path} cannot be read", step="check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name}: not UTF-8 text", step="save it as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    header = [name.strip().lower() for name in next(reader, [])]
    rows = [(reader.line_num, [value.strip() for value in values]) for values in reader if any(values)]
    return header, rows, hashlib.sha256(data).hexdigest()


def _dicts(header: list[str], rows: list[tuple[int, list[str]]], name: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows by column name; rows of another length are all listed."""
    faults = _Faults(name)
    for line, values in rows:
        if len(values) != len(header):
            faults.add(line, f"{len(values)} values for {len(header)} columns")
    faults.check(f"correct {name}")
    for line, values in rows:
        yield line, dict(zip(header, values, strict=True))
