"""Which frames of a file are wanted, and with which labels: the labels file and the mapping put together."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from rin.client.ingest.header import Header
from rin.client.ingest.mapping import LabelMapping, LocalLabel, LocalLabels
from rin.client.ingest.reasons import Refused
from rin.client.ingest.selection import Identity, anatomy


@dataclass(frozen=True, slots=True)
class Wanted:
    """Label indices of a file's frames: `every` for all of them, `frames` for single ones."""

    every: tuple[int, ...] | None
    frames: dict[int, tuple[int, ...]]
    unmapped_frames: int
    open: bool

    def of(self, frame: int) -> tuple[int, ...]:
        """Label indices of one frame (from 1)."""
        return tuple(sorted({*(self.every or ()), *self.frames.get(frame, ())}))

    def decode(self) -> frozenset[int] | None:
        """The frames to decode; None means all."""
        return None if self.every is not None else frozenset(self.frames)


@dataclass(slots=True)
class Labelling:
    """Labels and mapping of one run, and the local labels that nothing maps."""

    labels: LocalLabels | None
    mapping: LabelMapping
    unmapped: Counter[str] = field(default_factory=Counter)

    @property
    def digest(self) -> bytes:
        """16 bytes over both files: a file is looked at again when they change."""
        text = f"{self.labels.digest if self.labels else 'none'} {self.mapping.digest}"
        return hashlib.sha256(text.encode()).digest()[:16]

    def wanted(self, header: Header, modality: str, who: Identity, paths: tuple[str, ...]) -> Wanted:
        """What is known about the frames of one file.

        Raises:
            Refused: `unlabelled` or `unmapped-label`.
        """
        if self.labels is None:
            return Wanted((), {}, 0, open=False)
        number = header.text("InstanceNumber")
        found = self.labels.of(
            instance=who.instance.decode("latin-1"),
            series=who.series.decode("latin-1"),
            number=str(int(number)) if number.isascii() and number.isdigit() else number,
            paths=paths,
        )
        if not found:
            raise Refused("unlabelled")
        parts = (header.text("BodyPartExamined"), anatomy(header, modality).upper())
        return self._map(found, modality, parts)

    def _map(self, found: tuple[LocalLabel, ...], modality: str, parts: tuple[str, str]) -> Wanted:
        every: set[int] = set()
        frames: dict[int, set[int]] = {}
        unknown: set[int | None] = set()
        for label in found:
            indices = self.mapping.of(label, modality=modality, body_parts=parts)
            if not indices:
                self.unmapped[label.name] += 1
                unknown.add(label.frame)
            elif label.frame is None:
                every.update(indices)
            else:
                frames.setdefault(label.frame, set()).update(indices)
        if not every and not frames:
            raise Refused("unmapped-label")
        single = {frame: tuple(sorted(indices)) for frame, indices in frames.items()}
        left_out = 0 if every else len(unknown - single.keys() - {None})
        return Wanted(tuple(sorted(every)) if every else None, single, left_out, open=bool(unknown))
