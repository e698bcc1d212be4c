"""Text tokens: any Hugging Face `tokenizer.json`, or a model's folder; a byte-level BPE can be trained here."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from mom_tokenizers.bundle import fingerprint_files
from mom_tokenizers.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE_NAME = "tokenizer.json"
HUB = "hf://"
# What Transformers makes a fast tokenizer from, where there is no tokenizer.json: one of the first, and the rest.
_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_BESIDE = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")

_BYTE = re.compile("<0x[0-9A-F]{2}>")


class TextTokenizer:
    """Text <-> ids, over Hugging Face `tokenizers`.

    The text of a special token, such as "</s>" in a document, becomes the ids of its characters, never the special id.
    """

    kind = "bpe"

    def __init__(self, tokenizer: Tokenizer, files: Mapping[str, Path] | None = None):
        # A tokenizer.json may carry a training-time truncation or padding, which would change the text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._files = files  # what it was loaded from: copied by save(), so that the fingerprint stays
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def train(cls, texts: Iterable[str], size: int, *, progress: bool = False) -> TextTokenizer:
        """Byte-level BPE of at most `size` ids (fewer when the texts hold too few pairs).

        Raises ValueError for a size below 256, the number of bytes.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if size < 256:
            raise UserError(f"text: size {size} is below 256; every byte needs an id")
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
        """From a tokenizer.json, a model's folder, or "hf://owner/name" of the Hugging Face hub. Raises ValueError."""
        path = hub_folder(path) if isinstance(path, str) and path.startswith(HUB) else Path(path)
        files = cls.files(path)
        if list(files) == [FILE_NAME]:
            from tokenizers import Tokenizer

            file = files[FILE_NAME]
            try:
                return cls(Tokenizer.from_file(str(file)), files)
            except Exception as error:  # the Rust side raises plain Exception
                raise UserError(f"{file}: not a Hugging Face tokenizer.json: {error}") from error
        from transformers import AutoTokenizer

        try:
            fast = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # ImportError, KeyError and more
            raise UserError(f"{path}: Transformers finds no tokenizer in {', '.join(files)}: {error}") from error
        if not getattr(fast, "is_fast", False):
            raise UserError(f"{path}: {type(fast).__name__} has no fast form; save it elsewhere as tokenizer.json")
        return cls(fast.backend_tokenizer, files)

    @staticmethod
    def files(path: str | Path) -> dict[str, Path]:
        """Name -> file of everything the tokenizer is made of. Raises ValueError when one is missing."""
        path = Path(path)
        if path.is_file():
            return {FILE_NAME: path}
        if (path / FILE_NAME).is_file():
            return {FILE_NAME: path / FILE_NAME}
        found = {name: path / name for name in (*_VOCABULARIES, *_BESIDE) if (path / name).is_file()}
        if not any(name in found for name in _VOCABULARIES):
            raise UserError(f"{path}: no {FILE_NAME} there, nor {', '.join(_VOCABULARIES)}")
        return found

    @classmethod
    def stored_size(cls, path: str | Path) -> int:
        """Number of ids of a stored tokenizer."""
        return cls.load(path).size

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._files is None:
            self._tokenizer.save(str(directory / FILE_NAME))
        for name, file in (self._files or {}).items():
            if file.resolve() != (directory / name).resolve():
                shutil.copyfile(file, directory / name)

    def fingerprint(self) -> str:
        """16 hex digits; the same after save and load, and on every machine."""
        if self._files is not None:
            return fingerprint_files(self.kind, self._files)
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
                raise UserError(f"text is not valid Unicode: {error}") from error
        encodings = self._tokenizer.encode_batch(list(values), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; bytes that are no valid UTF-8 become U+FFFD. What `encode` made comes back exactly where the
        tokenizer itself loses nothing: byte-level ones do not, Llama's turns a written "▁" into a space."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def bytes_of_id(self) -> np.ndarray:
        """(size,) int64: UTF-8 bytes of the text that each id stands for, 0 for special ones and for ids that no token
        has. Their sum over a text's ids is its length where the tokenizer loses nothing; one that puts a space before
        the text, as Llama's does, counts that too."""
        described = json.loads(self._tokenizer.to_str())
        decoders = described["decoder"] or {}
        kinds = [part["type"] for part in decoders.get("decoders", [decoders]) if part]
        special_of_added = {token["id"]: token["special"] for token in described["added_tokens"]}
        anchor = next(iter(self.encode("a")[-1:].tolist()), None)  # some decoders treat what begins a text differently
        sizes = np.zeros(self.size, np.int64)
        for token, id_ in self._tokenizer.get_vocab().items():
            if "ByteFallback" in kinds and _BYTE.fullmatch(token):
                sizes[id_] = 1
            elif id_ in special_of_added:
                sizes[id_] = 0 if special_of_added[id_] else len(token.encode())
            elif "ByteLevel" in kinds:
                sizes[id_] = len(token)  # one character of the byte-level alphabet for each byte
            elif anchor is not None:
                sizes[id_] = len(self.decode([anchor, id_]).encode()) - len(self.decode([anchor]).encode())
        return sizes


def hub_folder(name: str) -> Path:
    """The tokenizer's files of "hf://owner/name" or "hf://owner/name@revision", from the hub or its cache on this
    machine. Raises ValueError where neither has them."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(HUB).partition("@")
    patterns = [FILE_NAME, *_VOCABULARIES, *_BESIDE]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # of the network, of the hub, or of a name that cannot be one
        raise UserError(f"{name}: not to be had from the Hugging Face hub, nor from its cache: {error}") from error
