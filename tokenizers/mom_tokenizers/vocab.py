"""One vocabulary for every modality: consecutive spans of ids, padded to a multiple of 64.

    text [0, T) | special [T, T+S) | image [..) | speech [..) | ... | unused padding

Token shards store *modality-local* ids, so this layout can change without rewriting data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

SPECIALS = ("bos", "eos", "pad", "boi", "eoi", "bosp", "eosp", "null")
_BRACKETS = {"image": ("boi", "eoi"), "speech": ("bosp", "eosp")}
MULTIPLE = 64


@dataclass(frozen=True)
class VocabLayout:
    """Where each modality's ids lie in the model's vocabulary.

    `sizes` maps modality name to the number of its ids, text first; the order of the mapping numbers the
    modalities (0 text, 1 image, 2 speech, ...). A further modality is one more entry.
    Specials belong to text. Raises ValueError for sizes that cannot be laid out.
    """

    sizes: tuple[tuple[str, int], ...]

    def __init__(self, sizes: Mapping[str, int]):
        names = list(sizes)
        if not names or names[0] != "text":
            raise ValueError(f"vocabulary: the first modality must be 'text', got {names or 'none'}")
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"vocabulary: modality '{name}' has size {size}; it must be at least 1")
        object.__setattr__(self, "sizes", tuple(sizes.items()))

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.sizes)

    @cached_property
    def specials(self) -> dict[str, int]:
        """Name of a special token -> its id."""
        names = list(SPECIALS)
        for modality in self.modalities[1:]:
            names += [n for n in self._bracket_names(modality) if n not in names]
        start = self.sizes[0][1]
        return {name: start + i for i, name in enumerate(names)}

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Modality -> id of its local token 0."""
        offsets, start = {"text": 0}, self.sizes[0][1] + len(self.specials)
        for name, size in self.sizes[1:]:
            offsets[name] = start
            start += size
        return offsets

    @cached_property
    def used(self) -> int:
        """Number of ids that mean something."""
        return sum(size for _, size in self.sizes) + len(self.specials)

    @property
    def size(self) -> int:
        """Rows of the embedding: `used`, padded to a multiple of 64."""
        return -(-self.used // MULTIPLE) * MULTIPLE

    @cached_property
    def modality_of_id(self) -> np.ndarray:
        """uint8[size]: the modality number of every id (specials and padding are text)."""
        table = np.zeros(self.size, np.uint8)
        for number, (name, size) in enumerate(self.sizes):
            table[self.offsets[name] : self.offsets[name] + size] = number
        return table

    def brackets(self, modality: str) -> tuple[int, int]:
        """Ids that open and close a span of a modality other than text."""
        opening, closing = self._bracket_names(modality)
        return self.specials[opening], self.specials[closing]

    @staticmethod
    def _bracket_names(modality: str) -> tuple[str, str]:
        return _BRACKETS.get(modality, (f"bo_{modality}", f"eo_{modality}"))

    def to_json(self) -> str:
        return json.dumps({"sizes": dict(self.sizes), "specials": self.specials, "size": self.size}, indent=2)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> VocabLayout:
        return cls(json.loads(Path(path).read_text())["sizes"])
