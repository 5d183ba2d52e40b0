"""The picture has the right grey, polarity and shape; formulas are held against pydicom's own."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_windowing

from rin.client.ingest.reasons import Refused
from rin.client.ingest.windowing import (
    Grey,
    Lut,
    Window,
    aspect_of,
    render,
    render_colour,
    rescale,
    shrink,
    window_of,
)

CT = Grey("CT", "ABDOMEN", intercept=-1024.0, window=Window(40, 400))
MR = Grey("MR", "BRAIN")
RAMP = np.tile(np.linspace(0, 2047, 256).astype(np.int16), (256, 1))


def by_pydicom(values: np.ndarray, window: Window) -> np.ndarray:
    """0..255 by `apply_windowing`, whose output range is the stored values' own (12 bits here)."""
    dataset = Dataset()
    dataset.PhotometricInterpretation, dataset.BitsStored, dataset.PixelRepresentation = "MONOCHROME2", 12, 0
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = window.centre, window.width, window.function
    with np.errstate(over="ignore"):
        return apply_windowing(values.astype(np.float64), dataset) / 4095 * 255


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(1000.0, 800.0), (300.5, 1.5), (0.0, 4096.0)])
def test_windows_equal_pydicoms(function: str, centre: float, width: float) -> None:
    window = window_of([centre], [width], function)
    assert window is not None
    picture, policy = render(RAMP.astype(np.uint16), dataclasses.replace(MR, window=window))
    assert policy == {"LINEAR": "window", "LINEAR_EXACT": "window-exact", "SIGMOID": "window-sigmoid"}[function]
    assert np.abs(picture - by_pydicom(RAMP, window)).max() <= 0.51


def test_hounsfield_units_reach_the_window() -> None:
    stored = np.full((256, 256), 1024 + 40, np.int16)
    stored[:, :100], stored[:, 200:] = 1024 - 200, 1024 + 300
    picture, _ = render(stored, CT)
    assert (picture[0, 0], picture[0, 255]) == (0, 255)
    assert picture[0, 150] in (127, 128)


def test_slope_and_intercept_count_separately() -> None:
    window = Window(100, 201)
    stored = np.tile(np.arange(256, dtype=np.uint16), (256, 1))
    slope_only, _ = render(stored, dataclasses.replace(MR, slope=0.5, window=window))
    both, _ = render((stored // 2).astype(np.uint16), dataclasses.replace(MR, window=window))
    assert np.abs(slope_only.astype(int) - both).max() <= 1
    assert slope_only[0, 200] == round((100 - 99.5 + 100) / 200 * 255)
    assert rescale(None, 1.0) == 1.0
    assert rescale(-3.0, 0.0) == -3.0
    for bad in (0.0, math.nan):
        with pytest.raises(Refused, match="bad-rescale"):
            rescale(bad, 1.0)


@pytest.mark.parametrize(
    ("centres", "widths", "function", "expected"),
    [
        ([40, 300], [400, 1500], "", Window(40, 400)),  # several: the first
        ([40], [0.5], "", None),  # LINEAR wants 1 or more
        ([40], [0], "SIGMOID", None),
        ([40], [0.5], "LINEAR_EXACT", Window(40, 0.5, "LINEAR_EXACT")),
        ([40], [-400], "", None),
        ([math.nan], [400], "", None),
        ([], [400], "", None),
        ([40], [400], "NONSENSE", Window(40, 400)),
    ],
)
def test_which_window(centres: list[float], widths: list[float], function: str, expected: Window | None) -> None:
    assert window_of(centres, widths, function) == expected


def test_monochrome1_is_inverted_after_windowing_and_its_frame_stays_black() -> None:
    stored = np.tile(np.arange(128, dtype=np.uint16), (64, 1))
    plain, _ = render(stored, dataclasses.replace(MR, window=Window(64, 128)))
    turned, _ = render(stored, dataclasses.replace(MR, window=Window(64, 128), inverted=True))
    inside = slice(64, 192)
    np.testing.assert_array_equal(turned[inside], 255 - plain[inside])
    assert not turned[:64].any()
    assert not turned[192:].any()


def test_padding_does_not_decide_the_percentiles(rng: np.random.Generator) -> None:
    tissue = rng.integers(800, 1200, (256, 256)).astype(np.int16)
    padded = tissue.copy()
    padded[:40], padded[:, 250:] = -2000, 3000
    clean, _ = render(tissue, MR)
    got, policy = render(padded, dataclasses.replace(MR, padding=(-2000, -2000)))
    assert policy == "percentile"
    assert got[:40, :250].max() == 0
    inner = np.s_[50:200, 0:240]
    ranged, _ = render(padded, dataclasses.replace(MR, padding=(-2000, -2000)))
    assert ranged[inner].std() < clean[inner].std()  # 3000 is no padding here
    both = padded.copy()
    both[:, 250:] = -1990
    fixed, _ = render(both, dataclasses.replace(MR, padding=(-2000, -1900)))
    assert np.abs(fixed[inner].astype(int) - clean[inner]).mean() < 3
    dark, _ = render(both, dataclasses.replace(MR, padding=(-2000, -1900), inverted=True))
    assert dark[:40].max() == 0  # black in both polarities


def test_without_a_window_the_percentiles_are_used_and_said(rng: np.random.Generator) -> None:
    stored = rng.integers(100, 200, (256, 256)).astype(np.uint16)
    stored[0, :3] = 60000  # three hot pixels
    picture, policy = render(stored, MR)
    assert policy == "percentile"
    assert picture.mean() == pytest.approx(127, abs=6)


def test_mostly_empty_images_keep_their_content() -> None:
    stored = np.zeros((256, 256), np.uint16)
    stored[100:103, 100:103] = 900
    picture, _ = render(stored, MR)
    assert picture[101, 101] == 255


@pytest.mark.parametrize(
    ("body_part", "policy", "black", "white"), [("CHEST", "ct-lung", -1350, 150), ("ABDOMEN", "ct-soft", -160, 240)]
)
def test_ct_without_a_window_takes_the_reading_window(body_part: str, policy: str, black: int, white: int) -> None:
    hounsfield = np.tile(np.linspace(-1500, 1500, 256).astype(np.int16), (256, 1))
    picture, used = render(hounsfield, Grey("CT", body_part))
    assert used == policy
    assert picture[0][hounsfield[0] < black].max() == 0
    assert picture[0][hounsfield[0] > white].min() == 255


def test_a_window_that_shows_nothing_gives_way() -> None:
    """Philips writes windows of MR in stored and in rescaled values; one of them is far away."""
    stored = np.tile(np.arange(256, dtype=np.uint16), (256, 1))
    picture, policy = render(stored, dataclasses.replace(MR, window=Window(90000, 10)))
    assert policy == "percentile"
    assert picture.std() > 50


def test_ultrasound_of_8_bits_is_shown_as_it_is() -> None:
    stored = np.tile(np.arange(40, 140, dtype=np.uint8), (100, 1))
    picture, policy = render(stored, Grey("US", ""))
    assert policy == "full-range"
    assert 36 <= picture[picture > 0].min() <= 42
    assert picture.max() <= 140


def test_look_up_tables(rng: np.random.Generator) -> None:
    stored = rng.integers(0, 256, (256, 256)).astype(np.uint16)
    table = (np.arange(256, dtype=np.float32) ** 2).astype(np.float32)
    picture, policy = render(stored, dataclasses.replace(MR, voi_lut=Lut(0, table)))
    assert policy == "voi-lut"
    np.testing.assert_allclose(picture, table[stored] / table.max() * 255, atol=0.51)
    shifted = dataclasses.replace(MR, modality_lut=Lut(-10, np.arange(50, dtype=np.float32)), window=Window(25.5, 51))
    values = np.tile(np.arange(-100, 156, dtype=np.int16), (256, 1))
    picture, _ = render(values, shifted)
    assert (picture[0, 0], picture[0, -1]) == (0, 250)  # outside the table: its first and last entry
    assert picture[0, 100] == 51  # value 0 is entry 10


def test_constant_images_are_refused() -> None:
    for stored in (np.full((9, 9), 7, np.uint16), np.zeros((9, 9), np.int16)):
        with pytest.raises(Refused, match="constant"):
            render(stored, MR)
    with pytest.raises(Refused, match="constant"):
        render(np.full((9, 9), 7, np.int16), dataclasses.replace(MR, padding=(7, 7)))
    with pytest.raises(Refused, match="constant"):
        render_colour(np.full((9, 9), 3, np.uint8), 1.0)


@given(rows=st.integers(1, 700), cols=st.integers(1, 700), aspect=st.sampled_from([1.0, 0.952, 2.0, 0.1, 16.0]))
def test_nothing_is_cropped_and_millimetres_are_kept(rows: int, cols: int, aspect: float) -> None:
    small = shrink(np.zeros((rows, cols), np.uint8), aspect)
    assert max(small.shape) == 256
    scale = 256 / max(rows * aspect, cols)
    assert abs(small.shape[0] - rows * aspect * scale) <= 1
    assert abs(small.shape[1] - cols * scale) <= 1


def test_borders_survive_in_every_corner() -> None:
    stored = np.full((384, 274), 100, np.uint16)
    for corner in (np.s_[:12, :12], np.s_[:12, -12:], np.s_[-12:, :12], np.s_[-12:, -12:]):
        stored[corner] = 1000
    picture, _ = render(stored, MR)
    rows, cols = np.nonzero(picture == 255)
    assert (rows.min(), rows.max()) == (0, 255)
    left = (256 - round(274 * 256 / 384)) // 2
    assert cols.min() == left
    assert cols.max() == 255 - (256 - left - round(274 * 256 / 384))


def test_halving_is_the_exact_mean(rng: np.random.Generator) -> None:
    stored = rng.integers(0, 255, (512, 512)).astype(np.uint8)
    picture, _ = render(stored, Grey("US", ""))
    mean = stored.reshape(256, 2, 256, 2).astype(float).mean((1, 3))
    assert np.abs(picture - mean).max() <= 0.5


@pytest.mark.parametrize(
    ("values", "ratio"),
    [([0.666, 0.7], 0.666 / 0.7), ([0.7, 0.7], 1.0), ([2, 1], 2.0), ([1.0], None), ([0, 1], None), ([500, 1], 1.0)],
)
def test_aspect(values: list[float], ratio: float | None) -> None:
    assert aspect_of(values) == ratio
    assert aspect_of([math.nan, 1.0]) is None


def test_narrow_ranges_are_averaged_without_steps(rng: np.random.Generator) -> None:
    """Stored values 0..7 spread over a whole window: means rounded to integers would leave eight greys."""
    stored = rng.integers(0, 8, (512, 512)).astype(np.uint16)
    picture, _ = render(stored, dataclasses.replace(MR, window=Window(4, 8)))
    assert len(np.unique(picture)) > 20
