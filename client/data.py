"""Training images of one site: catalog rows and mapped shards as batches of uint8, in canonical order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rin.client.home import Home
from rin.client.ingest.cache import SHARD_IMAGES, SIDE, Reading, map_shards
from rin.client.ingest.catalog import CatalogImage, patients_known, read_images, require_catalog
from rin.common.labels import label_set


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The images of one split, or of all, with a declared label; image `i` is the same one in every process.

    It is what the training loop reads, see `rin.common.batches.Data`.

    The order is by pseudonyms, so that the same archive and key give the same order however they were ingested.

    Args:
        patient: (n,) int64, the patient of each image; patients count from 0 in canonical order.
        modality: (n,) modality of each image, e.g. `MR`.
        anatomy: (n,) anatomy of each image in the label set's names, `other` or `unknown`.
        label_offsets: (n + 1,) int64 into `label_indices`.
        label_indices: label indices (0..164) of image `i` at `label_offsets[i]:label_offsets[i + 1]`, sorted,
            declared labels only.
        patients_known: False where the archive names no patients: each image then stands for one of its own, and
            nothing can be said or promised per patient.
    """

    patient: NDArray[np.int64]
    modality: NDArray[np.str_]
    anatomy: NDArray[np.str_]
    label_offsets: NDArray[np.int64]
    label_indices: NDArray[np.int64]
    patients_known: bool
    _slots: NDArray[np.int64]
    _shards: tuple[NDArray[np.uint8], ...]
    _reading: Reading  # for as long as the shards are mapped, ingest erases nothing in them

    @classmethod
    def open(cls, home: Home, *, labels: Sequence[int], split: str | None) -> TrainingData:
        """Read the catalog and map the cache.

        Args:
            labels: the declared label indices; an image without any of them is left out, other labels are dropped.
            split: `train`, `val` or `test`; None for all patients.

        Raises:
            StateError: nothing was ingested, or the cache is shorter than the catalog says.
        """
        require_catalog(home.catalog)
        reading = Reading(home.cache_lock)
        slots, images = read_images(home.catalog, split=split)
        declared = set(labels)
        rows = [(image, found) for image in images if (found := [i for i in image.labels if i in declared])]
        patients: dict[bytes, int] = {}
        for image, _ in rows:
            patients.setdefault(image.patient, len(patients))
        return cls(
            patient=_ints(patients[image.patient] for image, _ in rows),
            modality=_texts(rows, "modality"),
            anatomy=_texts(rows, "anatomy"),
            label_offsets=np.concatenate([_ints([0]), np.cumsum(_ints(len(found) for _, found in rows))]),
            label_indices=_ints(index for _, found in rows for index in found),
            patients_known=patients_known(home.catalog),
            _slots=_ints(image.slot for image, _ in rows),
            _shards=tuple(map_shards(home.cache, slots=slots)),
            _reading=reading,
        )

    def __len__(self) -> int:
        return self.n_images

    def batch(self, index: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Images (b, 256, 256) and labels (b, number of labels in the label set)."""
        return self.images(index), self.targets(index) > 0

    @property
    def n_images(self) -> int:
        """Images in this split with a declared label."""
        return len(self._slots)

    @property
    def n_patients(self) -> int:
        """Patients that they come from, as far as that can be shown: unknown patients may all be one person."""
        if not self.patients_known:
            return min(1, self.n_images)
        return int(self.patient[-1]) + 1 if len(self.patient) else 0

    def images(self, indices: NDArray[Any] | Sequence[int]) -> NDArray[np.uint8]:
        """Copy a batch out of the shards: (b, 256, 256) uint8, grey, in the order of `indices`."""
        out = np.empty((len(indices), SIDE, SIDE), np.uint8)
        for row, slot in zip(out, self._slots[np.asarray(indices, np.int64)].tolist(), strict=True):
            shard, at = divmod(slot, SHARD_IMAGES)
            row[:] = self._shards[shard][at]
        return out

    def labels_of(self, index: int) -> NDArray[np.int64]:
        """Declared label indices of one image."""
        return self.label_indices[self.label_offsets[index] : self.label_offsets[index + 1]]

    def targets(self, indices: NDArray[Any] | Sequence[int]) -> NDArray[np.float32]:
        """Multi-hot targets of a batch: (b, number of labels in the label set) float32, 0 or 1."""
        out = np.zeros((len(indices), len(label_set())), np.float32)
        for row, index in zip(out, np.asarray(indices, np.int64).tolist(), strict=True):
            row[self.labels_of(index)] = 1
        return out


def _ints(values: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(values, np.int64)


def _texts(rows: list[tuple[CatalogImage, list[int]]], column: str) -> NDArray[np.str_]:
    return np.array([getattr(image, column) for image, _ in rows], np.str_)
