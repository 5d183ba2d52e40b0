"""Search for PHI canaries: strings planted in an archive that must never be seen outside the vault."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rin.common.errors import StateError

BLOCK: Final = 16 << 20
TEXT: Final = frozenset({".log", ".json", ".jsonl", ".toml", ".txt", ".html", ".csv", ".pid"})


@dataclass(frozen=True, slots=True)
class Canaries:
    """`anywhere`: strings long enough to be proof in any bytes; `in_text`: dates, which weights hold by chance."""

    anywhere: tuple[bytes, ...]
    in_text: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Hit:
    place: Path
    canary: bytes


@dataclass(frozen=True, slots=True)
class Search:
    """`canaries`: how many strings were searched for; `searched`: bytes read."""

    canaries: int
    searched: int
    hits: tuple[Hit, ...]


def read(archives: Path) -> Canaries:
    """The canaries that `write_archive` recorded beside each archive, as `<site>.canaries.json`."""
    records = [json.loads(path.read_bytes()) for path in sorted(archives.glob("*.canaries.json"))]
    if not records:
        raise StateError(f"{archives} holds no record of canaries", step="write the archives first")
    anywhere = {text for record in records for text in (record["marker"], record["uid_root"], *record["canaries"])}
    dates = {text for record in records for text in record["dates"]}
    return Canaries(tuple(sorted(t.encode() for t in anywhere)), tuple(sorted(t.encode() for t in dates)))


def _files(places: Sequence[Path]) -> Iterator[Path]:
    for place in places:
        if place.is_dir():
            yield from (path for path in sorted(place.rglob("*")) if path.is_file() and not path.is_symlink())
        elif place.is_file():
            yield place


def _needles(strings: Sequence[bytes]) -> list[bytes]:
    """What to look for in lower-cased bytes so that none of `strings` is missed, in UTF-8 and UTF-16."""
    # A string that holds another one is found with it: nearly all canaries hold the marker or the UID root.
    short = [text for text in strings if not any(other != text and other in text for other in strings)]
    return [form.lower() for text in short for form in (text, text.decode().encode("utf-16-le"))]


def _dates(dates: Sequence[bytes]) -> re.Pattern[bytes]:
    """Matches any of `dates` (eight digits) that is not a piece of a digest or of a longer number."""
    return re.compile(rb"(?<![0-9A-Fa-f.])(?:" + (b"|".join(dates) or b"(?!)") + rb")(?![0-9A-Fa-f])")


def search(places: Sequence[Path], canaries: Canaries) -> Search:
    """Look for `canaries` in every byte of the files in and below `places`, and in their names."""
    needles, dates = _needles(canaries.anywhere), _dates(canaries.in_text)
    overlap = 2 * max(map(len, canaries.anywhere + canaries.in_text))
    hits, searched = [], 0
    for path in _files(places):
        hits += [Hit(path, needle) for needle in needles if needle in path.name.encode().lower()]
        with path.open("rb") as file:
            tail = b""
            while block := file.read(BLOCK):
                searched += len(block)
                data = (tail + block).lower()
                hits += [Hit(path, needle) for needle in needles if needle in data]
                if path.suffix in TEXT:
                    hits += [Hit(path, match[0]) for match in dates.finditer(data)]
                tail = block[-overlap:]
    return Search(len(canaries.anywhere) + len(canaries.in_text), searched, tuple(dict.fromkeys(hits)))
