"""What the documents of the demo's corpus are made of, and how they become files: text as it is, pictures as PNG, and
speech as FLAC that espeak-ng speaks."""

from __future__ import annotations

import ctypes
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
import soxr
from PIL import Image

from mom_tokenizers.errors import UserError

SAMPLE_RATE = 16_000
PICTURE_SIDE = 32
EMOJI_MARGIN = 2  # pixels of ground around an emoji
EDGE = (0.3, 0.7)  # shares of the most ink between which a stroke of a digit goes from nothing to full
# Name of the pen -> colours of ink and ground.
PENS = {
    "in black ink": ((10, 10, 10), (255, 255, 255)),
    "in blue ink": ((20, 50, 190), (255, 255, 255)),
    "in red ink": ((200, 25, 30), (255, 255, 255)),
    "in white chalk": ((245, 245, 245), (20, 25, 25)),
}
# Name of the ground that an emoji is drawn on -> its colour.
GROUNDS = {
    "white": (255, 255, 255),
    "black": (15, 15, 20),
    "blue": (120, 180, 245),
    "yellow": (250, 225, 100),
    "pink": (250, 180, 205),
    "green": (150, 205, 130),
}
CREDIT_EMOJI = (
    "Emoji: Twemoji, Copyright Twitter, Inc and other contributors, CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/); made smaller and put on coloured grounds."
)


@dataclass(frozen=True)
class Speech:
    text: str
    voice: str
    words_per_minute: int
    pitch: int


@dataclass(frozen=True)
class Picture:
    digit: int  # row of load_digits()
    pen: str


@dataclass(frozen=True)
class Emoji:
    file: str
    name: str
    ground: str


Planned = tuple["str | Picture | Emoji | Speech", ...]


class Espeak:
    """The speech synthesiser espeak-ng, through its C interface.

    A process may have only one, because the library keeps a state that changes its sound and that even a restart of the
    library does not clear. The same texts in the same order sound the same in every fresh process.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise UserError("espeak-ng, which speaks the corpus, is missing: pip install espeakng-loader") from None
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate = self.library.espeak_Initialize(2, 0, str(espeakng_loader.get_data_path()).encode(), 0)
        if self.rate <= 0:
            raise UserError("espeak-ng does not start: pip install --force-reinstall espeakng-loader")
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # by default the time of day
        ctypes.CDLL(None).srand(1)
        self.chunks: list[np.ndarray] = []
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = signature(self._receive)  # kept: ctypes does not
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def flac(self, speech: Speech) -> bytes:
        """The text spoken, as FLAC bytes: mono, 16 bits, 16 kHz."""
        self.chunks.clear()
        if self.library.espeak_SetVoiceByName(speech.voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {speech.voice!r}")
        self.library.espeak_SetParameter(1, speech.words_per_minute, 0)
        self.library.espeak_SetParameter(3, speech.pitch, 0)
        text = speech.text.encode()
        self.library.espeak_Synth(text, len(text) + 1, 0, 0, 0, 1, None, None)  # flag 1: the text is UTF-8
        self.library.espeak_Synchronize()
        samples = soxr.resample(np.concatenate(self.chunks).astype(np.float32) / 32768, self.rate, SAMPLE_RATE)
        file = io.BytesIO()
        soundfile.write(file, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        return file.getvalue()


def png(pixels: np.ndarray, pen: str) -> bytes:
    """A digit as the PNG of an RGB picture of 32 x 32 pixels, enlarged smoothly from 8 x 8 values between 0 (no ink)
    and 16, with strokes that have an edge. Without it, most of what a model learns about a digit is how grey it is."""
    ink, ground = (np.array(colour, np.float32) for colour in PENS[pen])
    grey = Image.fromarray((pixels / 16 * 255).round().astype(np.uint8))
    smooth = grey.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)
    low, high = EDGE
    amount = ((np.asarray(smooth, np.float32)[..., None] / 255 - low) / (high - low)).clip(0, 1)
    file = io.BytesIO()
    Image.fromarray((ground + (ink - ground) * amount).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def emoji_png(file: str, ground: str) -> bytes:
    """An emoji on a coloured ground, as the PNG of an RGB picture of 32 x 32 pixels."""
    side = PICTURE_SIDE - 2 * EMOJI_MARGIN
    with Image.open(file) as opened:
        drawn = opened.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE), GROUNDS[ground])
    picture.paste(drawn, (EMOJI_MARGIN, EMOJI_MARGIN), drawn)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


Rendered = tuple[list[dict[str, Any]], dict[str, float]]


def render(job: tuple[str, list[Planned], np.ndarray]) -> Rendered:
    """WebDataset samples and their counts, from (key prefix, documents, load_digits().images)."""
    prefix, documents, pixels = job
    espeak = Espeak()
    counts = dict.fromkeys(("documents", "characters", "images", "recordings", "speech_seconds"), 0.0)
    samples = []
    for number, document in enumerate(documents):
        sample: dict[str, Any] = {"__key__": f"{prefix}{number:06d}"}
        segments: list[dict[str, str]] = []
        for place, piece in enumerate(document):
            if isinstance(piece, str):
                segments.append({"type": "text", "text": piece})
                counts["characters"] += len(piece)
                continue
            if isinstance(piece, Picture):
                kind, part, data = "image", f"{place}.png", png(pixels[piece.digit], piece.pen)
                counts["images"] += 1
            elif isinstance(piece, Emoji):
                kind, part, data = "image", f"{place}.png", emoji_png(piece.file, piece.ground)
                counts["images"] += 1
            else:
                kind, part, data = "speech", f"{place}.flac", espeak.flac(piece)
                counts["recordings"] += 1
                counts["speech_seconds"] += soundfile.info(io.BytesIO(data)).duration
            segments.append({"type": kind, "part": part})
            sample[part] = data
        credit = {"credit": CREDIT_EMOJI} if any(isinstance(piece, Emoji) for piece in document) else {}
        sample["json"] = json.dumps({"segments": segments, **credit}, ensure_ascii=False).encode()
        samples.append(sample)
        counts["documents"] += 1
    return samples, counts
