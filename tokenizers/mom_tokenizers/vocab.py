"""The vocabulary of a model: the ids of all modalities in consecutive spans, padded to a multiple of 64.

    text [0, T) | special [T, T+S) | image [..) | speech [..) | ... | unused padding

A modality may instead be *mapped*: a table gives each of its codes an id inside the text's span, and some special
tokens have ids there too. Chameleon's vocabulary of 65,536 is like this, with 8,192 image ids among the words.

Token shards store *modality-local* ids, so this layout can change without rewriting data.

With `shapes`, pictures need not be square. A picture of 4 rows and 16 columns is opened by the special token boi_4x16
instead of boi, and a square one by boi, so that the model knows the shape before the first token of the picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mom_tokenizers.errors import UserError, read_json
from mom_tokenizers.media.shapes import Grid, Shapes

SPECIALS = ("bos", "eos", "pad", "boi", "eoi", "bosp", "eosp", "null")
_BRACKETS = {"image": ("boi", "eoi"), "speech": ("bosp", "eosp")}
MULTIPLE = 64

CHAMELEON_SPECIALS = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "boi": "<racm3:break>", "eoi": "<eoss>"}
"""Which token of Chameleon's vocabulary serves as each special token."""
_CHAMELEON_TAKEN = ("<reserved08706>", "<reserved08707>")
"""Reserved tokens with a use of their own: the end of a turn, and Transformers' placeholder of a picture."""
_CODE_NAME = re.compile(r"IMGIMG([A-J]+)Z")


@dataclass(frozen=True)
class VocabLayout:
    """Where each modality's ids lie in the model's vocabulary.

    `sizes` maps the name of each modality to the number of its ids, text first. The order of the mapping numbers the
    modalities (0 text, 1 image, 2 speech, ...). A further modality is one more entry.

    `mapped` gives, for a modality without a span of its own, the id of each of its local ids. `placed` gives the ids
    of special tokens that the text's span holds already. The size of text counts the ids of both. Special tokens belong
    to text. `shapes` gives every grid of a picture that is not square an opening token of its own. Raises UserError for
    a layout that is not possible.
    """

    sizes: tuple[tuple[str, int], ...]
    mapped: tuple[tuple[str, tuple[int, ...]], ...]
    placed: tuple[tuple[str, int], ...]
    shapes: Shapes | None

    def __init__(
        self,
        sizes: Mapping[str, int],
        mapped: Mapping[str, Sequence[int]] | None = None,
        placed: Mapping[str, int] | None = None,
        shapes: Shapes | None = None,
    ):
        names = list(sizes)
        if not names or names[0] != "text":
            raise UserError(f"vocabulary: the first modality must be 'text', got {names or 'none'}")
        for name, size in sizes.items():
            if not _is_int(size) or size < 1:
                raise UserError(f"vocabulary: modality '{name}' has size {size}; it must be a number, at least 1")
        mapped, placed = mapped or {}, placed or {}
        object.__setattr__(self, "sizes", tuple(sizes.items()))
        object.__setattr__(self, "mapped", tuple((name, tuple(table)) for name, table in mapped.items()))
        object.__setattr__(self, "placed", tuple(placed.items()))
        object.__setattr__(self, "shapes", shapes)
        if shapes is not None and "image" not in names:
            raise UserError(f"vocabulary: shapes are those of pictures, but there is no 'image' among {names}")
        owner: dict[int, str] = {}
        for name, table in self.mapped:
            if name not in names[1:]:
                raise UserError(f"vocabulary: '{name}' is mapped, but the modalities beside text are {names[1:]}")
            if len(table) != sizes[name]:
                raise UserError(f"vocabulary: '{name}' has size {sizes[name]}, but its table has {len(table)} ids")
            for code, id_ in enumerate(table):
                self._take(owner, id_, f"code {code} of '{name}'")
        for special, id_ in self.placed:
            if special not in self._special_names:
                raise UserError(f"vocabulary: no special is named '{special}'; there are {self._special_names}")
            self._take(owner, id_, f"special '{special}'")

    def _take(self, owner: dict[int, str], id_: int, what: str) -> None:
        text = self.sizes[0][1]
        if not _is_int(id_) or not 0 <= id_ < text:
            raise UserError(f"vocabulary: {what} has id {id_!r}, outside the text's {text} ids")
        if id_ in owner:
            raise UserError(f"vocabulary: {what} has id {id_}, which is also that of {owner[id_]}")
        owner[id_] = what

    @classmethod
    def of(cls, vocabulary: Mapping[str, int] | str | Path, shapes: Shapes | None = None) -> VocabLayout:
        """The layout that a run's config names: sizes by modality, or the path of a file that `save` wrote, and the
        shapes of pictures. Raises UserError where the file has other shapes."""
        layout = cls(vocabulary) if isinstance(vocabulary, Mapping) else cls.load(vocabulary)
        if shapes is None or layout.shapes == shapes:
            return layout
        if layout.shapes is not None:
            raise UserError(f"{vocabulary} is a layout for shapes {layout.shapes.as_json()}, not {shapes.as_json()}")
        return cls(dict(layout.sizes), dict(layout.mapped), dict(layout.placed), shapes)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.sizes)

    @cached_property
    def _special_names(self) -> list[str]:
        names = list(SPECIALS)
        for modality in self.modalities[1:]:
            names += [n for n in self._bracket_names(modality) if n not in names]
        # They come last, so that the ids of all others are those of the same layout without shapes.
        return [*names, *self._opening_names.values()]

    @cached_property
    def _opening_names(self) -> dict[Grid, str]:
        if self.shapes is None:
            return {}
        opening, _ = self._bracket_names("image")
        return {(r, c): f"{opening}_{r}x{c}" for r, c in self.shapes.grids if (r, c) != self.shapes.square}

    @cached_property
    def specials(self) -> dict[str, int]:
        """The id of each special token by its name."""
        ids, free = dict(self.placed), self.sizes[0][1]
        for name in self._special_names:
            if name not in ids:
                ids[name] = free
                free += 1
        return {name: ids[name] for name in self._special_names}

    @cached_property
    def offsets(self) -> dict[str, int]:
        """The id of each modality's local id 0. A mapped modality has no offset; see `ids`."""
        offsets, start = {"text": 0}, self._text_and_specials
        for name, size in self.sizes[1:]:
            if name not in self._tables:
                offsets[name] = start
                start += size
        return offsets

    @property
    def _text_and_specials(self) -> int:
        return self.sizes[0][1] + len(self._special_names) - len(self.placed)

    @cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        return {name: np.array(table, np.int64) for name, table in self.mapped}

    def ids(self, modality: str, codes: np.ndarray) -> np.ndarray:
        """The vocabulary's ids, int64, of a modality's local ids, which must be below its size."""
        table = self._tables.get(modality)
        return table[codes] if table is not None else np.add(codes, self.offsets[modality], dtype=np.int64)

    @cached_property
    def _codes(self) -> dict[str, np.ndarray]:
        inverse = {}
        for name, table in self._tables.items():
            inverse[name] = np.full(self.size, -1, np.int64)
            inverse[name][table] = np.arange(len(table))
        return inverse

    def codes(self, modality: str, ids: np.ndarray) -> np.ndarray:
        """The local ids, int64, of a modality's ids in the vocabulary: the inverse of `ids`. All must be ids of this
        modality."""
        inverse = self._codes.get(modality)
        return inverse[ids] if inverse is not None else np.subtract(ids, self.offsets[modality], dtype=np.int64)

    @cached_property
    def used(self) -> int:
        """The number of ids that stand for a token, without the padding."""
        return self._text_and_specials + sum(size for name, size in self.sizes[1:] if name not in self._tables)

    @property
    def size(self) -> int:
        """The number of rows of the embedding: `used`, rounded up to a multiple of 64."""
        return -(-self.used // MULTIPLE) * MULTIPLE

    @cached_property
    def modality_of_id(self) -> np.ndarray:
        """The modality number of every id, uint8 (size,). Special tokens and padding are text."""
        table = np.zeros(self.size, np.uint8)
        for number, (name, size) in enumerate(self.sizes[1:], start=1):
            table[self.ids(name, np.arange(size))] = number
        return table

    def brackets(self, modality: str) -> tuple[int, int]:
        """The ids of the tokens that open and close a span of a modality other than text."""
        opening, closing = self._bracket_names(modality)
        return self.specials[opening], self.specials[closing]

    @cached_property
    def openings(self) -> dict[Grid, int]:
        """The id of the token that opens a picture of each grid. It is empty where all pictures are square."""
        if self.shapes is None:
            return {}
        shaped = {grid: self.specials[name] for grid, name in self._opening_names.items()}
        return {self.shapes.square: self.brackets("image")[0], **shaped}

    def opening(self, modality: str, grid: Grid | None = None) -> int:
        """The id of the token that opens a span; `grid` is that of a picture, None for a square one. Raises UserError
        for a grid that the vocabulary lacks."""
        if grid is None:
            return self.brackets(modality)[0]
        if modality != "image" or grid not in self.openings:
            raise UserError(
                f"{modality} of {grid[0]} rows and {grid[1]} columns: the vocabulary has no token that opens it. It "
                f"has pictures of {self.shapes or 'square shape alone'}; set picture_shapes as in tokenizers.yaml"
            )
        return self.openings[grid]

    @staticmethod
    def _bracket_names(modality: str) -> tuple[str, str]:
        return _BRACKETS.get(modality, (f"bo_{modality}", f"eo_{modality}"))

    def to_json(self) -> str:
        values: dict[str, Any] = {"sizes": dict(self.sizes), "specials": self.specials, "size": self.size}
        if self.mapped or self.placed:
            values |= {"mapped": dict(self.mapped), "placed": dict(self.placed)}
        if self.shapes is not None:
            values["shapes"] = self.shapes.as_json()
        # One key on each line, so that a table of 8,192 ids takes one line.
        return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()) + "\n}"

    def save(self, path: str | Path) -> None:
        """Write the layout to a JSON file, which `load` reads again."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> VocabLayout:
        """Read a layout that `save` wrote. Raises a UserError that names the file."""
        values = _read_object(path)
        for key in ("sizes", "mapped", "placed"):
            if not isinstance(values.get(key, {}), dict):
                raise UserError(f"{path}: '{key}' must be a mapping")
        if "sizes" not in values:
            raise UserError(f"{path}: expected a vocabulary layout with 'sizes', such as {{\"text\": 32000}}")
        try:
            shapes = Shapes.of(values["shapes"]) if values.get("shapes") is not None else None
            return cls(values["sizes"], values.get("mapped"), values.get("placed"), shapes)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: {error}") from error


def chameleon_layout(
    vocabulary: Mapping[str, int], specials: Mapping[str, str] | None = None, further: Mapping[str, int] | None = None
) -> VocabLayout:
    """The layout of a vocabulary (token -> id) whose image codes are named as in Chameleon: IMGIMG, the decimal digits
    of the code as letters (A for 0, ..., J for 9), and Z.

    `specials` (special token -> token of the vocabulary) adds to CHAMELEON_SPECIALS. Every other special token takes a
    <reserved.....> token, the highest first; where none is left, it gets an id after the text. `further` modalities
    (name -> size) follow after these. Raises UserError for codes that are not 0, 1, 2, ..., and for tokens that the
    vocabulary lacks.
    """
    codes = {}
    for token, id_ in vocabulary.items():
        if match := _CODE_NAME.fullmatch(token):
            codes[int("".join(str(ord(letter) - ord("A")) for letter in match[1]))] = id_
    if not codes:
        raise UserError("the vocabulary has no image codes: no token is named like IMGIMGABCZ")
    if gaps := [code for code in range(max(codes) + 1) if code not in codes]:
        raise UserError(f"the vocabulary's image codes run to {max(codes)}, but code {gaps[0]} has no token")
    names = {**CHAMELEON_SPECIALS, **(specials or {})}
    for special, token in names.items():
        if token not in vocabulary:
            raise UserError(f"special '{special}' is to be the token {token!r}, which the vocabulary lacks")
    if taken := {"text", "image"} & set(further or {}):
        raise UserError(f"further modalities: {', '.join(sorted(taken))} has its ids from the vocabulary already")
    sizes = {"text": max(vocabulary.values()) + 1, "image": len(codes), **(further or {})}
    reserved = sorted(t for t in vocabulary if re.fullmatch(r"<reserved\d+>", t) and t not in _CHAMELEON_TAKEN)
    reserved = [token for token in reserved if token not in names.values()]
    for special in VocabLayout(sizes).specials:
        if special not in names and reserved:
            names[special] = reserved.pop()
    table = [codes[code] for code in range(len(codes))]
    return VocabLayout(sizes, {"image": table}, {special: vocabulary[token] for special, token in names.items()})


def read_vocabulary(path: str | Path) -> dict[str, int]:
    """The id of each token in a Hugging Face tokenizer.json, including its added tokens, or in a vocab.json. Raises
    UserError for other files."""
    values = _read_object(path)
    model = values.get("model")
    tokens: Any = model.get("vocab") if isinstance(model, dict) else values
    if isinstance(model, dict):
        if isinstance(tokens, list):  # Unigram: [token, log probability], in the order of ids
            tokens = {pair[0]: id_ for id_, pair in enumerate(tokens)}
        added = values.get("added_tokens") or []
        tokens = {**(tokens or {}), **{token["content"]: token["id"] for token in added}}
    if not tokens or not all(_is_int(id_) for id_ in tokens.values()):
        raise UserError(f"{path}: no vocabulary there; expected a tokenizer.json, or a vocab.json of token: id")
    return dict(tokens)


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _read_object(path: str | Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values
