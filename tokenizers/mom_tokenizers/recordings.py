"""Encoded recordings: which formats are read, how long one lasts, and its samples."""

from __future__ import annotations

import io

import numpy as np

from mom_tokenizers.errors import UserError

# The name of a format -> the extensions under which such recordings are found
FORMATS = {
    "WAV": ("wav", "wave", "rf64"),
    "FLAC": ("flac",),
    "Ogg": ("ogg", "oga", "opus"),
    "MP3": ("mp3",),
    "AIFF": ("aif", "aiff", "aifc"),
    "W64": ("w64",),
    "AU": ("au",),
    "NIST SPHERE": ("sph",),
}
SPEECH_EXTENSIONS = tuple(extension for extensions in FORMATS.values() for extension in extensions)

Waveform = tuple[np.ndarray, int]


def recording_seconds(data: bytes) -> float:
    """Length in seconds, without decoding. Raises ValueError for bytes that are no recording."""
    import soundfile

    try:
        return float(soundfile.info(io.BytesIO(data)).duration)
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", error)
        raise UserError(f"not a readable recording: {reason}") from error


def decode_audio(data: bytes) -> Waveform:
    """WAV, FLAC, Ogg Vorbis/Opus or MP3 bytes -> (float32 mono waveform in [-1, 1], sample rate in Hz).

    Raises ValueError for bytes that are no recording, end too early, or hold no sample.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            promised, rate = file.frames, file.samplerate
            # a block at a time, so that a long recording is never held with all its channels
            blocks = [b.mean(axis=1) for b in file.blocks(blocksize=1 << 20, dtype="float32", always_2d=True)]
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", error)  # without the buffer's address, different each time
        raise UserError(f"not a readable recording: {reason}") from error
    waveform = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if len(waveform) == 0 or len(waveform) < promised:
        raise UserError(f"recording ends early: {len(waveform)} of {promised} samples")
    if not np.isfinite(waveform).all():
        raise UserError("recording holds samples that are no finite numbers")
    return waveform, rate
