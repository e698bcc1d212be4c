"""Decides what document the members of one sample make, or why they make none.

docs/reference/raw-documents.md lists the rules.

No document is incomplete: a sample with a picture or a recording that cannot be read is left out as a whole. The one
exception is a web page in the OBELICS format, which is kept without the pictures that are lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mom_data.documents import account as why
from mom_data.documents.account import Member, shown
from mom_tokenizers.media.pictures import IMAGE_EXTENSIONS
from mom_tokenizers.media.recordings import SPEECH_EXTENSIONS
from mom_tokenizers.ready import as_npy

TEXT_EXTENSIONS = ("txt", "text")
CAPTION_EXTENSIONS = ("caption", "transcript")
"""Extensions of a text that belongs to a picture or a recording and is no document without it."""
SPOKEN_TEXTS = ("trans.txt", "normalized.txt", "original.txt")
"""Extensions by which LibriSpeech and LibriTTS name the transcript of a recording, or of a whole chapter."""
TEXT_KEYS = ("text", "caption", "transcript", "transcription")
"""JSON keys whose value is a text; the first one found counts. All but "text" belong to a picture or a recording."""
MEDIA_KEYS = (
    "image", "images", "image_path", "img", "audio", "audios", "audio_path", "audio_filepath", "wav", "speech", "video",
    "videos", "video_path",
)  # fmt: skip
"""JSON keys which say that the text belongs to a picture, recording or video that is stored elsewhere."""
# Media and other formats that are not read. Without such a member the rest of a sample would be incomplete.
NOT_READ_EXTENSIONS = frozenset((
    "m4a", "m4b", "mp4", "m4v", "aac", "wma", "amr", "mka", "mov", "mkv", "avi", "webm", "mpg", "mpeg", "3gp",
    "ts", "wmv", "flv", "ac3", "dts", "ape", "wv", "spx", "snd", "mid", "midi", "svg", "svgz", "heic", "heif", "jxl",
    "psd", "eps", "ps", "pdf", "ai", "emf", "wmf", "exr", "hdr", "dng", "cr2", "nef", "ico", "tga", "pcx", "raw",
    "tar", "gz", "tgz", "zip", "zst", "parquet", "arrow", "feather", "h5", "hdf5", "tfrecord", "mat", "jsonl",
    "safetensors", "docx", "pptx",
))  # fmt: skip
# Files that published data sets keep beside the members of a sample and that are no part of the document.
SIDECAR_EXTENSIONS = frozenset((
    "json", "cls", "cls2", "id", "idx", "index", "url", "key", "md5", "sha1", "sha256", "xml", "yaml", "yml", "toml",
    "ini", "cfg", "log", "html", "htm", "md", "rst", "csv", "tsv",
))  # fmt: skip
PICKLES = ("pkl", "pickle", "pyd", "pth", "pt")
# The share of captioned pairs whose text comes first (text -> image). The others have the text last (image -> text).
TEXT_FIRST_SHARE = 0.8
_FIRST_DOT = "The key of a sample ends at the first dot of a file's name: other files may belong to other samples"
WRONG = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""The exceptions that malformed JSON of a document may raise while it is interpreted."""


@dataclass(frozen=True)
class Reading:
    """The user's options for reading the members of samples."""

    text_keys: tuple[str, ...] = ()
    """JSON keys that hold a sample's text. They are tried before its text files. Where none are given, TEXT_KEYS are
    tried after the text files."""
    ignore: frozenset[str] = frozenset()
    """Extensions of members to leave out, in lower case and without the leading dot."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The JSON keys whose value may be the text, in the order in which they are tried."""
        return self.text_keys or TEXT_KEYS


DEFAULT = Reading()


@dataclass(frozen=True)
class Segment:
    """A run of one modality. `data` is the text, or the encoded bytes of a picture or a recording, or the bytes of a
    .npy file of ready-made ids. `member` names the member that it came from."""

    modality: str
    data: str | bytes
    member: str = field(default="", compare=False)


@dataclass(frozen=True)
class Document:
    """A sample that was read, with its segments in order, and its members for the account.

    `page` says that it is a web page, which is kept even where a picture of it is lost. `missing` names the pictures
    that are already lost.
    """

    key: str
    segments: tuple[Segment, ...]
    members: tuple[Member, ...] = field(default=(), repr=False)
    page: bool = False
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadSample:
    """A sample that makes no document. The caller counts and skips it. `account.is_damage(reason)` says whether
    something is wrong with it, or whether leaving it out is intended, as for an empty text."""

    key: str
    reason: str
    members: tuple[Member, ...] = field(default=(), repr=False)


class LeftOut(Exception):
    """Raised to leave out the whole sample, for a reason of account.py, because of the member with this extension."""

    def __init__(self, reason: str, extension: str | None = None, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.extension, self.detail = reason, extension, detail


@dataclass(frozen=True)
class Found:
    """A member found in a tar. `read` returns its bytes, or raises LeftOut where they cannot be read."""

    name: str
    extension: str
    read: Callable[[], bytes]


class _Parts:
    """The members of a sample by extension. It records for each what was taken from it (`kinds`), or why it is left
    out (`reasons`)."""

    def __init__(self, found: Sequence[Found]):
        self._found = {one.extension: one for one in found}
        self.kinds: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def __contains__(self, extension: object) -> bool:
        return extension in self._found

    def __iter__(self) -> Any:
        return iter(self._found)

    def name(self, extension: str) -> str:
        return self._found[extension].name

    def take(self, extension: str, kind: str) -> bytes:
        try:
            data = self._found[extension].read()
        except LeftOut as error:
            raise LeftOut(error.reason, extension, error.detail or self.name(extension)) from None
        self.kinds[extension] = kind
        if not data and kind not in ("text", "json"):
            raise LeftOut(why.EMPTY_MEMBER, extension, self.name(extension))
        return data

    def media(self, extension: str, modality: str) -> Segment:
        return Segment(modality, self.take(extension, modality), self.name(extension))

    def of(self, extensions: Sequence[str]) -> list[str]:
        """The extensions present that end in one of `extensions`: first plain ones, then those like "input.jpg"."""
        plain = [e for e in extensions if e in self]
        return plain + [e for e in self if "." in e and _last(e) in extensions]


def read_sample(key: str, found: Sequence[Found], reading: Reading = DEFAULT) -> Document | BadSample:
    """The document that a sample's members make, or a BadSample with the reason why they make none."""
    parts = _Parts([one for one in found if _last(one.extension) not in reading.ignore])
    try:
        extensions = [one.extension for one in found]
        if twice := next((e for e in extensions if extensions.count(e) > 1), None):
            raise LeftOut(why.SEVERAL, twice, f"two members {twice!r}")
        if not list(parts):
            raise LeftOut(why.IGNORED)
        segments, page, missing = _segments(key, parts, reading)
        return Document(key, segments, tuple(_decided(one, parts) for one in found), page, missing)
    except LeftOut as error:
        reason, category, guilty = str(error), error.reason, error.extension
    except WRONG as error:  # the sample's JSON is malformed
        reason, category = _wrong(error), why.UNREADABLE
        guilty = next((e for e in parts if _last(e) == "json"), None)

    def fate(one: Found) -> str:
        if one.extension not in parts:
            return why.IGNORED
        return category if guilty in (None, one.extension) or not why.is_damage(category) else why.BESIDE

    return BadSample(key, reason, tuple(Member(one.name, shown(one.name), None, fate(one)) for one in found))


def _wrong(error: Exception) -> str:
    return f"{why.UNREADABLE}: {type(error).__name__}: {error}"[:500]


def _decided(one: Found, parts: _Parts) -> Member:
    if one.extension not in parts:
        return Member(one.name, shown(one.name), None, why.IGNORED)
    kind, reason = parts.kinds.get(one.extension), parts.reasons.get(one.extension)
    assert kind or reason, f"nothing was decided about {one.name}"
    return Member(one.name, shown(one.name), None if reason else kind, reason)


def _last(extension: str) -> str:
    return extension.rpartition(".")[2]


def _segments(key: str, parts: _Parts, reading: Reading) -> tuple[tuple[Segment, ...], bool, tuple[str, ...]]:
    if pickled := [e for e in parts if _last(e) in PICKLES]:
        raise LeftOut(why.PICKLE, pickled[0], f"member {pickled[0]!r} is refused")
    jsons = parts.of(["json"])
    json_name = jsons[0] if "json" in parts or len(jsons) == 1 else None
    meta: Any = None
    if json_name is not None:
        meta = json.loads(parts.take(json_name, "json"))
        if not isinstance(meta, (dict, list)):
            raise TypeError(f"{parts.name(json_name)} holds a {type(meta).__name__}, which describes no sample")
        said: dict[str, Any] = meta if isinstance(meta, dict) else {}
        if ("segments" in said or ("images" in said and "texts" in said)) and not _is_transcript(said, reading):
            missing: tuple[str, ...] = ()
            if "segments" in said:
                segments = tuple(_declared(segment, parts, json_name) for segment in said["segments"])
            else:
                segments, missing = _obelics(key, said, parts, json_name)
            parts.reasons |= {e: why.NOT_NAMED for e in parts if e not in parts.kinds}
            return segments, "segments" not in said, missing
    return _pair(key, parts, meta, json_name, reading), False, ()


def _pair(key: str, parts: _Parts, meta: Any, json_name: str | None, reading: Reading) -> tuple[Segment, ...]:
    """The segments of a sample that no JSON orders: pictures or recordings, with or without a text, or a text alone."""
    for extension in parts:
        if _last(extension) in NOT_READ_EXTENSIONS:
            raise LeftOut(why.NOT_READ, extension, parts.name(extension))
    media = [*_chosen(parts, IMAGE_EXTENSIONS, "image"), *_chosen(parts, SPEECH_EXTENSIONS, "speech")]
    text = _text_beside(parts, meta, json_name, reading, bool(media))
    for extension in parts:
        if extension not in parts.kinds and extension not in parts.reasons:
            known = _last(extension) in SIDECAR_EXTENSIONS
            if not media and not known:  # the text may belong to this member
                raise LeftOut(why.UNKNOWN, extension, parts.name(extension))
            parts.reasons[extension] = why.SIDECAR if known else why.UNKNOWN
    if not media and text is None:
        raise LeftOut(
            why.UNKNOWN, None, f"no text, picture or recording among its members ({', '.join(sorted(parts))})"
        )
    if json_name is not None and text is None and _has_other_text(meta, reading):
        parts.reasons[json_name] = why.NO_TEXT
    texts = [text] if text is not None and text.data else []
    if text is not None and not text.data:
        holder = next(e for e in parts if parts.name(e) == text.member)
        if not media:
            raise LeftOut(why.EMPTY, holder)
        parts.reasons[holder] = why.EMPTY
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=4).digest()
    text_first = int.from_bytes(digest, "little") < TEXT_FIRST_SHARE * 2**32
    return tuple(texts + media if text_first else media + texts)


def _chosen(parts: _Parts, extensions: Sequence[str], modality: str) -> list[Segment]:
    """The pictures, or the recordings, of a sample that no JSON orders: the members with plain extensions, or, where
    there are none, the only one with an extension like "input.jpg"."""
    candidates = parts.of(extensions)
    plain = [e for e in candidates if "." not in e]
    if not plain and len(candidates) > 1:
        names = ", ".join(parts.name(e) for e in candidates[:4])
        raise LeftOut(why.SEVERAL, candidates[0], f"{names}. {_FIRST_DOT}")
    taken = plain or candidates
    parts.reasons |= {e: why.FURTHER for e in candidates if e not in taken}
    return [parts.media(e, modality) for e in taken]


def _text_beside(parts: _Parts, meta: Any, json_name: str | None, reading: Reading, media: bool) -> Segment | None:
    """The text of a sample, from a file or from a key of its JSON, or None where there is no text. JSON keys that the
    user named are tried before files. Where the first text is empty, the next one is tried."""
    files = parts.of(TEXT_EXTENSIONS) + parts.of(CAPTION_EXTENSIONS)
    plain = [e for e in files if "." not in e] or [e for e in files if e == "normalized.txt"]
    described = [json_name] if json_name is not None and isinstance(meta, dict) else []
    parts.reasons |= {e: why.ANOTHER_TEXT for e in files}
    empty: Segment | None = None
    for extension in [*described, *files] if reading.text_keys else [*(plain or files), *described]:
        if extension == json_name:
            found = _text_under(meta, reading.keys)
            if found is None:
                continue
            data = _characters(found[1])
            alone = not reading.text_keys and (found[0] != "text" or _media_named(meta) is not None)
        else:
            if not plain and len(files) > 1:
                names = ", ".join(parts.name(e) for e in files[:4])
                raise LeftOut(why.SEVERAL, extension, f"{names}. {_FIRST_DOT}")
            data = _decoded(parts, extension)
            alone = _last(extension) in CAPTION_EXTENSIONS or extension in SPOKEN_TEXTS
        text = Segment("text", data, parts.name(extension))
        if data and alone and not media:
            raise LeftOut(why.ALONE, extension, parts.name(extension))
        if data:
            parts.reasons.pop(extension, None)
            parts.kinds[extension] = "text"
            return text
        if extension != json_name:
            parts.reasons[extension] = why.EMPTY
        empty = empty or text
    return empty


def read_line(key: str, line: bytes | int, reading: Reading = DEFAULT) -> Document | BadSample:
    """The document of one line of a JSON-lines file. A line that is too long to read is given as its number of
    bytes."""

    def left(reason: str, said: str) -> BadSample:
        return BadSample(key, said, (Member(key, ".jsonl", None, reason),))

    if isinstance(line, int):
        return left(why.TOO_LARGE, f"{why.TOO_LARGE}: line of {line} bytes")
    if not line.strip():
        return left(why.BLANK, why.BLANK)
    try:
        meta = json.loads(line)
        found = _text_under(meta, reading.keys)
        if found is None:
            raise KeyError(reading.keys[0])
        text = _characters(found[1])
    except WRONG as error:
        return left(why.UNREADABLE, _wrong(error))
    if not reading.text_keys and (named := _media_named(meta)):
        return left(why.ALONE, f"{why.ALONE}: it names one under {named!r}, and a line of JSON brings text alone")
    if not text:
        return left(why.EMPTY, why.EMPTY)
    return Document(key, (Segment("text", text, key),), (Member(key, ".jsonl", "text"),))


def _text_under(meta: dict[str, Any], keys: Sequence[str]) -> tuple[str, Any] | None:
    """(key, text) of the first of these keys that has a text. A key "captions.0" means the first text of a list.
    Raises TypeError where the value is not a text, or is a list of several texts, since only the user can choose."""
    for key in keys:
        value = meta.get(key)
        name, _, number = key.rpartition(".")
        if key not in meta and number.isdecimal() and isinstance(listed := meta.get(name), list):
            value = listed[int(number)] if int(number) < len(listed) else None
        if isinstance(value, list) and len(value) < 2:
            value = value[0] if value else None
        if value is None:
            continue
        if isinstance(value, list):
            raise TypeError(f"{key!r} is a list of {len(value)}: --text-key {key}.0 takes the first of them")
        if not isinstance(value, str):
            raise TypeError(f"{key!r} is not a string")
        return key, value
    return None


def _has_other_text(meta: Any, reading: Reading) -> bool:
    """Whether a JSON without any of the keys asked for has words under another one: a caption, or a list of texts."""
    if not isinstance(meta, dict) or any(key in meta for key in reading.keys):
        return False
    values = [v for value in meta.values() for v in (value if isinstance(value, list) else [value])]
    # A string that is itself JSON, as img2dataset writes a picture's EXIF block, is not a text.
    return any(isinstance(v, str) and len(v.split()) > 1 and v.lstrip()[0] not in "{[" for v in values)


def _media_named(meta: dict[str, Any]) -> str | None:
    return next((key for key in MEDIA_KEYS if meta.get(key)), None)


def _is_transcript(meta: dict[str, Any], reading: Reading) -> bool:
    """Whether "segments" are the time intervals of a transcript, which Whisper writes beside its whole text."""
    segments = meta.get("segments")
    stretches = isinstance(segments, list) and all(isinstance(s, dict) and "type" not in s for s in segments)
    return stretches and isinstance(meta.get(reading.keys[0]), str)


def _decoded(parts: _Parts, extension: str) -> str:
    try:
        return parts.take(extension, "text").decode("utf-8-sig")  # this removes a byte order mark
    except UnicodeDecodeError as error:
        raise LeftOut(why.UNREADABLE, extension, f"{parts.name(extension)} is not UTF-8: {error}") from None


def _characters(text: str) -> str:
    text.encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair, which JSON may contain
    return text


def _declared(segment: dict[str, Any], parts: _Parts, json_name: str) -> Segment:
    if not isinstance(segment["type"], str):
        raise TypeError("a segment's 'type' is not a string")
    if segment["type"] == "text":
        if not isinstance(segment["text"], str):
            raise TypeError("a text segment's 'text' is not a string")
        return Segment("text", _characters(segment["text"]), parts.name(json_name))
    if "ids" in segment:
        if "part" in segment:
            raise ValueError("a segment has either 'ids' or a 'part', not both")
        return Segment(segment["type"], as_npy(segment["ids"]), parts.name(json_name))
    part = segment["part"]
    if not isinstance(part, str) or part.lower() not in parts:  # the extensions in `parts` are in lower case
        raise ValueError(f"part {part!r} is not in the tar")
    return parts.media(part.lower(), segment["type"])


def _obelics(
    key: str, meta: dict[str, Any], parts: _Parts, json_name: str
) -> tuple[tuple[Segment, ...], tuple[str, ...]]:
    """(the segments of a web page in the OBELICS format, the names of its pictures that are missing).

    "images" and "texts" are parallel lists, and at each place one of them must be null or an empty string.
    """
    images, texts = meta["images"], meta["texts"]
    if not isinstance(images, list) or not isinstance(texts, list):
        raise TypeError("'images' and 'texts' must be lists")
    if len(images) != len(texts):
        raise ValueError(f"'images' has {len(images)} entries and 'texts' {len(texts)}; they must be parallel")
    pictures = [None if image in (None, "") else str(image) for image in images]
    own = [p and p.lower().removeprefix(key.rpartition("/")[2].lower() + ".") for p in pictures]
    named = any(o in parts for o in own)  # otherwise "images" holds addresses, and the members are numbered
    segments: list[Segment] = []
    missing: list[str] = []
    number = 0
    for picture, name, text in zip(pictures, own, texts, strict=True):
        if text is not None and not isinstance(text, str):
            raise TypeError("an entry of 'texts' is neither a string nor null")
        if text and picture is not None:
            raise ValueError(f"'texts' and 'images' ({picture!r}) both have an entry at one place: one must be null")
        if text:
            segments.append(Segment("text", _characters(text), parts.name(json_name)))
        elif picture is not None:
            if not named:
                stem = picture if picture.isdecimal() else number
                name = next((f"{stem}.{e}" for e in IMAGE_EXTENSIONS if f"{stem}.{e}" in parts), None)
            number += 1
            if name not in parts:
                missing.append(picture[:200])
                continue
            assert name is not None
            try:
                segments.append(parts.media(name, "image"))
            except LeftOut as error:
                missing.append(picture[:200])
                parts.kinds.pop(name, None)
                parts.reasons[name] = error.reason
    if not segments and missing:
        raise LeftOut(why.UNREADABLE, json_name, f"none of its {len(missing)} pictures is in the tar; it has no text")
    return tuple(segments), tuple(missing)
