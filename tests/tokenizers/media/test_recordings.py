"""Encoded recordings in every container, whole, cut, damaged and mislabelled, against the samples that were written."""

import io
import re
import struct

import numpy as np
import pytest
import soundfile

from mom_data.documents.document import Limits, Segment
from mom_tokenizers.errors import UserError
from mom_tokenizers.media.recordings import SPEECH_EXTENSIONS, decode_audio, recording_seconds

RATE = 16_000
RNG = np.random.default_rng(0)
# noise that lies low, so that lossy codecs keep it, and grows
NOISE = (np.convolve(RNG.normal(0, 0.4, RATE + 15), np.hanning(16) / 8, "valid") * np.linspace(0.2, 1, RATE)).astype(
    "f4"
)
# format, coding -> how far a sample may be from the one that was written; None for lossy codings, which are compared by
# their power
FORMATS = {
    ("WAV", "PCM_16"): 2**-15,
    ("WAV", "PCM_U8"): 2**-7,
    ("WAV", "PCM_24"): 2**-23,
    ("WAV", "PCM_32"): 2**-23,
    ("WAV", "FLOAT"): 0,
    ("WAV", "DOUBLE"): 0,
    ("WAV", "ULAW"): 2**-5,
    ("WAV", "ALAW"): 2**-5,
    ("WAV", "GSM610"): None,
    ("WAVEX", "PCM_16"): 2**-15,
    ("RF64", "PCM_16"): 2**-15,
    ("W64", "PCM_16"): 2**-15,
    ("AIFF", "PCM_16"): 2**-15,
    ("AIFF", "FLOAT"): 0,
    ("AU", "PCM_16"): 2**-15,
    ("CAF", "PCM_16"): 2**-15,
    ("NIST", "PCM_16"): 2**-15,
    ("FLAC", "PCM_16"): 2**-15,
    ("FLAC", "PCM_24"): 2**-23,
    ("OGG", "VORBIS"): None,
    ("OGG", "OPUS"): None,
    ("MP3", "MPEG_LAYER_III"): None,
}


def encoded(samples: np.ndarray, kind: str, coding: str | None = None, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=kind, subtype=coding, **options)
    return file.getvalue()


def power(samples: np.ndarray) -> float:
    return float(np.square(samples, dtype=np.float64).mean())


@pytest.mark.parametrize(("kind", "coding"), FORMATS)
def test_a_recording_gives_the_samples_that_were_written_and_no_part_of_its_bytes_does(kind, coding):
    data = encoded(NOISE, kind, coding)
    waveform, rate = decode_audio(data)
    assert (waveform.dtype, waveform.shape, rate) == (np.float32, NOISE.shape, RATE)
    assert recording_seconds(data) == 1
    tolerance = FORMATS[kind, coding]
    if tolerance is None:
        assert power(waveform) == pytest.approx(power(NOISE), rel=0.2)
    else:
        np.testing.assert_allclose(waveform, NOISE, rtol=0, atol=tolerance)
    last = range(len(data) - 8, len(data))
    for end in {*range(40), len(data) // 4, len(data) // 2, *RNG.integers(40, len(data), 12), *last}:
        with pytest.raises(ValueError, match="recording"):
            decode_audio(data[:end])


@pytest.mark.parametrize(("kind", "coding"), [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_a_recording_with_checksums_is_refused_wherever_a_byte_of_its_sound_is_damaged(kind, coding):
    data = encoded(NOISE, kind, coding)
    for at in RNG.integers(len(data) // 2, len(data), 10):
        with pytest.raises(ValueError, match="recording"):
            decode_audio(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])


# ------------------------------------------------------------------------------------------------------------- lengths


def with_wav_lengths(data: bytes, riff: int, samples: int) -> bytes:
    at = data.index(b"data") + 4
    return data[:4] + struct.pack("<I", riff) + data[8:at] + struct.pack("<I", samples) + data[at + 4 :]


@pytest.mark.parametrize(
    ("riff", "samples"),
    [
        (0xFFFFFFFF, 0xFFFFFFFF),  # FFmpeg
        (0x7FFFF024, 0x7FFFF000),  # SoX and eSpeak
        (0x80000024, 0x80000000),  # arecord
        (0, 0),  # not closed
        (36, 0),  # not closed, Python's wave
    ],
)
def test_a_wav_whose_length_was_never_filled_in_is_read_to_its_end(riff, samples):
    sound = encoded(NOISE, "WAV")
    data = with_wav_lengths(sound, riff, samples)
    np.testing.assert_array_equal(decode_audio(data)[0], decode_audio(sound)[0])
    assert Limits(seconds=0.9).exceeded(Segment("speech", data)) == "recording of 1.0 s"
    assert Limits(seconds=1).exceeded(Segment("speech", data)) is None


@pytest.mark.parametrize("junk", [b"\n", b"\1\2junk", b"<xml/>", b"LIST"])
def test_a_few_bytes_behind_the_end_that_a_wav_tells_of_are_none_of_it(junk):
    sound = encoded(NOISE, "WAV")
    np.testing.assert_array_equal(decode_audio(sound + junk)[0], decode_audio(sound)[0])
    for length in (len(sound) - 8 + len(junk), len(sound) - 9):  # that do not end with the sound
        with pytest.raises(UserError, match="recording"):
            decode_audio(with_wav_lengths(sound + junk, length, 2 * RATE))
    with pytest.raises(UserError, match="recording"):
        decode_audio(sound + 1000 * junk)


@pytest.mark.parametrize("samples", [0, 1000, 1001, 2 * RATE - 2, 2 * RATE + 2])
def test_a_wav_whose_length_is_not_that_of_its_samples_is_refused(samples):
    sound = encoded(NOISE, "WAV")
    with pytest.raises(ValueError, match="recording"):
        decode_audio(with_wav_lengths(sound, len(sound) - 8, samples))


def with_flac_samples(data: bytes, samples: int) -> bytes:
    return data[:21] + bytes([data[21] & 0xF0 | samples >> 32]) + struct.pack(">I", samples & 0xFFFFFFFF) + data[26:]


def test_a_flac_of_unknown_length_is_read_to_its_end_and_one_of_a_wrong_length_refused():
    sound = encoded(NOISE, "FLAC")
    unknown = with_flac_samples(sound, 0)
    unknown = unknown[:26] + bytes(16) + unknown[42:]  # nor is its MD5 known, as an encoder into a pipe leaves it
    np.testing.assert_array_equal(decode_audio(unknown)[0], decode_audio(sound)[0])
    assert recording_seconds(unknown) == 1
    for samples in (100, RATE - 1, RATE + 1, 1 << 35):
        with pytest.raises(ValueError, match="recording"):
            decode_audio(with_flac_samples(sound, samples))
    for end in (len(unknown) // 2, len(unknown) - 1):
        with pytest.raises(ValueError, match="recording"):
            decode_audio(unknown[:end])


# ------------------------------------------------------------------------------------------------------------------ MP3


def frames_of(mp3: bytes) -> list[bytes]:
    """The frames of an MP3 by libsndfile, the first of which is its index; of MPEG-2 at 16 kHz, 72 kbit/s x size."""
    rates = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
    frames, at = [], 0
    while at < len(mp3):
        size = 72_000 * rates[mp3[at + 2] >> 4] // RATE + (mp3[at + 2] >> 1 & 1)
        frames.append(mp3[at : at + size])
        at += size
    return frames


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_an_mp3_without_an_index_gives_every_frame_of_it(mode):
    """Its samples are those of the same file with its index, after the 576 + 529 that an index tells to leave out."""
    quiet_first = np.concatenate([0.01 * NOISE, NOISE])  # so that the first frames are smaller than the rest
    data = encoded(quiet_first, "MP3", bitrate_mode=mode, compression_level=0.3)
    index, *frames = frames_of(data)
    assert b"Xing" in index or b"Info" in index
    waveform, _ = decode_audio(b"".join(frames))
    assert len(waveform) == 576 * len(frames)
    assert recording_seconds(b"".join(frames)) == 576 * len(frames) / RATE
    whole, _ = decode_audio(data)
    assert len(whole) == 2 * RATE
    np.testing.assert_allclose(waveform[1105 : 1105 + len(whole)], whole, rtol=0, atol=1e-6)


def test_tags_around_and_within_an_mp3_do_not_change_its_samples():
    data = encoded(NOISE, "MP3")
    expected, _ = decode_audio(data)
    index, *frames = frames_of(data)
    picture = b"ID3\4\0\0" + bytes([0, 12, 0, 0]) + b"\xff\xfb" * (6 << 14)  # 200 kB that look like frames
    small = b"ID3\3\0\0\0\0\0\5hello"
    for before, middle, behind in (
        (picture, b"", b""),
        (picture + small, b"", b""),
        (picture + bytes(100), b"", b""),
        (bytes(7), b"", b""),
        (b"", small, b""),
        (b"", b"", b"TAG" + bytes(125)),
        (small, b"", b"APETAGEX" + b"x" * 99 + b"TAG" + bytes(125)),
        (b"", b"", bytes(3000)),
    ):
        tagged = b"".join((before, index, *frames[:9], middle, *frames[9:], behind))
        np.testing.assert_array_equal(decode_audio(tagged)[0], expected)
        assert len(decode_audio(b"".join((before, *frames[:9], middle, *frames[9:], behind)))[0]) == 576 * len(frames)


def test_a_few_bytes_that_mean_nothing_stand_before_an_mp3_whose_index_counts_all_its_frames():
    data = encoded(NOISE, "MP3")
    index, *frames = frames_of(data)
    for junk in (b"\n", b"\x12\x34junk", bytes(range(200)), b"ID3\3\0\0\0\0\0\5helloHELLO"):
        np.testing.assert_array_equal(decode_audio(junk + data)[0], decode_audio(data)[0])
        for wrong in (frames, frames[3:], [frames[0][50:], *frames[1:]], [index, *frames[:-1]]):
            with pytest.raises(UserError, match="recording"):
                decode_audio(junk + b"".join(wrong))


def test_an_mp3_with_frames_missing_added_or_broken_is_refused():
    index, *frames = frames_of(encoded(NOISE, "MP3"))
    for wrong in (
        [index, *frames[:-1]],
        [index, *frames[1:]],
        [index, *frames, frames[-1]],
        [index, *frames, index, *frames],  # two files put together
        [index, *frames[:9], b"junk", *frames[9:]],
        [*frames[:9], b"junk", *frames[9:]],
        [*frames[:9], frames[9][20:], *frames[10:]],
        [*frames, frames[0][:-1]],
        [*frames, b"junk"],
        [index],
        [index[:2]],
    ):
        with pytest.raises(ValueError, match="recording"):
            decode_audio(b"".join(wrong))


def test_an_index_that_counts_itself_or_not_or_of_another_kind_is_understood():
    index, *frames = frames_of(encoded(NOISE, "MP3"))
    expected, _ = decode_audio(b"".join([index, *frames]))
    at = index.index(b"Xing") + 8
    itself = index[:at] + struct.pack(">I", len(frames) + 1) + index[at + 4 :]
    np.testing.assert_array_equal(decode_audio(b"".join([itself, *frames]))[0], expected)
    every, _ = decode_audio(b"".join(frames))
    # Fraunhofer's: name, version, delay, quality, bytes, frames
    vbri = struct.pack(">4sHHHII", b"VBRI", 1, 0, 0, sum(map(len, frames)), len(frames))
    vbri = (index[:4] + bytes(32) + vbri).ljust(len(index), b"\0")
    np.testing.assert_array_equal(decode_audio(b"".join([vbri, *frames]))[0], every)
    with pytest.raises(ValueError, match="ends early"):
        decode_audio(b"".join([vbri, *frames[:-1]]))


def test_a_cut_mp3_is_refused_and_never_filled_with_another_recordings_sound():
    tone = 0.3 * np.sin(np.arange(5 * RATE) * 0.1).astype(np.float32)
    data = encoded(tone, "MP3")
    for _ in range(3):
        decode_audio(encoded(np.tile(NOISE, 5), "MP3"))
        with pytest.raises(ValueError, match="ends early"):
            decode_audio(data[: len(data) // 4])


@pytest.mark.parametrize(("kind", "coding"), FORMATS)
def test_the_same_bytes_give_the_same_samples_whatever_was_read_before(kind, coding):
    data = encoded(NOISE, kind, coding)
    first = decode_audio(data)[0]
    decode_audio(encoded(np.tile(NOISE, 2)[::-1], kind, coding))
    np.testing.assert_array_equal(decode_audio(data)[0], first)


# ------------------------------------------------------------------------------------------------------------------ Ogg


@pytest.mark.parametrize("coding", ["VORBIS", "OPUS"])
def test_an_ogg_of_several_streams_or_with_pages_missing_is_refused(coding):
    data = encoded(np.tile(NOISE, 9), "OGG", coding)
    starts = [match.start() for match in re.finditer(b"OggS", data)]
    pages = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    assert len(pages) > 4
    assert len(decode_audio(b"".join(pages) + bytes(20))[0]) == 9 * RATE
    for wrong in (data + data, b"".join(pages[:-1]), b"".join(pages[:3] + pages[4:]), data + b"junk", pages[0]):
        with pytest.raises(ValueError, match="recording"):
            decode_audio(wrong)


# ------------------------------------------------------------------------------------------------------------- channels


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_channels_are_averaged(kind):
    other = np.roll(NOISE, RATE // 2)
    for right in (np.zeros_like(NOISE), other, NOISE):
        waveform, _ = decode_audio(encoded(np.stack([NOISE, right], axis=1), kind))
        tolerance = 1e-3 if kind in ("WAV", "FLAC") else 0.2
        assert power(waveform) == pytest.approx(power((NOISE + right) / 2), rel=tolerance)


@pytest.mark.parametrize("factors", [(1, -1), (-1, 1), (0.4, -0.5), (0.5, 0.5, -0.5, -0.5)])
def test_channels_of_opposite_sign_do_not_cancel(factors):
    waveform, _ = decode_audio(encoded(NOISE[:, None] * np.float32(factors), "WAV", "FLOAT"))
    loudest = NOISE * np.sign(factors[np.abs(factors).argmax()]) * np.abs(factors).mean()
    np.testing.assert_allclose(waveform, loudest, rtol=0, atol=1e-6)


def test_channels_that_cancel_in_a_part_whatever_their_sign_are_refused():
    same, opposite = np.stack([NOISE, NOISE], axis=1), np.stack([NOISE, -NOISE], axis=1)
    with pytest.raises(ValueError, match="channels of this recording cancel"):
        decode_audio(encoded(np.concatenate([same, opposite]), "WAV"))


# ------------------------------------------------------------------------------------------------- what is no recording


@pytest.mark.filterwarnings("error")
def test_samples_that_are_no_numbers_or_not_scaled_to_one_are_refused():
    for value, why in ((np.nan, "no finite"), (np.inf, "no finite"), (-np.inf, "no finite"), (9_000, "divide")):
        for channels in (1, 2):
            samples = np.tile(NOISE[:, None], channels)
            samples[77, 0] = value
            with pytest.raises(ValueError, match=why):
                decode_audio(encoded(samples, "WAV", "FLOAT"))


def test_what_is_no_recording_or_of_another_format_is_refused_by_name():
    tags = (b"ID3\4\0\0\0\0\0\5", b"ID3\4\0\0\x7f\x7f\x7f\x7f")
    for data in (b"", b"no recording", b"RIFF", b"\xff\xfb", b"OggS", b"fLaC", *tags):
        with pytest.raises(ValueError, match="recording"):
            decode_audio(data)
    for kind in ("SVX", "VOC", "MAT5", "IRCAM", "PVF", "XI"):
        coding = "DPCM_16" if kind == "XI" else None
        with pytest.raises(ValueError, match="none of WAV, AIFF"):
            decode_audio(encoded(NOISE, kind, coding))
    mp3_in_wav = encoded(NOISE, "WAV").replace(b"fmt \x10\0\0\0\1\0", b"fmt \x10\0\0\0\x55\0")
    with pytest.raises(ValueError, match="coding 0x0055"):
        decode_audio(mp3_in_wav)
    for kind in ("WAV", "OGG", "AIFF", "CAF"):
        with pytest.raises(ValueError, match="recording"):
            decode_audio(encoded(NOISE[:0], kind))


@pytest.mark.parametrize(("kind", "coding"), FORMATS)
def test_a_damaged_header_ends_in_a_message_or_in_a_recording_of_the_length_that_is_told(kind, coding):
    data = encoded(NOISE[:2000], kind, coding)
    for _ in range(40):
        damaged = bytearray(data)
        for at in RNG.integers(min(len(data), 200), size=2):
            damaged[at] = RNG.integers(256)
        try:
            waveform, rate = decode_audio(bytes(damaged))
        except UserError:
            continue
        assert recording_seconds(bytes(damaged)) == pytest.approx(len(waveform) / rate)


def test_the_extensions_of_recordings_are_lower_case_and_in_one_place():
    assert {"wav", "flac", "mp3", "ogg", "opus", "aiff", "aif", "w64", "au", "caf", "sph"} <= set(SPEECH_EXTENSIONS)
    assert all(extension == extension.lower().strip(".") for extension in SPEECH_EXTENSIONS)
