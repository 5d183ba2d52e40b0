"""The drawing: determinism, sizes, masks, sites' tables, and no label told by brightness."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rin.common.labels import label_index
from rin.server.phantom import PATTERNS, PHANTOM_LABELS, SITES, TASKS, draw, draw_lesion, task_images


def test_labels_are_radimagenets_in_three_groups() -> None:
    assert 12 <= len(PHANTOM_LABELS) <= 15
    assert set(PHANTOM_LABELS) <= set(label_index())
    assert set(PATTERNS) == set(PHANTOM_LABELS)
    groups = {label.rsplit("_", 1)[0][:2] for label in PHANTOM_LABELS}
    assert groups == {"CT", "MR", "US"}


@pytest.mark.parametrize("name", SITES)
def test_each_site_lacks_some_labels_and_maps_the_rest(name: str) -> None:
    site = SITES[name]
    assert site.name == name and site.lacks and site.lacks < set(PHANTOM_LABELS)
    assert {row.rin_class for row in site.mapping} == set(site.labels)
    assert not {row.local_label for row in site.mapping} & set(site.unknown)
    for row in site.mapping:
        assert row.modality in ("*", row.rin_class[:2])
        assert row.body_part in ("*", site.body_parts[row.rin_class[:2]])


def test_every_label_is_held_by_two_sites_at_least() -> None:
    for label in PHANTOM_LABELS:
        assert sum(label in site.labels for site in SITES.values()) >= 2


@pytest.mark.parametrize("label", PHANTOM_LABELS)
def test_draw_is_deterministic_and_in_range(label: str) -> None:
    for site in SITES.values():
        scanner = site.scanners[label[:2]]
        image = draw(label, np.random.default_rng(3), scanner)
        assert image.shape == scanner.matrix and image.dtype == np.float32
        assert image.min() >= 0.0 and image.max() <= 1.0 and image.std() > 0.05
        assert np.array_equal(image, draw(label, np.random.default_rng(3), scanner))
        assert not np.array_equal(image, draw(label, np.random.default_rng(4), scanner))


def test_brightness_does_not_tell_the_label() -> None:
    """Mean and deviation of an image, as scores, stay near chance within the CT and MR groups (bound: 3 sigma)."""
    for modality in ("CT", "MR"):
        labels = [label for label in PHANTOM_LABELS if label.startswith(modality)]
        scanner = SITES["siteA"].scanners[modality]
        rng = np.random.default_rng(11)
        means = np.array([[draw(label, rng, scanner).mean() for _ in range(40)] for label in labels])
        for row in range(len(labels)):
            truth = np.repeat(np.arange(len(labels)) == row, means.shape[1])
            assert abs(float(roc_auc_score(truth, means.ravel())) - 0.5) < 0.17, labels[row]


@pytest.mark.parametrize("task", TASKS)
def test_task_images(task: str) -> None:
    images, labels, masks = task_images(task, 12, seed=5, size=128)
    assert images.shape == masks.shape == (12, 128, 128)
    assert (images.dtype, labels.dtype, masks.dtype) == (np.uint8, np.int64, np.uint8)
    assert set(labels.tolist()) == set(range(len(TASKS[task])))
    share = masks.mean(axis=(1, 2))
    assert set(np.unique(masks)) == {0, 1} and share.min() > 0.005 and share.max() < 0.2
    again = task_images(task, 6, seed=5, size=128)
    assert np.array_equal(again[0], images[:6]) and np.array_equal(again[2], masks[:6])
    assert not np.array_equal(task_images(task, 1, seed=6, size=128)[0], images[:1])


def test_the_mask_covers_what_differs_from_the_background() -> None:
    """Inside the mask of a lesion the smoothed image differs from the ring around it."""
    for i in range(6):
        image, mask = draw_lesion("lesion", np.random.default_rng(i))
        ring = cv2.dilate(mask.astype(np.uint8), np.ones((15, 15), np.uint8)).astype(bool) & ~mask
        assert abs(float(image[mask].mean()) - float(image[ring].mean())) > 10
