"""Decodes the files of recordings: which formats are read, how long a recording lasts, and its samples.

soundfile is imported only when a recording is opened, so that the extensions can be read without it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from mom_tokenizers.errors import UserError
from mom_tokenizers.media.containers import Container, whole

if TYPE_CHECKING:
    import soundfile

# The name of a format -> the extensions of such files
FORMATS = {
    "WAV": ("wav", "wave", "rf64"),
    "FLAC": ("flac",),
    "Ogg": ("ogg", "oga", "opus"),
    "MP3": ("mp3",),
    "AIFF": ("aif", "aiff", "aifc"),
    "W64": ("w64",),
    "AU": ("au",),
    "CAF": ("caf",),
    "NIST SPHERE": ("sph",),
}
SPEECH_EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)

# Where a file does not say its length, libsndfile gives the largest possible count, which is above this.
UNKNOWN = 1 << 62
MOST_CHANNELS = 32
# Sound decoded from a lossy format exceeds 1 a little. Samples written as whole numbers exceed it by far.
LOUDEST = 16.0
# Channels cancel in a second where their sum has less than this share of the energy that unrelated channels would give.
CANCELLED = 0.2
# This counts where such seconds hold more than this share of the recording's energy.
CANCELLED_SHARE = 0.01

Waveform = tuple[np.ndarray, int]


@cache
def _stream() -> type[soundfile.SoundFile]:
    """soundfile's reader without seeking. After every block soundfile seeks to the place where it already is, which
    fails where the length is unknown and is inexact in an MP3. It also stops at libsndfile's guess of the length."""
    import soundfile

    class Stream(soundfile.SoundFile):
        def seekable(self) -> bool:
            return False

    return Stream


@contextmanager
def _opened(container: Container) -> Iterator[soundfile.SoundFile]:
    import soundfile

    try:
        with _stream()(io.BytesIO(container.data)) as file:
            if file.channels > MOST_CHANNELS:
                raise UserError(f"recording of {file.channels} channels; at most {MOST_CHANNELS} are mixed into one")
            yield file
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", error)  # without the buffer's address, which differs each time
        raise UserError(f"not a readable recording: {reason or 'its content is damaged or cut'}") from error


def _blocks(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """Blocks of about a second, float32 (samples, channels), until the end of the recording."""
    # The block's length is bounded, because a damaged header may name any rate.
    while len(block := file.read(min(max(file.samplerate, 8_000), 192_000), dtype="float32", always_2d=True)):
        yield block


def _mixed(container: Container, signs: np.ndarray | None) -> tuple[np.ndarray, int, np.ndarray]:
    """(the mean of the channels, each times its sign, float32; the rate; the products of every two channels, summed
    over each second, float64 (seconds, channels, channels)).

    Raises UserError where there are more or fewer samples than the header says.
    """
    mixed, products, read = [], [], 0
    with _opened(container) as file, np.errstate(all="ignore"):  # the caller refuses values that are not finite
        promised = file.frames if container.samples is None else container.samples
        file.read(container.skipped, dtype="float32")
        rate, channels = file.samplerate, file.channels
        # The channels are mixed second by second, so that a long recording is never held with all its channels.
        for block in _blocks(file):
            read += len(block)
            if read > promised:
                raise UserError(f"not a readable recording: more than the {promised} samples that its header counts")
            mixed.append((block if signs is None else block * signs).mean(axis=1))
            if channels > 1:
                wide = block.astype(np.float64)
                products.append(wide.T @ wide)
    if read < promised < UNKNOWN:
        raise UserError(f"recording ends early: {read} of {promised} samples. Fetch the file again.")
    waveform = np.concatenate(mixed) if mixed else np.zeros(0, np.float32)
    return waveform, rate, np.array(products).reshape(-1, channels, channels)


def _cancel(products_SCC: np.ndarray, signs_C: np.ndarray) -> bool:
    """Whether the channels, each times its sign, cancel in an important part of the recording."""
    energy_S = np.trace(products_SCC, axis1=1, axis2=2)
    sum_S = np.einsum("c,scd,d->s", signs_C, products_SCC, signs_C)
    return bool(energy_S[sum_S < CANCELLED * energy_S].sum() > CANCELLED_SHARE * energy_S.sum())


def recording_seconds(data: bytes) -> float:
    """The length of a recording in seconds. It is decoded only where its header does not say the length. Raises
    UserError for bytes that are not a whole recording."""
    container = whole(data)
    with _opened(container) as file:
        samples = container.samples or file.frames
        if samples >= UNKNOWN:
            samples = sum(map(len, _blocks(file)))
        return samples / float(file.samplerate)


def decode_audio(data: bytes) -> Waveform:
    """(mono waveform in about [-1, 1], float32 (samples,); sample rate in Hz) of the bytes of a recording's file.

    The waveform is the mean of the channels. Where they would cancel each other, those with the opposite sign of the
    loudest channel are inverted first. Raises UserError for bytes that are not a recording, are damaged or cut off, or
    hold no sample, and for channels that cancel in either case.
    """
    container = whole(data)
    waveform, rate, products_SCC = _mixed(container, None)
    if len(products_SCC) and _cancel(products_SCC, np.ones(products_SCC.shape[1])):
        total_CC = products_SCC.sum(axis=0)
        signs_C = np.where(total_CC[total_CC.diagonal().argmax()] < 0, -1, 1).astype(np.float32)
        if _cancel(products_SCC, signs_C):
            raise UserError("the channels of this recording cancel each other; keep one of them alone")
        waveform, rate, _ = _mixed(container, signs_C)
    if len(waveform) == 0:
        raise UserError("recording holds no sample")
    if not np.isfinite(waveform).all():
        raise UserError("recording holds samples that are no finite numbers")
    if (peak := float(np.abs(waveform).max())) > LOUDEST:
        raise UserError(f"recording holds samples up to {peak:.6g}, but floats must lie in [-1, 1]: divide them first")
    return waveform, rate
