"""Encoded pictures: which formats are read, how large one is, and the decoded picture.

Only what is named here is read. Pillow knows many more formats, among them some that start other programs
(Ghostscript for EPS) or that have no fixed size, and it goes by the content, whatever the file is called.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

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
    "BMP": ("bmp", "dib"),
    "AVIF": ("avif",),
    "JPEG2000": ("jp2", "j2k", "jpx"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
}
IMAGE_EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)


class TooManyPixels(UserError):
    """The header of a picture promises more pixels than are ever unpacked."""


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The picture with nothing but its header read. Raises ValueError for bytes that are no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which the callers measure, and of odd metadata
            with Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
                yield image
    except (MemoryError, TooManyPixels):
        raise
    except Image.DecompressionBombError as error:
        raise TooManyPixels(str(error)) from None
    except UnidentifiedImageError:  # its own message names the buffer's address, different each time
        raise UserError(f"not a readable picture: none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's plug-ins raise struct.error, SyntaxError, KeyError and more
        raise UserError(f"not a readable picture: {error}") from error


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels as the header says. Raises ValueError for bytes that are no picture."""
    with _opened(data) as image:
        return image.size


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded bytes -> picture, upright. Raises ValueError for bytes that are no picture, or too large a one."""
    from PIL import ImageOps

    with _opened(data) as image:
        # The header says the size: nothing is decompressed before it is found small enough.
        if image.width * image.height > max_pixels:
            raise TooManyPixels(f"picture of {image.width} x {image.height} is above {max_pixels} pixels")
        image.load()
        return ImageOps.exif_transpose(image)
