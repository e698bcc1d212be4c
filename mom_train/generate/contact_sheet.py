"""Many pictures as one, each with its caption below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a run that draws no pictures does not need it
    from PIL import Image

_SIDE = 160  # pixels of the square that a picture is fitted into
_GAP = 10  # pixels around a picture
_SIZE, _LINE = 12, 15  # pixels of the letters, and from line to line
_LINES = 4  # of a caption, at most
_PAPER, _INK, _NOTHING, _FRAME = (255, 255, 255), (27, 31, 36), (234, 238, 242), (216, 222, 228)
MOST = 400
"""The most pictures of one sheet."""


def contact_sheet(pictures: Sequence[tuple[Image.Image | None, str]], columns: int | None = None) -> Image.Image:
    """An RGB picture of all `pictures` in rows of `columns`, with their captions below them; None leaves a place
    empty. Without `columns` the sheet is about as wide as high.

    Small pictures are enlarged by a whole number, so that their pixels stay squares, and large ones are reduced.
    A caption of more than four lines ends in an ellipsis. Raises ValueError for no pictures, and for more than MOST.
    """
    from PIL import Image, ImageDraw

    if not 0 < len(pictures) <= MOST:
        raise ValueError(f"a contact sheet has 1 to {MOST} pictures, not {len(pictures)}")
    columns = min(len(pictures), columns or math.ceil(math.sqrt(len(pictures))))
    font = _font()
    captions = [_wrapped(caption, font) for _, caption in pictures]
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    fitted = [None if picture is None else _fitted(picture) for picture, _ in pictures]
    # A row is as high as its highest picture and its longest caption need.
    above = [max((picture.height for i in row if (picture := fitted[i]) is not None), default=_SIDE) for row in rows]
    below = [_LINE * max(len(captions[i]) for i in row) for row in rows]
    height = sum(a + b for a, b in zip(above, below, strict=True)) + 2 * _GAP * len(rows) + _GAP
    sheet = Image.new("RGB", (columns * (_SIDE + _GAP) + _GAP, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for row, a, b in zip(rows, above, below, strict=True):
        for column, i in enumerate(row):
            left = _GAP + column * (_SIDE + _GAP)
            picture = fitted[i]
            if picture is None:
                draw.rectangle((left, top, left + _SIDE - 1, top + a - 1), _NOTHING)
            else:
                x, y = left + (_SIDE - picture.width) // 2, top + (a - picture.height) // 2
                draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=_FRAME)
                sheet.paste(picture, (x, y))
            draw.multiline_text((left, top + a + 3), "\n".join(captions[i]), _INK, font, spacing=_LINE - _SIZE)
        top += a + b + 2 * _GAP
    return sheet


def _fitted(picture: Image.Image) -> Image.Image:
    """The picture in RGB with a longer side of at most _SIDE."""
    from PIL import Image

    picture = picture.convert("RGB")
    longer = max(picture.size)
    if longer <= _SIDE:
        scale = _SIDE // longer
        return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    width, height = (max(1, round(side * _SIDE / longer)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _font() -> Any:
    """DejaVu Sans, which matplotlib brings with it: Latin, Greek, Cyrillic and more, but no Chinese, whose characters
    become boxes."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), _SIZE)


def _wrapped(text: str, font: Any) -> list[str]:
    """The lines of a caption, none wider than a picture's place."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= _SIDE:
            lines[-1] = joined
            continue
        lines += [""] * bool(lines[-1])
        for letter in word:  # a word that is too long by itself is broken anywhere
            if font.getlength(lines[-1] + letter) > _SIDE:
                lines.append("")
            lines[-1] += letter
        if len(lines) > _LINES + 1:
            break
    if len(lines) > _LINES:
        last = lines[_LINES - 1]
        while last and font.getlength(last + "…") > _SIDE:
            last = last[:-1]
        lines = [*lines[: _LINES - 1], last + "…"]
    return lines
