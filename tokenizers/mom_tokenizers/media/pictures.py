"""Decodes the files of pictures: which formats are read, how large a picture is, and its pixels.

Only the formats named here are read. Pillow knows many more, and chooses among them by a file's content, not its name.
Some of those start other programs (Ghostscript for EPS) or have no fixed size.
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
# Pillow's name of a format -> the extensions of such files
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
# The colour types in the header of a PNG
GREY, RGB = 0, 2


class TooManyPixels(UserError):
    """The header of a picture says that it has more pixels than are ever decoded."""


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The picture with only its header read. Raises UserError for bytes that are not a picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large pictures, which the callers check, and about odd metadata
            Image.init()  # loads all plug-ins; formats that this Pillow was built without are left out below
            with Image.open(io.BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                yield image
    except (MemoryError, UserError):
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels(str(error)) from None
    except UnidentifiedImageError:  # its own message contains the buffer's address, which differs each time
        raise UserError(f"not a readable picture: none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's plug-ins raise struct.error, SyntaxError, KeyError and more
        raise UserError(f"not a readable picture: {error}") from error


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels, as the header says. Raises UserError for bytes that are not a picture."""
    with _opened(_png_pixels(data)) as image:
        return image.size


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The RGB picture in the bytes of a file, turned upright, with transparent parts on white. Of several frames or
    pages it is the first.

    Raises UserError for bytes that are not a picture or are cut off, for a picture of more than `max_pixels` pixels,
    and for one whose values have no fixed scale.
    """
    from PIL import ImageFile

    data = _png_pixels(data)
    with _opened(data) as image:
        # The header says the size, so nothing is decompressed before it is known to be small enough.
        if image.width * image.height > max_pixels:
            raise TooManyPixels(f"not a readable picture: {image.width} x {image.height} is above {max_pixels} pixels")
        if image.format in ("JPEG", "MPO"):
            _check_jpeg(data)
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # a library may have set this, and then missing parts would be grey
        image.load()
        if image.format == "PNG":
            image = _with_png_key(image, data)
        if image.format == "TIFF":
            _check_tiff(image)
        return on_white(_upright(image))


def on_white(image: Image.Image) -> Image.Image:
    """A picture in any of Pillow's modes as 8-bit RGB, with transparent parts on white. Raises UserError for a mode
    whose values have no fixed scale."""
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
    """The picture turned as its EXIF block says, where that can be read. (Pillow's own `exif_transpose` also rewrites
    the rest of the block, and fails where that is malformed.)"""
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
    except Exception:  # a malformed EXIF block does not affect the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


# ------------------------------------------------------------------- damage that Pillow does not report, by file format


def _check_jpeg(data: bytes) -> None:
    """Check that every scan is followed by another marker, up to the one that ends the picture. Where a file was cut
    off and filled up, libjpeg would make the rest grey."""
    at = 2
    while (found := _JPEG_MARKER.search(data, at)) and (marker := found[1][0]) != 0xD9:
        at = found.end()
        if marker != 0x01:  # all other markers are followed by a length
            at += int.from_bytes(data[at : at + 2], "big")
    if found is None:
        raise UserError("not a readable picture: this JPEG is cut: nothing marks its end. Fetch the file again.")


# FF, any number of fill bytes FF, and a marker. FF 00 and FF D0 to FF D7 occur within a scan.
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)


def _png_pixels(data: bytes) -> bytes:
    """A PNG with only the chunks that make the pixels and those that may say which side is up, because Pillow refuses a
    whole picture where any other chunk is malformed. Data of another format is returned as it is.

    Raises UserError where the checksum of a chunk of pixels is wrong. Pillow does not check these, and leaves all
    pixels after damaged data black.
    """
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
_PNG_METADATA = (b"Raw profile type ", b"XML:com.adobe.xmp\0")  # text chunks in which some programs keep EXIF data


def _with_png_key(image: Image.Image, data: bytes) -> Image.Image:
    """The picture with its transparent colour (tRNS) in the scale of its pixels. Pillow leaves that colour in the scale
    of the file."""
    from PIL import Image

    depth, colour, key = data[24], data[25], image.info.get("transparency")
    if key is None or (depth, colour) not in ((2, GREY), (4, GREY), (16, RGB)):
        return image
    if colour == GREY:
        image.info["transparency"] = key * 255 // ((1 << depth) - 1)
        return image
    # Of 16 bits, Pillow keeps the high 8. When the file is read in the other byte order, it keeps the low 8.
    with Image.open(io.BytesIO(data), formats=["PNG"]) as low:
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    keyed = Image.fromarray(np.asarray(image))
    keyed.putalpha(Image.fromarray(np.where((values == key).all(axis=2), 0, 255).astype(np.uint8)))
    keyed.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return keyed


def _check_tiff(image: Image.Image) -> None:
    """Raises UserError for kinds of grey that Pillow reads wrongly: it takes 12 bits for 16, gives 32 bits no fixed
    scale, and leaves inverted 16 bits inverted."""
    tags: Any = image
    bits, photometric = tags.tag_v2.get(258, (1,)), tags.tag_v2.get(262, 1)
    if image.mode == "I" or (image.mode.startswith("I") and (bits[0] != 16 or photometric == 0)):
        raise UserError(
            f"not a readable picture: the grey of this TIFF ({bits[0]} bits) is signed, inverted or of no fixed scale; "
            "save it as PNG"
        )
