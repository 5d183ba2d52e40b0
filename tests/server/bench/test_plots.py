"""Plots: pictures that a browser can decode, and outlines where the masks are."""

from __future__ import annotations

import base64
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from rin.server.bench import plots
from rin.server.bench.summary import RoundFacts, SiteRound


def decoded(uri: str) -> npt.NDArray[np.uint8]:
    data = np.frombuffer(base64.b64decode(uri.split(",", 1)[1]), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    assert image is not None
    return np.asarray(image, np.uint8)


def test_a_plain_picture_keeps_every_pixel() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
    uri = plots.plain(image)
    assert uri.startswith("data:image/png;base64,")
    assert np.array_equal(decoded(uri), image)


def test_outlines_lie_on_the_edge_of_the_mask_and_nowhere_else() -> None:
    image, mask = np.full((64, 64), 90, np.uint8), np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 1
    picture = decoded(plots.outlined(image, truth=mask, predicted=None)).astype(int)
    assert picture.shape == (128, 128, 3)
    coloured = (picture.max(axis=2) - picture.min(axis=2)) > 60
    assert coloured[32:96, 30:36].any(axis=1).all()
    assert not coloured[44:84, 44:84].any()
    assert not coloured[:24].any()


def test_a_mask_of_the_networks_size_is_drawn_at_the_images_size() -> None:
    image, small = np.full((64, 64), 90, np.uint8), np.zeros((16, 16), np.uint8)
    small[4:12, 4:12] = 1
    both = decoded(plots.outlined(image, truth=np.zeros_like(image), predicted=small)).astype(int)
    rows = np.flatnonzero(((both.max(axis=2) - both.min(axis=2)) > 60).any(axis=1))
    assert rows.min() == pytest.approx(32, abs=4)
    assert rows.max() == pytest.approx(96, abs=4)


@pytest.mark.parametrize(
    ("metrics", "captions"),
    [
        ({"loss": 1.0, "top1": 0.5, "images": 8.0}, ["training loss", "top-1 accuracy"]),
        ({"images": 8.0}, []),
    ],
)
def test_a_curve_for_every_metric_that_was_sent(metrics: dict[str, float], captions: list[str]) -> None:
    rounds = [RoundFacts(n, 1.0, (SiteRound("siteA", metrics), SiteRound("siteB", {}))) for n in (1, 2)]
    found = plots.learning_curves(rounds)
    assert [caption for caption, _ in found] == captions
    for _, uri in found:
        root: Any = ElementTree.fromstring(base64.b64decode(uri.split(",", 1)[1]))
        assert root.tag.endswith("svg")


def test_no_rounds_give_no_curves() -> None:
    assert plots.learning_curves([]) == []
