"""What the pages of several commands share: texts, pictures and recordings as HTML that needs no network.

`page.html` has the style sheet and the macros that show them; `mom report`, `mom inspect` and `mom generate --grid`
each have a template of their own that imports it.
"""

from __future__ import annotations

import base64
import io
import re
import wave
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from mom_tools.compare.charts import PALETTE

if TYPE_CHECKING:
    from PIL.Image import Image

FILE_BYTES = 16_000_000
"""The size of the largest picture or recording that a page shows. A larger file is named in its place."""
_LINK = re.compile(r"^!?\[[^\]\n]*\]\((?P<name>[^()/\n]+)\)[^\S\n]*$", re.MULTILINE)
_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".wav": "audio/wav"}
_SMALL, _LARGE = 128, 320  # pixels of a page that the longer side of a picture is drawn with, at least and at most
_WINDOW = 0.032  # seconds of a spectrum
_COLUMNS, _ROWS = 600, 96  # pixels of a spectrogram, at most
_TOP = 12_000  # Hz, the highest frequency that is drawn
_RANGE = 70.0  # dB from the loudest down to black


def environment(folder: Path) -> jinja2.Environment:
    """The templates of a folder and those of this one. What documents say is escaped, and a missing value is an
    error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip


def rendered(template: Path, **values: Any) -> str:
    """The page of a template, which may import page.html."""
    return environment(template.parent).get_template(template.name).render(palette=PALETTE, **values)


def as_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _png(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _drawn(width: int, height: int) -> dict[str, Any]:
    """How large the page draws a picture: small ones in whole multiples of their size, so that their pixels stay
    squares."""
    longer = max(width, height, 1)
    scale = max(1, _SMALL // longer) if longer <= _LARGE else _LARGE / longer
    return {"width": round(width * scale), "height": round(height * scale), "small": longer < _SMALL}


def picture(image: Image) -> dict[str, Any]:
    """A picture as the macro `picture` of page.html shows it."""
    return {"uri": as_uri("image/png", _png(image)), **_drawn(*image.size)}


def recordings(waveforms: Sequence[tuple[np.ndarray, int]]) -> list[dict[str, Any]]:
    """Recordings, each a float waveform (n,) in [-1, 1] and its rate in Hz, as the macro `sound` of page.html shows
    them: a WAV file to play and a spectrogram. All are drawn over the same range of frequencies, and as wide as they
    are long, so that they can be compared."""
    longest = max(len(waveform) / rate for waveform, rate in waveforms)
    top = min(_TOP, max(rate for _, rate in waveforms) // 2)
    return [
        {
            "uri": as_uri("audio/wav", _wav(waveform, rate)),
            "seconds": len(waveform) / rate,
            "spectrogram": as_uri("image/png", _png(spectrogram(waveform, rate, top))),
            "share": 100 * len(waveform) / rate / longest if longest else 100,
            "top": top,
        }
        for waveform, rate in waveforms
    ]


def _wav(waveform: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def spectrogram(waveform: np.ndarray, rate: int, top: int) -> Image:
    """The spectrogram of a waveform (n,), from 0 Hz at the bottom to `top` Hz, with time from left to right.

    The colour is the power of the short-time Fourier transform (Hann windows of 32 ms) in dB, from 70 dB below the
    loudest to the loudest. Frequencies above half the rate, which the recording cannot hold, are black."""
    from matplotlib import colormaps
    from PIL import Image
    from scipy.signal import spectrogram as power_of

    size = max(16, round(_WINDOW * rate))
    padded = np.pad(np.asarray(waveform, np.float64), (0, max(0, size - len(waveform))))
    hop = min(size, max(1, size // 8, len(padded) // _COLUMNS))
    hz_F, _, power_FT = power_of(padded, rate, "hann", nperseg=size, noverlap=size - hop, detrend=False)
    decibels_FT = 10 * np.log10(np.maximum(power_FT / max(float(power_FT.max()), 1e-20), 1e-12))
    rows = np.linspace(0, top, _ROWS)
    heights_FT = np.where(
        (rows <= rate / 2)[:, None],
        decibels_FT[np.abs(hz_F[None] - rows[:, None]).argmin(1)],
        -_RANGE,
    )  # the nearest frequency of each row
    shades = np.clip(1 + heights_FT[::-1] / _RANGE, 0, 1)
    image = Image.frombytes("P", shades.shape[::-1], (255 * shades).astype(np.uint8).tobytes())
    image.putpalette((255 * colormaps["magma"](np.arange(256))[:, :3]).astype(np.uint8).tobytes())
    return image.resize((min(image.width, _COLUMNS), _ROWS), Image.Resampling.NEAREST)


# ---- files that a command has written ------------------------------------------------------------------------


def parts_of(text: str, files: dict[str, Path], name: str) -> Iterator[tuple[dict[str, Any], str | None]]:
    """What a document in Markdown holds, in its order: (part, name of its file). A part has a `name`, and a `text`,
    a `picture` or a `sound`. A link to one of `files` is a part where it stands alone in its line."""
    for piece, linked in _pieces(text, files):
        if piece.strip():
            yield {"name": name, "text": piece}, None
        if linked:
            yield from ((part, linked) for part in media(files[linked]))


def _pieces(text: str, files: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """The pieces of a document in Markdown: (text, name of the file that follows it)."""
    at = 0
    for link in _LINK.finditer(text):
        if link["name"] in files and Path(link["name"]).suffix in _KINDS:
            yield text[at : link.start()], link["name"]
            at = link.end()
    yield text[at:], None


def media(file: Path) -> list[dict[str, Any]]:
    """A picture or a recording as the one part of a list; no part for any other file. One that is damaged is shown
    without its size or spectrogram."""
    if file.suffix not in _KINDS:
        return []
    if file.stat().st_size > FILE_BYTES:
        return [{"name": file.name, "text": f"[{file.name}: {file.stat().st_size / 1e6:.0f} MB, not shown here]"}]
    content = file.read_bytes()
    uri = as_uri(_KINDS[file.suffix], content)
    if file.suffix == ".wav":
        return [{"name": file.name, "sound": _recorded(content) | {"uri": uri}}]
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            drawn = _drawn(*image.size)
    except (UnidentifiedImageError, OSError):
        drawn = {"width": None, "height": None, "small": False}
    return [{"name": file.name, "picture": {"uri": uri} | drawn}]


def _recorded(content: bytes) -> dict[str, Any]:
    import soundfile

    try:
        waveform, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError):
        return {"seconds": None, "spectrogram": None, "share": 100, "top": None}
    return recordings([(waveform.mean(1), rate)])[0]
