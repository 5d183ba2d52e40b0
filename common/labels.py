"""The label set: RadImageNet's 165 labels, versioned by digest; names are opaque data (typos are part of them)."""

from __future__ import annotations

import csv
import functools
import hashlib
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, slots=True)
class Label:
    """One label: `index` is its head row; `name` is `<modality>_<anatomy>_<finding>`, e.g. `MR_knee_acl_pathology`."""

    index: int
    name: str
    modality: str
    anatomy: str
    finding: str


@functools.cache
def label_set() -> tuple[Label, ...]:
    """All labels, in head-row order (code-point order of the names)."""
    text = resources.files("rin.common").joinpath("labels.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return tuple(
        Label(int(row["index"]), row["label"], row["modality"], row["anatomy"], row["finding"]) for row in rows
    )


@functools.cache
def label_index() -> dict[str, int]:
    """Label name to head row."""
    return {label.name: label.index for label in label_set()}


@functools.cache
def label_set_digest() -> str:
    """Hex SHA-256 over the names in order; a plan names it, and a site with another set refuses."""
    return hashlib.sha256("\n".join(label.name for label in label_set()).encode()).hexdigest()
