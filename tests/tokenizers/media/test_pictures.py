"""Encoded pictures in every format and mode, whole, cut, damaged and mislabelled, against what was written."""

import io
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from mom_data.documents.document import Limits, Segment
from mom_tokenizers.errors import UserError
from mom_tokenizers.image.autoencoder import preprocess
from mom_tokenizers.media.pictures import FORMATS, IMAGE_EXTENSIONS, decode_image, picture_size

RNG = np.random.default_rng(0)
WHITE = [255, 255, 255]
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6


def png(depth: int, colour: int, rows: list[list[int]], key: bytes = b"", palette: bytes = b"") -> bytes:
    """A PNG of any depth and colour type, written after its specification. `rows` has the samples of each row one after
    another."""
    channels = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}[colour]

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    lines = []
    for row in rows:
        bits = "".join(f"{sample:0{depth}b}" for sample in row)
        bits += "0" * (-len(bits) % 8)
        lines.append(b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big"))
    head = struct.pack(">IIBBBBB", len(rows[0]) // channels, len(rows), depth, colour, 0, 0, 0)
    parts = [
        (b"IHDR", head),
        (b"PLTE", palette),
        (b"tRNS", key),
        (b"IDAT", zlib.compress(b"".join(lines))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in parts if body or name == b"IEND")


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def colours(data: bytes) -> list[list[int]]:
    """The colours of the first pixel and of the last one, as the model gets them."""
    picture = decode_image(data)
    assert picture.mode == "RGB"
    pixels = ((preprocess(picture, picture.width) + 1) * 127.5).round().astype(int)
    return [pixels[:, 0, 0].tolist(), pixels[:, -1, -1].tolist()]


# --------------------------------------------------------------------------------------------------------- transparency


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_key_colour_of_a_grey_png_becomes_white(depth):
    most = (1 << depth) - 1
    key, other = most // 3, most * 2 // 3 if depth > 1 else 1
    shade = 255 * other // most
    data = png(depth, GREY, [[key] * 4 + [other] * 4] * 8, struct.pack(">H", key))
    assert colours(data) == [WHITE, [shade] * 3]
    assert colours(png(depth, GREY, [[0] * 4 + [most] * 4] * 8, struct.pack(">H", most))) == [[0] * 3, WHITE]
    assert colours(png(depth, GREY, [[key] * 4 + [other] * 4] * 8)) == [[255 * key // most] * 3, [shade] * 3]


def test_the_key_colour_of_an_rgb_png_becomes_white_and_its_neighbours_stay():
    for depth, key in ((8, (200, 0, 200)), (16, (200 << 8 | 7, 3, 200 << 8))):
        near = (*key[:2], key[2] + 1)
        shown = [value >> depth - 8 for value in near]
        data = png(depth, RGB, [[*key] * 4 + [*near] * 4] * 8, struct.pack(">HHH", *key))
        assert colours(data) == [WHITE, shown]
        assert colours(png(depth, RGB, [[*key] * 4 + [*near] * 4] * 8))[0] == [value >> depth - 8 for value in key]


def test_alpha_of_every_kind_becomes_white():
    for depth in (8, 16):
        most = (1 << depth) - 1
        third = most // 3
        assert colours(png(depth, GREY_ALPHA, [[third, 0] * 4 + [third, most] * 4] * 8)) == [WHITE, [85] * 3]
        rgba = [[third, 9, 9, 0] * 4 + [third, 0, most, most] * 4] * 8
        assert colours(png(depth, RGB_ALPHA, rgba)) == [WHITE, [85, 0, 255]]
    palette = bytes([9, 9, 9, 200, 0, 0, 0, 100, 0])
    assert colours(png(8, PALETTE, [[0] * 4 + [1] * 4] * 8, bytes([0, 128]), palette)) == [WHITE, [227, 127, 127]]
    assert colours(png(2, PALETTE, [[0] * 4 + [2] * 4] * 8, bytes([0]), palette)) == [WHITE, [0, 100, 0]]
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half.paste((20, 130, 240, 255), (4, 0, 8, 8))
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("JPEG2000", {})):
        assert colours(saved(half, kind, **options)) == [WHITE, [20, 130, 240]]


# ---------------------------------------------------------------------------------------------------- formats and modes


def two_colours(mode: str = "RGB") -> Image.Image:
    picture = Image.new("RGB", (16, 16), (200, 30, 60))
    picture.paste((20, 130, 240), (8, 0, 16, 16))
    return picture.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, kind) for kind in ("JPEG", "TIFF") for mode in ("RGB", "CMYK", "L", "YCbCr")]
    + [("RGB", kind) for kind in FORMATS if kind != "JPEG"]
    + [
        ("P", "GIF"),
        ("P", "BMP"),
        ("P", "TIFF"),
        ("1", "TIFF"),
        ("1", "PPM"),
        ("L", "PPM"),
        ("L", "AVIF"),
        ("RGB", "MPO"),
    ],
)
def test_pictures_of_every_format_and_mode_have_the_colours_that_were_written(mode, kind):
    if (mode, kind) == ("YCbCr", "TIFF") and int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("Pillow before 13 refuses such a file, and so it is left out and counted")
    picture = two_colours(mode)
    expected = np.asarray(picture.convert("RGB"), np.int16)
    found = np.asarray(decode_image(saved(picture, kind)), np.int16)
    assert np.abs(found - expected)[:, [2, -3]].max() <= (12 if kind in ("JPEG", "MPO", "WEBP", "AVIF", "GIF") else 2)
    assert picture_size(saved(picture, kind)) == (16, 16)


def test_sixteen_bits_of_grey_are_scaled_to_eight_in_every_format():
    grey = Image.fromarray(np.repeat(np.array([[10_000, 50_000]], np.uint16), 8, axis=1).repeat(16, axis=0))
    for kind in ("PNG", "TIFF", "PPM", "JPEG2000"):
        assert colours(saved(grey, kind)) == [[38] * 3, [194] * 3]


def test_values_without_a_fixed_scale_are_refused():
    whole, real = Image.new("I", (8, 8), 1 << 20), Image.new("F", (8, 8), 0.5)
    for picture in (whole, real):
        with pytest.raises(ValueError, match="not a readable picture"):
            decode_image(saved(picture, "TIFF"))
        with pytest.raises(ValueError, match="not a readable picture"):
            preprocess(picture, 8)
    with pytest.raises(ValueError, match="not a readable picture"):
        decode_image(saved(real, "PPM"))
    grey = saved(Image.fromarray(np.full((8, 8), 1000, np.uint16)), "TIFF")
    photometric = grey.index(struct.pack("<HHI", 262, 3, 1)) + 8
    inverted = grey[:photometric] + b"\0\0" + grey[photometric + 2 :]
    with pytest.raises(ValueError, match="inverted"):
        decode_image(inverted)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_several_frames_or_pages_the_first_is_read(kind):
    red, blue = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    data = saved(red, kind, save_all=True, append_images=[blue])
    assert np.abs(np.asarray(colours(data)[0]) - [255, 0, 0]).max() <= 2


def test_only_the_formats_of_the_list_are_read_whatever_a_picture_is_called(monkeypatch):
    def started(*arguments, **options):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: True)
    for kind, mode in (("EPS", "RGB"), ("PDF", "RGB"), ("TGA", "RGB"), ("PCX", "RGB"), ("ICO", "RGB"), ("IM", "RGB")):
        data = saved(two_colours(mode), kind)
        for read in (decode_image, picture_size):
            with pytest.raises(ValueError, match="none of JPEG, PNG, WEBP, GIF, TIFF, BMP, AVIF"):
                read(data)
        assert Limits(pixels=10).exceeded(Segment("image", data)) is None  # decoding says why
    assert {"jpg", "jpeg", "jfif", "png", "webp", "gif", "tif", "tiff", "bmp", "avif", "ppm"} <= set(IMAGE_EXTENSIONS)
    assert not {"svg", "eps", "pdf", "wmf"} & set(IMAGE_EXTENSIONS)


# ------------------------------------------------------------------------------------------------------- cut or damaged


CODINGS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "jpeg"}),
    ("BMP", {}),
    ("AVIF", {}),
    ("JPEG2000", {}),
    ("PPM", {}),
    ("GIF", {}),
]


@pytest.mark.parametrize(("kind", "options"), CODINGS)
def test_a_cut_picture_is_refused_and_never_filled_up(kind, options, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some libraries set it, for everyone
    pixels = RNG.integers(0, 255, (32, 32, 3), np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    data = saved(Image.fromarray(pixels), kind, **options)
    decode_image(data)
    last = len(data) - 2 if kind == "GIF" else len(data)  # all that a GIF ends with is a mark
    for end in {*range(30), len(data) // 4, len(data) // 2, *RNG.integers(30, last, 20), *range(last - 12, last)}:
        with pytest.raises(ValueError, match="not a readable picture"):
            decode_image(data[:end])
        if kind in ("JPEG", "PNG", "GIF", "JPEG2000") and end < last - 12:  # a download into a file that had its length
            with pytest.raises(ValueError, match="not a readable picture"):
                decode_image(data[:end] + bytes(len(data) - end))


def test_a_png_is_refused_wherever_a_byte_of_its_pixels_is_damaged():
    data = saved(Image.fromarray(RNG.integers(0, 255, (32, 32, 3), np.uint8)), "PNG")
    for at in RNG.integers(8, len(data), 40):
        with pytest.raises(ValueError, match="not a readable picture"):
            decode_image(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])


@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"iCCP", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"eXIf", b"acTL"])
def test_a_png_is_read_whatever_its_chunks_hold_that_make_no_pixels(name):
    data = saved(two_colours(), "PNG")
    for body in (b"", b"a", b"a\0\0" + zlib.compress(bytes(2 << 20))):
        for checksum in (zlib.crc32(name + body), 0):
            chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)
            for at in (33, len(data) - 12):  # behind the header, and before the end
                with_chunk = data[:at] + chunk + data[at:]
                assert colours(with_chunk) == colours(data)
                assert picture_size(with_chunk) == picture_size(data)


@pytest.mark.parametrize(("kind", "options"), CODINGS)
def test_a_damaged_picture_ends_in_a_message_or_in_a_picture(kind, options):
    data = saved(Image.fromarray(RNG.integers(0, 255, (32, 32, 3), np.uint8)), kind, **options)
    for _ in range(40):
        damaged = bytearray(data)
        for at in RNG.integers(min(len(data), 300), size=2):
            damaged[at] = RNG.integers(256)
        try:
            picture = decode_image(bytes(damaged), max_pixels=10_000)
        except UserError:
            continue
        assert picture.mode == "RGB"


def test_what_follows_a_jpeg_does_not_matter():
    data = saved(two_colours(), "JPEG")
    for trailer in (bytes(1000), b"\xff\xda\xff", RNG.bytes(5000)):
        assert decode_image(data + trailer).tobytes() == decode_image(data).tobytes()


def test_pictures_above_the_limit_are_refused_by_their_header():
    data = saved(Image.new("RGB", (40, 30)), "PNG")
    with pytest.raises(ValueError, match="40 x 30 is above 1000"):
        decode_image(data, max_pixels=1000)
    assert decode_image(data, max_pixels=1200).size == (40, 30)


# ----------------------------------------------------------------------------------------------------------------- EXIF


def exif(*entries: tuple[int, int, int, bytes], tail: bytes = b"") -> bytes:
    """A little-endian EXIF block of one directory. An entry is a tag, a type, a count, and four bytes."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + tail


def turned(value: int) -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack("<HH", value, 0)


AFTER_TWO = struct.pack("<I", 8 + 2 + 12 * 2 + 4)


@pytest.mark.parametrize(
    ("block", "orientation"),
    [
        (b"", 1),
        *((exif(turned(value)), value) for value in range(1, 9)),
        (exif(turned(0)), 1),
        (exif(turned(9)), 1),
        (b"Exif\0\0", 1),
        (b"Exif\0\0\0\1garbage", 1),
        (b"Exif\0\0" + exif(turned(6)), 6),
        (b"Exif\0\0II*\0" + struct.pack("<I", 5000), 1),
        (exif((0x0112, 2, 2, b"6\0\0\0")), 1),
        (exif((0x0112, 3, 3, struct.pack("<I", 9999))), 1),
        (exif(turned(6), (0x0103, 4, 1, struct.pack("<I", 70_000))), 6),
        (exif(turned(6), (0x0128, 2, 2, b"x\0\0\0")), 6),
        (exif(turned(6), (0x0100, 9, 1, struct.pack("<i", -5))), 6),
        (exif(turned(6), (0x9201, 10, 1, AFTER_TWO), tail=struct.pack("<ii", -1, 0)), 6),
        (exif(turned(6), (0x011A, 5, 2, AFTER_TWO), tail=struct.pack("<IIII", 72, 1, 72, 1)), 6),
        (exif(turned(6), (0x8825, 4, 1, struct.pack("<I", 9999))), 6),
        (exif(turned(6), (0x9201, 99, 1, bytes(4))), 6),
        (exif(turned(6), (0x010F, 3, 1, bytes(4))), 6),
        (exif(turned(6), (0x829A, 11, 1, struct.pack("<f", np.nan))), 6),
        (exif(turned(6))[:20], 1),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_picture_is_kept_whatever_its_exif_holds_and_turned_where_that_can_be_read(block, orientation):
    """Orientation, after the EXIF specification: on which sides of the stored picture its row 0 and column 0 lie."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:2, :4] = 255  # a white corner at the top left
    plain = saved(Image.fromarray(pixels), "JPEG", quality=100, subsampling=0)
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:] if block else plain
    stored = np.asarray(Image.open(io.BytesIO(plain)))
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored.transpose(1, 0, 2)[:, ::-1],
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored.transpose(1, 0, 2)[::-1],
    }[orientation]
    np.testing.assert_array_equal(np.asarray(decode_image(data)), upright)
