"""Encoded pictures: which formats are read, how large one is, and the decoded picture.

Only what is named here is read. Pillow knows many more formats, among them some that start other programs
(Ghostscript for EPS) or that have no fixed size, and it goes by the content, whatever the file is called.
"""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mom_tokenizers.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 64_000_000
# Pillow's name of a format -> the extensions under which such pictures are found
FORMATS = {
    "JPEG": ("jpg", "jpeg", "jfif", "jpe"),
    "PNG": ("png", "apng"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "TIFF": ("tif", "tiff"),
    "BMP": ("bmp",),
    "AVIF": ("avif",),
    "JPEG2000": ("jp2", "j2k", "jpx"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}
IMAGE_EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)
# Colour types of a PNG
GREY, RGB = 0, 2


class TooManyPixels(UserError):
    """The header of a picture promises more pixels than are ever unpacked."""


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The picture with nothing but its header read. Raises UserError for bytes that are no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which the callers measure, and of odd metadata
            Image.init()  # knows all plug-ins from here on; one that this Pillow was built without is left out
            with Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                yield image
    except (MemoryError, UserError):
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels(str(error)) from None
    except UnidentifiedImageError:  # its own message names the buffer's address, different each time
        raise UserError(f"not a readable picture: none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's plug-ins raise struct.error, SyntaxError, KeyError and more
        raise UserError(f"not a readable picture: {error}") from error


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels as the header says. Raises UserError for bytes that are no picture."""
    with _opened(_png_pixels(data)) as image:
        return image.size


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded bytes -> RGB picture, upright, what is transparent on white; of several frames or pages the first.

    Raises UserError for bytes that are no picture, that are cut, or that hold too large a picture, or one whose values
    have no fixed scale.
    """
    from PIL import ImageFile

    data = _png_pixels(data)
    with _opened(data) as image:
        # The header says the size: nothing is decompressed before it is found small enough.
        if image.width * image.height > max_pixels:
            raise TooManyPixels(f"not a readable picture: {image.width} x {image.height} is above {max_pixels} pixels")
        if image.format in ("JPEG", "MPO"):
            _check_jpeg(data)
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # some library may have asked for grey in place of what is missing
        image.load()
        if image.format == "PNG":
            image = _with_png_key(image, data)
        if image.format == "TIFF":
            _check_tiff(image)
        return on_white(_upright(image))


def on_white(image: Image.Image) -> Image.Image:
    """8-bit RGB of a picture in any of Pillow's modes, what is transparent on white. Raises UserError for a mode whose
    values have no fixed scale."""
    from PIL import Image

    key = image.info.get("transparency")
    if image.mode == "RGB" and key is None:
        return image
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):  # Pillow would clip 16 bits to 8, not scale them
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 0xFFFF):
            raise UserError("not a readable picture: grey of 32 bits has no fixed scale; save it in 8 or 16 bits")
        grey = (values.astype(np.float32) / 257).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(grey)
        if key is not None:
            image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    if image.mode in ("F", "LAB", "HSV"):
        raise UserError(f"not a readable picture: values of mode {image.mode} are not read; save it as 8-bit RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says, where that can be read. (Pillow's own `exif_transpose` writes the rest of the block anew,
    and fails where it is malformed.)"""
    from PIL import ExifTags, Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # a malformed block, of which the pixels know nothing
        turn = None
    return image if turn is None else image.transpose(turn)


# ------------------------------------------------------------------------------------- what Pillow reads without a word


def _check_jpeg(data: bytes) -> None:
    """Every scan must be followed by another marker, up to the one that ends the picture: where a file is cut and
    filled up, libjpeg would paint the rest grey."""
    at = 2
    while (found := _JPEG_MARKER.search(data, at)) and (marker := found[1][0]) != 0xD9:
        at = found.end()
        if marker != 0x01:  # all others bring their length
            at += int.from_bytes(data[at : at + 2], "big")
    if found is None:
        raise UserError("not a readable picture: this JPEG is cut: nothing marks its end. Fetch the file again.")


# FF, any number of fill bytes FF, and a marker; FF 00 and FF D0 to FF D7 lie within a scan
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)


def _png_pixels(data: bytes) -> bytes:
    """A PNG's chunks that make the pixels, up to the last, and those that may say which side is up: Pillow refuses a
    whole picture for what is malformed in any other. Their checksums must be right: Pillow leaves those out, and what
    lies behind an error of zlib is black. Anything but a PNG is given back as it is."""
    if not data.startswith(_PNG):
        return data
    kept = [_PNG]
    at, name = len(_PNG), b""
    while name != b"IEND":
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        start, end = at + 8, at + 12 + size
        if end > len(data):
            raise UserError("not a readable picture: this PNG is cut. Fetch the file again.")
        pixels = name[:1].isupper() or name == b"tRNS"
        if pixels or name == b"eXIf" or data.startswith(_PNG_METADATA, start):
            if zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big"):
                kept.append(data[at:end])
            elif pixels:
                raise UserError(f"not a readable picture: chunk {name!r} of this PNG has a wrong checksum")
        at = end
    return b"".join(kept)


_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"Raw profile type ", b"XML:com.adobe.xmp\0")  # texts in which others keep an EXIF block


def _with_png_key(image: Image.Image, data: bytes) -> Image.Image:
    """The picture with its key colour (tRNS) in the scale of its pixels: Pillow leaves it in that of the file."""
    from PIL import Image

    depth, colour, key = data[24], data[25], image.info.get("transparency")
    if key is None or (depth, colour) not in ((2, GREY), (4, GREY), (16, RGB)):
        return image
    if colour == GREY:
        image.info["transparency"] = key * 255 // ((1 << depth) - 1)
        return image
    # Of 16 bits, Pillow keeps the high 8; read in the other byte order, they are the low 8.
    with Image.open(io.BytesIO(data), formats=["PNG"]) as low:
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    keyed = Image.fromarray(np.asarray(image))
    keyed.putalpha(Image.fromarray(np.where((values == key).all(axis=2), 0, 255).astype(np.uint8)))
    keyed.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return keyed


def _check_tiff(image: Image.Image) -> None:
    """Pillow takes grey of 12 bits for 16, of 32 bits for any scale, and leaves grey of 16 bits inverted."""
    tags: Any = image
    bits, photometric = tags.tag_v2.get(258, (1,)), tags.tag_v2.get(262, 1)
    if image.mode == "I" or (image.mode.startswith("I") and (bits[0] != 16 or photometric == 0)):
        raise UserError(
            f"not a readable picture: the grey of this TIFF ({bits[0]} bits) is signed, inverted or of no fixed scale; "
            "save it as PNG"
        )
