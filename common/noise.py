"""The randomness of privacy: AES-256 in counter mode under keys of the operating system, apart from every seed."""

from __future__ import annotations

import math
import os
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Floats = npt.NDArray[np.float32]

PAIR: Final = 12  # bytes of the stream for two normals: 8 for the radius, 4 for the angle
BLOCK: Final = 1 << 14  # pairs made at once: what fits into a cache
DRAWS: Final = 4  # independent draws behind each value, see `Source.normals`


class Source:
    """A stream of random bytes that nobody can repeat, and what private training draws from it.

    The key lives in this object's memory only: it is made here, and the object can be neither copied nor written down
    (threat T7). Whoever knew it could subtract the noise.
    """

    def __init__(self) -> None:
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16)))
        self._stream = cipher.encryptor()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("the keys of privacy stay in memory")

    def bytes(self, count: int) -> bytes:
        """The next `count` bytes."""
        return self._stream.update(bytes(count))

    def seed(self) -> int:
        """A seed below 2**63 for a generator that need not be cryptographic: augmentation, dropout."""
        return int.from_bytes(self.bytes(8), "big") >> 1

    def uniforms(self, count: int) -> npt.NDArray[np.float64]:
        """(count,) multiples of 2**-53 in [0, 1)."""
        return np.multiply(np.frombuffer(self.bytes(8 * count), np.uint64) >> np.uint64(11), 2.0**-53, dtype=np.float64)

    def chosen(self, count: int, rate: float) -> npt.NDArray[np.int64]:
        """Poisson sampling: each of `count` places by itself with probability `rate`; ascending."""
        return np.flatnonzero(self.uniforms(count) < rate)

    def some(self, count: int, most: int) -> npt.NDArray[np.int64]:
        """`most` of `count` places without replacement, or all where there are no more; ascending."""
        if count <= most:
            return np.arange(count)
        return np.sort(np.argsort(self.uniforms(count), kind="stable")[:most])

    def normals(self, count: int) -> Floats:
        """(count,) float32 draws of a standard normal.

        Each is the sum of `DRAWS` independent ones over the root of their number: the gaps between the floating-point
        values that one Box-Muller draw can take tell what was added to it (Mironov 2012), those of a sum of several
        cannot be searched (Holohan and Braghin 2021, arXiv 2107.10138).
        """
        out = np.empty(count, np.float32)
        for first in range(0, count, 2 * BLOCK):
            part = out[first : first + 2 * BLOCK]
            total = np.zeros(len(part) + len(part) % 2, np.float32)
            for _ in range(DRAWS):
                total += self._pairs(len(total) // 2)
            np.multiply(total[: len(part)], np.float32(1 / math.sqrt(DRAWS)), out=part)
        return out

    def _pairs(self, count: int) -> Floats:
        """2 * count standard normals (Box and Muller 1958).

        The uniform under the logarithm has 64 bits, so that radii reach 9.4; float32 keeps its exponent.
        """
        data = self.bytes(PAIR * count)
        radius = (np.frombuffer(data, np.uint64, count) | np.uint64(1)).astype(np.float32)
        radius *= np.float32(2.0**-64)
        np.sqrt(np.log(radius, out=radius) * np.float32(-2), out=radius)
        angle = np.frombuffer(data, np.int32, count, 8 * count).astype(np.float32)
        angle *= np.float32(math.pi / 2**31)
        out = np.empty(2 * count, np.float32)
        for part, turn in ((out[:count], np.cos), (out[count:], np.sin)):
            np.multiply(turn(angle), radius, out=part)
        return out
