"""Many pictures as one: every picture is there, whole and in its shape, with its caption below it."""

import numpy as np
import pytest
from PIL import Image

from mom_train.generate.contact_sheet import MOST, contact_sheet

RED, BLUE = (200, 10, 10), (10, 10, 200)


def box(sheet, colour):
    """(left, top, right, bottom) of the pixels of one colour."""
    y, x = np.nonzero((np.asarray(sheet) == colour).all(2))
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def test_pictures_of_any_shape_keep_it_and_small_ones_grow_by_whole_numbers():
    wide, tall = Image.new("RGB", (40, 20), RED), Image.new("RGB", (300, 600), BLUE)
    sheet = contact_sheet([(wide, "a"), (tall, "b")], columns=2)
    left, top, right, bottom = box(sheet, RED)
    assert (right - left, bottom - top) == (160, 80)
    left, top, right, bottom = box(sheet, BLUE)
    assert (right - left, bottom - top) == (80, 160)
    checked = Image.fromarray((np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    pixels = np.asarray(contact_sheet([(checked, "")]))
    x, y = 10, 10
    assert np.array_equal(pixels[y : y + 160, x : x + 160], np.asarray(checked).repeat(20, 0).repeat(20, 1))


def test_each_caption_stands_below_its_picture_and_inside_its_column():
    plain = Image.new("RGB", (32, 32), RED)
    empty, long = contact_sheet([(plain, ""), (plain, "")], 2), contact_sheet([(plain, "word " * 99), (plain, "")], 2)
    assert long.height > empty.height
    ink = (np.asarray(long) != 255).any(2)
    below = ink[box(long, RED)[3] + 2 :]
    assert below[:, :170].any()
    assert not below[:, 172:].any()
    unbroken = contact_sheet([(plain, "x" * 500), (plain, "")], 2)
    assert not (np.asarray(unbroken)[box(unbroken, RED)[3] + 2 :, 172:] != 255).any()


def test_a_sample_without_a_picture_keeps_its_place():
    sheet = contact_sheet([(None, "no picture"), (Image.new("RGB", (32, 32), RED), "one")], columns=2)
    assert box(sheet, RED)[0] >= 170


def test_without_columns_a_sheet_is_about_square_and_has_a_limit():
    sheet = contact_sheet([(Image.new("RGB", (32, 32), RED), "")] * 9)
    assert sheet.width == 3 * 170 + 10
    for count in (0, MOST + 1):
        with pytest.raises(ValueError, match="a contact sheet has 1 to"):
            contact_sheet([(None, "")] * count)
