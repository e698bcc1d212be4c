"""The shapes of pictures: their table, which of them a picture gets, and how they are written."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image

from mom_tokenizers.errors import UserError
from mom_tokenizers.image.autoencoder import fitted
from mom_tokenizers.media.shapes import Shapes, check_written, cropped_share


@pytest.mark.parametrize(("tokens", "ratio"), [(16, 2), (64, 4), (64, 3), (100, 1.5), (256, 4), (1024, 3)])
def test_the_table_is_that_of_an_enumeration_of_all_grids(tokens, ratio):
    shapes = Shapes(tokens, ratio)
    # Of all grids of at most `tokens`, those to which no further column or no further row can be added.
    every = itertools.product(range(1, tokens + 1), repeat=2)
    full = [(r, c) for r, c in every if r * c <= tokens < max(r * (c + 1), (r + 1) * c)]
    assert list(shapes.grids) == [(r, c) for r, c in full if r <= ratio * c and c <= ratio * r]
    assert all(tokens - max(r, c) < r * c <= tokens for r, c in shapes.grids)
    assert shapes.square == (math.isqrt(tokens),) * 2
    assert shapes.square in shapes.grids


def test_a_picture_gets_the_grid_that_crops_it_least():
    shapes, rng = Shapes(64), np.random.default_rng(0)
    # Least cropped and nearest by the logarithm are the same, as 1 - min(a/b, b/a) = 1 - exp(-|log a - log b|).
    for width, height in rng.integers(1, 2000, (300, 2)).tolist():
        shares = [cropped_share(width, height, grid) for grid in shapes.grids]
        assert cropped_share(width, height, shapes.nearest(width, height)) == pytest.approx(min(shares), abs=1e-12)
    assert shapes.nearest(500, 500) == (8, 8)
    assert shapes.nearest(5000, 10) == (4, 16)
    assert shapes.nearest(10, 5000) == (16, 4)


@pytest.mark.parametrize(("size", "grid"), [((400, 200), (8, 8)), ((400, 200), (5, 12)), ((150, 450), (14, 4))])
def test_the_share_that_is_cropped_is_the_one_that_is_missing_in_the_pixels(size, grid):
    width, height = size
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([across, down, 0 * down], 2).round().astype(np.uint8))
    pixels = fitted(image, grid[0] * 16, grid[1] * 16) / 2 + 0.5
    # What is left runs from the middle of the first pixel to that of the last, so a pixel is added.
    x, y = pixels[0].mean(0), pixels[1].mean(1)
    kept = (x[-1] - x[0]) * len(x) / (len(x) - 1) * (y[-1] - y[0]) * len(y) / (len(y) - 1)
    assert 1 - kept == pytest.approx(cropped_share(width, height, grid), abs=0.02)


def test_a_shape_is_written_as_width_to_height_or_as_rows_and_columns():
    shapes = Shapes(64)
    assert shapes.asked_for("2:1") == shapes.nearest(2, 1) == (5, 11)
    assert shapes.asked_for("1:2") == (11, 5)
    assert shapes.asked_for("1:1") == (8, 8)
    assert shapes.asked_for("4x16") == (4, 16)
    for shape, message in {
        "5x13": "5 rows of 13 columns is none of",
        "9:1": "more than 4 times",
        "wide": "write",
        "1" + 400 * "0" + ":1" + 400 * "0": "more than 4 times",
    }.items():
        with pytest.raises(UserError, match=message):
            shapes.asked_for(shape)
    for wrong in ("0:1", "1:0", "1:", "2/1", "", "-1:2"):
        with pytest.raises(UserError, match="write width:height"):
            check_written(wrong)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": 60}, "tokens must be the number of tokens of a square picture"),
        ({"tokens": 64.0}, "tokens must be"),
        ({"tokens": 10**12}, "more than the 65,536 that a picture may have"),
        ({"tokens": 64, "max_aspect_ratio": 1}, "max_aspect_ratio must be above 1"),
        ({"tokens": 64, "max_aspect_ratio": True}, "max_aspect_ratio"),
        ({"tokens": 64, "ratio": 3}, "expected {tokens"),
        (True, "expected {tokens"),
    ],
)
def test_a_table_that_is_not_possible_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        Shapes.of(values)
