"""Text tokens: any Hugging Face `tokenizer.json`; a byte-level BPE can be trained here."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from mom_tokenizers.bundle import fingerprint_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE_NAME = "tokenizer.json"


class TextTokenizer:
    """Text <-> ids, over Hugging Face `tokenizers`."""

    kind = "bpe"

    def __init__(self, tokenizer: Tokenizer, source: Path | None = None):
        self._tokenizer = tokenizer
        self._source = source  # the file it was loaded from: copied by save(), so that the fingerprint stays
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def train(cls, texts: Iterable[str], size: int, *, progress: bool = False) -> TextTokenizer:
        """Byte-level BPE of at most `size` ids (fewer when the texts hold too few pairs).

        Raises ValueError for a size below 256, the number of bytes.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if size < 256:
            raise ValueError(f"text: size {size} is below 256; every byte needs an id")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=progress
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> TextTokenizer:
        """From a tokenizer.json, or a folder that holds one. Raises ValueError."""
        file = cls.files(path)[FILE_NAME]
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises plain Exception
            raise ValueError(f"{file}: not a Hugging Face tokenizer.json: {error}") from error
        # A tokenizer.json may carry a training-time truncation or padding, which would change the text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, file)

    @staticmethod
    def files(path: str | Path) -> dict[str, Path]:
        """Name -> file of everything the tokenizer is made of. Raises ValueError when one is missing."""
        file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"{path}: no {FILE_NAME} there")
        return {FILE_NAME: file}

    @classmethod
    def stored_size(cls, path: str | Path) -> int:
        """Number of ids of a stored tokenizer."""
        return cls.load(path).size

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._source is None:
            self._tokenizer.save(str(directory / FILE_NAME))
        elif self._source.resolve() != (directory / FILE_NAME).resolve():
            shutil.copyfile(self._source, directory / FILE_NAME)

    def fingerprint(self) -> str:
        """16 hex digits; the same after save and load, and on every machine."""
        if self._source is not None:
            return fingerprint_files(self.kind, {FILE_NAME: self._source})
        with TemporaryDirectory() as directory:
            self.save(directory)
            return fingerprint_files(self.kind, self.files(directory))

    def encode(self, value: str) -> np.ndarray:
        """uint32 ids, without any special tokens added. Raises ValueError for lone surrogates (not text)."""
        return self.encode_batch([value])[0]

    def encode_batch(self, values: Sequence[str]) -> list[np.ndarray]:
        for value in values:
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"text is not valid Unicode: {error}") from error
        encodings = self._tokenizer.encode_batch(list(values), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; bytes that are no valid UTF-8 become U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)
