"""The tokenizers of a data set, which a tokenizers.yaml names:

    text:   {kind: bpe, path: text}
    image:  {kind: vq, path: image}         # codes, as with patches, vidtok, emu3, janus; kl makes latents
    speech: {kind: units, path: speech}
    music:  {kind: ids, size: 2048, made_by: "EnCodec, 32 kHz, first codebook"}    # ready-made ids in the documents

With `shapes: {tokens: 256, max_aspect_ratio: 4}` in the entry of a picture's tokenizer, pictures are not all cropped
square: each gets the nearest shape of about as many tokens (mom_tokenizers/media/shapes.py). `tokens` is the number
that the tokenizer makes of a square picture.

Paths are relative to the file. A text's path may be "hf://owner/name" on the Hugging Face hub. A model is loaded when
it is first used, so that a program which needs one modality, or the fingerprints alone, loads nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from mom_tokenizers import ready
from mom_tokenizers.base import Tokenizer, fingerprint_files, resolved_device
from mom_tokenizers.errors import UserError
from mom_tokenizers.files import read_yaml
from mom_tokenizers.media.shapes import Shapes

# kind -> module and class. They are imported when first used, because importing torch and diffusers takes seconds.
KINDS = {
    "bpe": ("mom_tokenizers.text", "TextTokenizer"),
    "vq": ("mom_tokenizers.image.autoencoder", "VQImageTokenizer"),
    "patches": ("mom_tokenizers.image.patches", "PatchImageTokenizer"),
    "vidtok": ("mom_tokenizers.image.vidtok", "VidTokImageTokenizer"),
    "emu3": ("mom_tokenizers.image.transformers", "Emu3ImageTokenizer"),
    "janus": ("mom_tokenizers.image.transformers", "JanusImageTokenizer"),
    "kl": ("mom_tokenizers.image.kl", "KLImageTokenizer"),
    "units": ("mom_tokenizers.speech.units", "SpeechTokenizer"),
}

_LIBRARIES = {
    "vq": "diffusers.models.autoencoders.vq_model",
    "patches": "mom_tokenizers.image.patch_network",
    "vidtok": "diffusers.models.autoencoders.autoencoder_vidtok",
    "emu3": "transformers.models.emu3.modeling_emu3",
    "janus": "transformers.models.janus.modeling_janus",
    "kl": "diffusers.models.autoencoders.autoencoder_kl",
    "units": "transformers.audio_utils",
}

PICTURES = ("vq", "patches", "vidtok", "emu3", "janus", "kl")


READY = "ids"  # the kind that has no files, because it is declared completely in tokenizers.yaml


DECODED_AT_ONCE = 32  # the most pictures held in memory in full size


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizer of each modality, text first."""

    entries: tuple[tuple[str, str, Path], ...]  # (modality, kind, path); for ready-made ids the path of the declaration
    device: str = "cpu"
    _loaded: dict[str, Tokenizer] = field(default_factory=dict, repr=False, compare=False)
    shapes: Mapping[str, Shapes] = field(default_factory=dict)
    """The shapes of pictures by modality. One that is not here makes square pictures."""

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> Tokenizers:
        """Read a tokenizers.yaml. Models are put on `device`; "auto" means a GPU where there is one.

        Raises UserError for unknown kinds or keys, and for missing folders.
        """
        path = Path(path)
        declared = read_yaml(path)
        if not isinstance(declared, dict) or "text" not in declared:
            raise UserError(f"{path}: expected 'text: {{kind: bpe, path: ...}}', and one such line a further modality")
        entries = []
        loaded: dict[str, Tokenizer] = {}
        shapes: dict[str, Shapes] = {}
        for modality in sorted(declared, key=lambda name: name != "text"):  # others keep their order
            entry = declared[modality]
            if isinstance(entry, dict) and entry.get("kind") == READY:
                loaded[str(modality)] = _ready(path, str(modality), entry)
                entries.append((str(modality), READY, path))
                continue
            if not isinstance(entry, dict) or set(entry) - {"shapes"} != {"kind", "path"}:
                raise UserError(
                    f"{path}: '{modality}' must have exactly the keys kind and path (a picture's tokenizer may also "
                    f"have shapes), got {entry!r}"
                )
            if not isinstance(entry["kind"], str) or entry["kind"] not in KINDS:
                known = ", ".join([*KINDS, READY])
                raise UserError(f"{path}: '{modality}' has unknown kind {entry['kind']!r}; known: {known}")
            where = _located(path.parent, str(entry["path"]), entry["kind"])
            if not where.exists():
                raise UserError(f"{path}: '{modality}' is to be at {where}, which does not exist")
            entries.append((str(modality), entry["kind"], where))
            if entry.get("shapes") is not None:
                shapes[str(modality)] = _shapes(path, str(modality), entry, where)
        return cls(tuple(entries), device, loaded, shapes)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(modality for modality, _, _ in self.entries)

    @property
    def by_modality(self) -> dict[str, Tokenizer]:
        """All tokenizers by modality, each loaded."""
        return {modality: self.tokenizer(modality) for modality in self.modalities}

    def tokenizer(self, modality: str) -> Tokenizer:
        """The tokenizer of a modality, loaded when first wanted. Raises UserError for a modality that has none."""
        if modality not in self._loaded:
            kind, path = self._entry(modality)
            on = () if kind == "bpe" else (resolved_device(self.device),)
            tokenizer = _class(kind).load(path, *on)
            if modality in self.shapes:
                tokenizer.use_shapes(self.shapes[modality])
            self._loaded[modality] = tokenizer
        return self._loaded[modality]

    def describe(self) -> dict[str, dict[str, Any]]:
        """{modality: {"kind", "fingerprint", "size"}}, read from the files without building a model.

        For latents there are also "patch_width", "latent_scale" and "latent_shift"; a model reads
        (latents - latent_shift) * latent_scale. For speech there is "units_per_second", for several
        codebooks in the delay pattern their number "codebooks", for ready-made ids "made_by", and for pictures that are
        not all square "shapes".
        """
        return {modality: self._described(modality, kind, path) for modality, kind, path in self.entries}

    def fingerprints(self) -> dict[str, str]:
        """{modality: fingerprint}, read from the files without the packages that only encoding and decoding need."""
        return {modality: self._fingerprint(modality, kind, path) for modality, kind, path in self.entries}

    def _fingerprint(self, modality: str, kind: str, path: Path) -> str:
        if kind == READY:
            return str(self._loaded[modality].fingerprint())
        return fingerprint_files(kind, _class(kind).files(path))

    def _described(self, modality: str, kind: str, path: Path) -> dict[str, Any]:
        if kind == READY:
            tokenizer = self._loaded[modality]
            assert isinstance(tokenizer, ready.ReadyIds)
            return tokenizer.describe()
        return {
            "kind": kind,
            "fingerprint": self._fingerprint(modality, kind, path),
            "size": _class(kind).stored_size(path),
            **(_class(kind).stored_latents(path) if kind == "kl" else {}),
            **(_class(kind).stored_rate(path) if kind == "units" else {}),
            **({"shapes": self.shapes[modality].as_json()} if modality in self.shapes else {}),
        }

    def encode(self, modality: str, data: str | bytes) -> np.ndarray:
        """The uint32 ids of a text, or of the file bytes of a picture or recording. A picture's tokenizer that makes
        latents gives float16 patches. With shapes, a picture's tokens have two axes, rows and columns, instead of one.
        Raises UserError for unreadable data."""
        return self.tokenizer(modality).encode(self._decoded(modality, data))

    def encode_many(self, modality: str, data: Sequence[str | bytes]) -> list[np.ndarray | Exception]:
        """The result of `encode` for each item, with pictures and short recordings encoded in batches. For an item that
        fails, the exception stands in its place, a ValueError where it is unreadable. The others are not affected."""
        results: list[np.ndarray | Exception] = []
        for start in range(0, len(data), DECODED_AT_ONCE):
            results += self._encode_some(modality, data[start : start + DECODED_AT_ONCE])
        return results

    def _encode_some(self, modality: str, data: Sequence[str | bytes]) -> list[np.ndarray | Exception]:
        tokenizer = self.tokenizer(modality)
        results: list[np.ndarray | Exception | None] = []
        values = []
        for item in data:
            try:
                value = self._decoded(modality, item)
                if _joins_a_batch(self._entry(modality)[0], value):
                    values.append(value)
                    results.append(None)
                else:
                    results.append(tokenizer.encode(value))
            except Exception as error:
                results.append(error)
        encoded = iter(_each(tokenizer, values))
        return [next(encoded) if result is None else result for result in results]

    def _entry(self, modality: str) -> tuple[str, Path]:
        for name, kind, path in self.entries:
            if name == modality:
                return kind, path
        raise UserError(f"no tokenizer for modality {modality!r}; there is one for {', '.join(self.modalities)}")

    def _decoded(self, modality: str, data: str | bytes) -> Any:
        kind, _ = self._entry(modality)
        if isinstance(data, str) != (kind == "bpe"):
            raise UserError(f"{modality}: got {type(data).__name__}; text is a str, all else encoded bytes")
        if isinstance(data, str) or kind == READY:
            return data
        if data.startswith(ready.MAGIC):
            raise UserError(
                f"these are ready-made ids, but {modality} has a tokenizer of kind {kind}: declare it as kind {READY}"
            )
        if kind in PICTURES:
            from mom_tokenizers.media.pictures import decode_image

            return decode_image(data)
        from mom_tokenizers.media.recordings import decode_audio

        return decode_audio(data)


def _ready(path: Path, modality: str, entry: Mapping[str, Any]) -> ready.ReadyIds:
    if modality == "text":
        raise UserError(f"{path}: 'text' needs a tokenizer of kind bpe: only further modalities can bring their ids")
    if set(entry) != ready.KEYS:
        raise UserError(f"{path}: '{modality}' must have exactly the keys kind, size and made_by, got {entry!r}")
    try:
        return ready.ReadyIds(entry["size"], entry["made_by"])
    except ValueError as error:
        raise UserError(f"{path}: '{modality}': {error}") from None


def _shapes(path: Path, modality: str, entry: Mapping[str, Any], where: Path) -> Shapes:
    """The shapes that an entry asks for. Raises UserError for a tokenizer that makes only squares, or no pictures."""
    kind = entry["kind"]
    if kind not in PICTURES:
        raise UserError(
            f"{path}: '{modality}' has shapes, which only pictures have ({', '.join(PICTURES)}), not {kind}"
        )
    if modality != "image":
        raise UserError(
            f"{path}: '{modality}' has shapes, which only the modality 'image' can have, because the token that opens "
            "a picture says its shape. Name it image, or leave shapes out"
        )
    try:
        shapes = Shapes.of(entry["shapes"])
    except UserError as error:
        raise UserError(f"{path}: '{modality}': {error}") from None
    if (why := _class(kind).why_only_square(where)) is not None:
        raise UserError(
            f"{path}: '{modality}' has shapes, but this tokenizer (kind {kind}) makes square pictures only: {why}. "
            "Leave shapes out, or use another tokenizer"
        )
    return shapes


def _joins_a_batch(kind: str, value: Any) -> bool:
    """Whether a value is encoded in a batch with others: pictures, and recordings of up to half a minute. A longer
    recording is a batch of windows by itself."""
    return kind in PICTURES or (kind == "units" and len(value[0]) <= 30 * value[1])


def _each(tokenizer: Tokenizer, values: Sequence[Any]) -> list[np.ndarray | Exception]:
    try:
        return list(tokenizer.encode_batch(values)) if values else []
    except Exception as error:  # one value fails, such as a recording that is too short; the others are encoded again
        if len(values) == 1:
            return [error]
        return [result for value in values for result in _each(tokenizer, [value])]


def libraries(kinds: Iterable[str]) -> list[str]:
    """The modules that tokenizers of these kinds import when they are first used, which takes seconds. A program that
    starts many processes imports them once before."""
    return sorted({_LIBRARIES[kind] for kind in kinds if kind in _LIBRARIES})


def _located(folder: Path, path: str, kind: str) -> Path:
    if kind == "bpe" and path.startswith("hf://"):
        from mom_tokenizers.text import hub_folder

        return hub_folder(path)
    return folder / path


def _class(kind: str) -> Any:
    module, name = KINDS[kind]
    return getattr(import_module(module), name)
