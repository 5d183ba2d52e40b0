"""The layout of a weight file: safetensors whose header is a function of the plan, so it is compared, not parsed.

All tensors are float32 in code-point order of their names, with empty metadata. Digests are over the tensor bytes, the
part after the header (reference: safetensors file format: 8 bytes little-endian header length, JSON header, data).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rin.common.errors import RefusedError
from rin.common.files import BLOCK


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: float32, `offset` in bytes from the end of the header. `kind`: parameter or buffer."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Names, shapes and kinds of all tensors of one plan's network, in file order."""

    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> Layout:
        """From (name, shape, kind) in any order; kind is `parameter` or `buffer`."""
        rows, offset = [], 0
        for name, shape, kind in sorted(tensors):
            rows.append(Tensor(name, tuple(shape), kind, offset))
            offset += rows[-1].nbytes
        return cls(tuple(rows))

    @property
    def data_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        return len(self.header()) + self.data_bytes

    def header(self) -> bytes:
        """The first bytes of every weight file of this layout, as the safetensors library writes them."""
        entries = {
            t.name: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [t.offset, t.offset + t.nbytes]}
            for t in self.tensors
        }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def to_json(self) -> list[Any]:
        return [[t.name, list(t.shape), t.kind] for t in self.tensors]

    @classmethod
    def from_json(cls, value: list[Any]) -> Layout:
        return cls.of((name, tuple(shape), kind) for name, shape, kind in value)

    def check(self, path: Path, digest: str) -> None:
        """Compare the file at `path` with this layout and `digest` (hex SHA-256 of the tensor bytes).

        Raises:
            RefusedError: update-length, update-header or bad-weights.
        """
        header = self.header()
        with path.open("rb") as file:
            if file.seek(0, 2) != len(header) + self.data_bytes:
                raise RefusedError("update-length")
            file.seek(0)
            if file.read(len(header)) != header:
                raise RefusedError("update-header")
            sha = hashlib.sha256()
            while block := file.read(BLOCK):
                sha.update(block)
        if sha.hexdigest() != digest:
            raise RefusedError("bad-weights")


NOTHING: Final = Layout(())  # of an update of the closing round: figures come with no tensors


def data_offset(first: bytes) -> int:
    """Where the tensor bytes begin, from the first 8 bytes of a safetensors file."""
    return 8 + struct.unpack("<Q", first[:8])[0]


def file_digest(path: Path) -> str:
    """Hex SHA-256 of the tensor bytes of the weight file at `path`."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(data_offset(file.read(8)))
        while block := file.read(BLOCK):
            sha.update(block)
    return sha.hexdigest()
