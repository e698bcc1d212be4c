"""Checks the container of a recording before it is decoded: whether it is whole, and how many samples it holds.

libsndfile reads what it finds. It takes a WAV that was cut off for a shorter one, and guesses the length of an MP3
without an index, so that it drops samples or adds some. So the headers of a container are walked here first, without
decoding. Files that are cut off or hold unexplained data are refused, and libsndfile gets bytes whose lengths are
right.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from mom_tokenizers.errors import UserError

WAV_CODINGS = {1: "PCM", 3: "float", 6: "A-law", 7: "mu-law", 2: "MS ADPCM", 0x11: "IMA ADPCM", 0x31: "GSM 6.10"}
UNCOMPRESSED = (1, 3, 6, 7)
EXTENSIBLE = 0xFFFE  # says that the coding stands further on in the chunk
CAF_UNCOMPRESSED = (b"lpcm", b"ulaw", b"alaw")
AIFF_UNCOMPRESSED = (b"none", b"sowt", b"twos", b"fl32", b"fl64", b"ulaw", b"alaw")
# Lengths that FFmpeg, SoX, arecord and others write into the header of a WAV while they do not know its length
NEVER_FILLED = (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0x7FFFFF00, 0xFFFFFFFFFFFFFFFF)
FEW_BYTES = 64  # some programs leave up to so many bytes after the end of a WAV, less than a hundredth of a second
MOST_BEFORE_AN_MP3 = 4096  # bytes
DECODER_DELAY = 529  # samples
# The bit rates of layer III in kbit/s
MPEG_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
MPEG_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


class Container(NamedTuple):
    """A whole recording. In `data` no length is left for libsndfile to guess. `samples` is the number of samples per
    channel that the container says it has, or None where libsndfile's count is right. They follow the first `skipped`
    samples that are decoded, which are not part of the recording."""

    data: bytes
    samples: int | None
    skipped: int = 0


def whole(data: bytes) -> Container:
    """The recording without the tags around it. Raises UserError for one that is cut off, damaged, or of an unknown
    format."""
    data = data[_tags_before(data) :].lstrip(b"\0")  # some programs leave space for more tags
    data = data[_before_an_mp3(data) :]
    data = data[: len(data) - _tag_behind(data)]
    for magic, read in (
        (rb"(RIFF|RF64)....WAVE", _wav),
        (rb"FORM....(AIFF|AIFC)", _aiff),
        (rb"riff\x2e\x91\xcf\x11", _w64),
        (rb"caff", _caf),
        (rb"\.snd", _au),
        (rb"NIST_1A", _nist),
        (rb"fLaC\0", _flac),
        (rb"OggS", _ogg),
        (rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]", _mp3),
    ):
        if re.match(magic, data, re.DOTALL):
            try:
                return read(data)
            except (struct.error, IndexError):
                raise UserError("recording ends early: inside a header. Fetch the file again.") from None
    raise UserError("not a readable recording: none of WAV, AIFF, W64, CAF, AU, NIST SPHERE, FLAC, Ogg and MP3")


def _cut(found: int, promised: int, what: str = "bytes of sound") -> UserError:
    return UserError(f"recording ends early: {found} of {promised} {what} are there. Fetch the file again.")


def _damaged(why: str) -> UserError:
    return UserError(f"not a readable recording: {why}")


def _tags_before(data: bytes, at: int = 0) -> int:
    """The byte at which the ID3v2 tags that begin at `at` end."""
    while data[at : at + 3] == b"ID3" and len(data) >= at + 10:
        size = 0
        for byte in data[at + 6 : at + 10]:
            size = size << 7 | byte & 0x7F
        at += 10 + size + (10 if data[at + 5] & 0x10 else 0)
        if at > len(data):
            raise _cut(len(data), at, "bytes")
    return at


def _tag_behind(data: bytes) -> int:
    """The number of bytes of an ID3v1 tag at the end, or 0."""
    return 128 if data[-128:-125] == b"TAG" and not data.startswith((b"RIFF", b"RF64", b"FORM")) else 0


def _is_padding(rest: bytes) -> bool:
    """Whether the bytes after the sound are none, zeros, or a tag."""
    return rest[:3] in (b"TAG", b"ID3") or rest[:8] in (b"APETAGEX", b"LYRICSBE") or not rest.strip(b"\0")


# ---------------------------------------------------------------------------------------------------------- chunks


def _chunks(data: bytes, start: int, header: str, pad: int, own: bool = False) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, size) of every chunk, as its header says. With `own`, the size in the header includes the header
    itself. Chunks begin at multiples of `pad` bytes."""
    head = struct.Struct(header)
    while start + head.size <= len(data):
        name, size = head.unpack_from(data, start)
        if not name[:4].isascii() or not name[:4].decode().isprintable():
            if _is_padding(data[start:]):
                return
            raise _damaged(
                f"byte {start} begins no chunk of the file, and data follows: a wrong length stands before it"
            )
        size -= head.size if own else 0
        if size < 0 and name[:4] != b"data":
            raise _damaged(f"chunk {name[:4].decode()!r} has a length below nothing")
        yield name[:4], start + head.size, size
        start += head.size + size
        start += -start % pad
    if not _is_padding(data[start:]):
        raise _damaged(f"{len(data) - start} bytes follow the last chunk: a wrong length stands before them")


def _sound(data: bytes, found: list[tuple[bytes, int, int]], name: bytes) -> None:
    """Check that exactly one chunk holds the samples, and that all chunks are complete."""
    if (count := sum(chunk == name for chunk, _, _ in found)) != 1:
        raise _damaged(f"{count} chunks {name.decode()!r}; expected one")
    for _, start, size in found:
        if start + size > len(data):
            raise _cut(len(data) - start, size, "bytes of a chunk")


def _wav(data: bytes) -> Container:
    """A WAV in RIFF or RF64. Where its length was never filled in (the file was written to a pipe, or not closed), the
    sound reaches to the end of the file."""
    long: tuple[int, ...] = ()
    frame = None
    for name, start, size in _chunks(data, 12, "<4sI", 2):  # noqa: B007  # `start` and `size` serve below
        if name == b"ds64":
            long = struct.unpack_from("<QQ", data, start)
        if name == b"fmt ":
            frame = _wav_frame(data, start)
        if name == b"data":
            break
    else:
        raise _damaged("no chunk 'data' in a WAV")
    there = len(data) - start
    if long and size == 0xFFFFFFFF:
        size = long[1]
    end = (long[0] if long else struct.unpack_from("<I", data, 4)[0]) + 8
    if (size in NEVER_FILLED and size > there) or (size == 0 and end <= start):
        size = there
    if size > there:
        raise _cut(there, size)
    if size >= 1 << 32:
        raise _damaged("a WAV of 4 GB or more")
    head = data[12 : start - 4].replace(b"ds64", b"JUNK", 1) if long else data[12 : start - 4]
    if start + size <= end < len(data) <= end + FEW_BYTES:
        data = data[:end]  # bytes beyond the length that the file itself gives are not part of it
    riff = struct.pack("<4sI", b"RIFF", min(len(data) - 8, 0xFFFFFFFE))
    data = b"".join((riff, b"WAVE", head, struct.pack("<I", size), data[start:]))
    _sound(data, list(_chunks(data, 12, "<4sI", 2)), b"data")
    if frame is None:
        raise _damaged("a WAV that does not say how its samples are coded")
    return Container(data, size // frame if frame else None)


def _wav_frame(data: bytes, start: int) -> int:
    """The bytes of one sample of all channels, by the chunk 'fmt ' at `start`; 0 where they are compressed."""
    coding, frame = struct.unpack_from("<H10xH", data, start)
    if coding == EXTENSIBLE:
        coding = struct.unpack_from("<H", data, start + 24)[0]
    if coding not in WAV_CODINGS:
        raise _damaged(f"a WAV of coding {coding:#06x}; known are {', '.join(WAV_CODINGS.values())}")
    return frame if coding in UNCOMPRESSED else 0


def _aiff(data: bytes) -> Container:
    found = list(_chunks(data, 12, ">4sI", 2))
    _sound(data, found, b"SSND")
    common = [(start, size) for name, start, size in found if name == b"COMM"]
    if len(common) != 1 or common[0][1] < 18:
        raise _damaged("an AIFF without its chunk 'COMM'")
    start, size = common[0]
    coding = data[start + 18 : start + 22] if size >= 22 else b"NONE"
    frames = struct.unpack_from(">I", data, start + 2)[0]
    if coding.lower() not in AIFF_UNCOMPRESSED:
        raise _damaged(f"a compressed AIFF ({coding!r}); known is what is not compressed")
    return Container(data, frames)


def _w64(data: bytes) -> Container:
    found = list(_chunks(data, 40, "<16sq", 8, own=True))
    _sound(data, found, b"data")
    frames = [_wav_frame(data, start) for name, start, _ in found if name == b"fmt "]
    size = next(size for name, _, size in found if name == b"data")
    return Container(data, size // frames[0] if frames and frames[0] else None)


def _caf(data: bytes) -> Container:
    coding, frame = b"", 0
    for name, start, size in _chunks(data, 8, ">4sq", 1):  # noqa: B007  # `size` serves below
        if name == b"desc":
            coding, frame = struct.unpack_from(">8x4s4xI", data, start)
        if name == b"data":
            break
    else:
        raise _damaged("no chunk 'data' in a CAF")
    if coding not in CAF_UNCOMPRESSED or not frame:
        raise _damaged(f"a compressed CAF ({coding!r}); known is what is not compressed")
    if size == -1:  # the length is unknown; by the rules of the format this is then the last chunk
        size = len(data) - start
        data = data[: start - 8] + struct.pack(">q", size) + data[start:]
    _sound(data, list(_chunks(data, 8, ">4sq", 1)), b"data")
    return Container(data, (size - 4) // frame)  # the chunk begins with 4 bytes that count edits


def _au(data: bytes) -> Container:
    start, size = struct.unpack_from(">II", data.ljust(12, b"\0"), 4)
    there = len(data) - start
    if size in (0, 0xFFFFFFFF):
        return Container(data[:8] + struct.pack(">I", max(0, there)) + data[12:], None)
    if size > there:
        raise _cut(there, size)
    if not _is_padding(data[start + size :]):
        raise _damaged(f"{there - size} bytes follow the {size} bytes of sound that the header counts")
    return Container(data, None)


def _nist(data: bytes) -> Container:
    count = re.search(rb"\nsample_count -i (\d+)", data[:4096])
    if count is None:
        raise _damaged("NIST SPHERE without a sample_count")
    return Container(data, int(count[1]))


def _flac(data: bytes) -> Container:
    """A FLAC. The count of samples is removed from the header, so that libsndfile reads to the end and finds too many
    samples as well as too few."""
    if len(data) < 42:
        raise _cut(len(data), 42, "bytes of the header")
    samples = int.from_bytes(data[21:26], "big") & (1 << 36) - 1
    return Container(data[:21] + bytes([data[21] & 0xF0, 0, 0, 0, 0]) + data[26:], samples or None)


def _ogg(data: bytes) -> Container:
    """An Ogg. It must be one stream of pages, of which none is missing or damaged and the last is marked as last."""
    at, number, serial, last = 0, 0, None, False
    while at < len(data):
        if data[at : at + 4] != b"OggS":
            if last and _is_padding(data[at:]):
                break
            raise _damaged(f"byte {at} begins no page of Ogg")
        segments = data[at + 26] if at + 27 <= len(data) else 0
        end = at + 27 + segments + sum(data[at + 27 : at + 27 + segments])
        if at + 27 + segments > len(data) or end > len(data):
            raise _cut(len(data), max(end, at + 27 + segments), "bytes")
        flags, of, sequence, crc = struct.unpack_from("<5xB8xIII", data, at)
        if serial is not None and (of != serial or last):
            raise _damaged("an Ogg of several streams; take them apart first")
        if sequence != number:
            raise _damaged(f"page {sequence} of an Ogg follows page {number - 1}")
        if _ogg_crc(data[at : at + 22] + bytes(4) + data[at + 26 : end]) != crc:
            raise _damaged(f"page {sequence} of an Ogg has a wrong checksum")
        at, number, serial, last = end, number + 1, of, bool(flags & 4)
    if not last:
        raise UserError(f"recording ends early: page {number - 1} of an Ogg is not its last. Fetch the file again.")
    return Container(data, None)


def _ogg_crc(page: bytes) -> int:
    """The CRC-32 of an Ogg page, computed with zlib's, which has another bit order, start value and end value."""
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_MIRRORED), "big")


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


# -------------------------------------------------------------------------------------------------------------- MP3


class _Frame(NamedTuple):
    """A frame of MPEG audio layer III: its `size` in bytes, and its `layout`, which is (version, where 3 is MPEG-1;
    sampling rate; whether it is mono)."""

    size: int
    layout: tuple[int, int, bool]

    @property
    def samples(self) -> int:
        return 1152 if self.layout[0] == 3 else 576

    @property
    def side_info(self) -> int:
        return {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[
            self.layout[0] == 3, self.layout[2]
        ]


def _frame(data: bytes, at: int) -> _Frame | None:
    """The frame whose header stands at byte `at`, or None where there is no header."""
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE6 != 0xE2:
        return None
    version, bitrate, rate = data[at + 1] >> 3 & 3, data[at + 2] >> 4, data[at + 2] >> 2 & 3
    if version == 1 or bitrate in (0, 15) or rate == 3:
        return None
    hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    kilobits = (MPEG_1 if version == 3 else MPEG_2)[bitrate]
    size = (144 if version == 3 else 72) * 1000 * kilobits // hertz + (data[at + 2] >> 1 & 1)
    return _Frame(size, (version, hertz, data[at + 3] >> 6 == 3))


def _mp3(data: bytes) -> Container:
    """An MP3. Its frames are counted, and the count is written into the index frame at its start, which is made where
    there is none."""
    first = _frame(data, 0)
    if first is None:
        raise _damaged("no frame of MPEG layer III at its start")
    if first.size > len(data):
        raise _cut(len(data), first.size, "bytes of the first MP3 frame")
    index = _mp3_index(data, first)
    start = first.size if index else 0
    at, frames = start, 0
    pieces = []
    while at < len(data):
        frame = _frame(data, at)
        if frame is None:
            tags = _tags_before(data, at)
            if tags > at:
                pieces.append(data[start:at])
                start = at = tags
                continue
            if _is_padding(data[at:]) or (index and frames == index.frames):
                break
            raise _damaged(f"byte {at} of an MP3 begins neither a frame nor a tag")
        if frame.layout != first.layout:
            raise _damaged(f"an MP3 whose sampling rate or channels change at byte {at}")
        if at + frame.size > len(data):
            raise _cut(len(data) - at, frame.size, "bytes of the last MP3 frame")
        at, frames = at + frame.size, frames + 1
    pieces.append(data[start:at])
    if index and index.frames is not None and frames != index.frames:
        size = sum(map(len, pieces))
        # Some encoders count the index as one of the frames.
        if frames != index.frames - 1 or index.size not in (size, size + first.size):
            if frames < index.frames:
                raise _cut(frames, index.frames, "MP3 frames")
            raise _damaged(
                f"{frames} MP3 frames follow an index of {index.frames}: files put together without a new one?"
            )
    if index and index.at and index.frames is not None:
        head = data[: index.at] + struct.pack(">I", frames) + data[index.at + 4 : first.size]
        return Container(b"".join((head, *pieces)), None)
    # Make an index frame: layer III, no checksum, and 64 kbit/s, so that it has space; then its name, the flag that a
    # count follows, and the count. Decoders that see an index drop the decoder's delay at the start, so a silent frame
    # is put there.
    header = bytes([0xFF, data[1] | 1, (0x50 if first.layout[0] == 3 else 0x80) | data[2] & 0x0C, data[3]])
    made = _frame(header, 0)
    assert made is not None
    head = header + bytes(first.side_info) + struct.pack(">4sII", b"Xing", 1, frames + 1)
    silence = header.ljust(made.size, b"\0")
    stream = b"".join((head.ljust(made.size, b"\0"), silence, *pieces))
    return Container(stream, frames * first.samples, first.samples - DECODER_DELAY)


def _before_an_mp3(data: bytes) -> int:
    """The number of meaningless bytes before an MP3. Bytes are taken for meaningless only where an index frame that
    counts all frames follows, so that no frame can be among them."""
    if re.match(rb"\xff[\xe0-\xff]|RIFF|RF64|FORM|riff|caff|\.snd|NIST|fLaC|OggS", data):
        return 0
    for found in re.finditer(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]", data[:MOST_BEFORE_AN_MP3]):
        first = _frame(data, found.start())
        index = first and _mp3_index(data[found.start() : found.start() + first.size], first)
        if index and index.frames is not None:
            return found.start()
    return 0


class _Index(NamedTuple):
    """The contents of an MP3's first frame where it is an index instead of sound: the number of frames, their size in
    bytes, and the byte where the number stands (0 where it cannot be overwritten)."""

    frames: int | None
    size: int | None
    at: int


def _mp3_index(data: bytes, first: _Frame) -> _Index | None:
    def number(at: int) -> int:
        return int.from_bytes(data[at : at + 4], "big")

    place = 4 + first.side_info
    for at in (place, place + 2):  # some encoders leave 2 bytes for a checksum
        if data[at : at + 4] in (b"Xing", b"Info"):
            if at + 16 > first.size or not data[at + 7] & 1:
                return _Index(None, None, 0)
            return _Index(number(at + 8), number(at + 12) if data[at + 7] & 2 else None, at + 8)
    if data[36:40] == b"VBRI":
        return _Index(number(50), number(46), 0)
    return None
