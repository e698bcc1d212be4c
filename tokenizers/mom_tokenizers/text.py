"""Text tokens: any Hugging Face `tokenizer.json`, or a model's folder; a byte-level BPE can be trained here."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from mom_tokenizers.base import fingerprint_files, read_json
from mom_tokenizers.errors import UserError
from mom_tokenizers.vocab import read_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE_NAME = "tokenizer.json"
HUB = "hf://"
# What Transformers makes a fast tokenizer from, where there is no tokenizer.json: one of the first, and the rest.
_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_BESIDE = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")

_BYTE = re.compile("<0x[0-9A-F]{2}>")

# An added token of such a name is a control token, also where the file does not call it special: "<eoss>", "[SEP]".
_CONTROL = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
# The names that Chameleon's vocabulary has for image codes, and for what gets a role in a layout made from it.
_IMAGE_CODE = re.compile(r"IMGIMG[A-J]+Z")
_CHAMELEON = re.compile(r"IMGIMG[A-J]+Z|</?s>|<pad>|<racm3:break>|<eoss>|<reserved\d+>")

CHUNK = 1 << 16
"""Characters of a long text that are encoded at once. The library takes some 100 bytes for each of them."""
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Patterns without look-behind, by which a word of letters ends at the first character of _ENDS, whatever follows.
_PATTERNS = (_GPT2, _GPT2.replace("(?:[sdmt]|ll|ve|re)", "s|'t|'re|'ve|'m|'ll|'d"), _CL100K % "{1,3}", _CL100K % "")
_ENDS = re.compile(r"[ \n.,\u3001\u3002\uff0c]")


class TextTokenizer:
    """Text <-> ids, over Hugging Face `tokenizers`.

    The text of a control token, such as "</s>" in a document, becomes the ids of its characters, never the token's own
    id. Control tokens are those that the file calls special, and added ones with a name in brackets, such as
    "<eoss>"; in a vocabulary with Chameleon's image codes, also these codes and the tokens that get a role there.
    """

    kind = "bpe"

    def __init__(self, tokenizer: Tokenizer, files: Mapping[str, Path] | None = None):
        # A tokenizer.json may carry a training-time truncation or padding, which would change the text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
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
        """Number of ids of a stored tokenizer; of a tokenizer.json without the library `tokenizers`."""
        files = cls.files(path)
        if list(files) == [FILE_NAME]:
            return 1 + max(read_vocabulary(files[FILE_NAME]).values())
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
                if not value.isascii():
                    value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(f"text is not valid Unicode: {error}") from error
        if len(values) == 1 and len(values[0]) > CHUNK and self._divisible:
            # The smallest type until all ids are there: a long text's ids outweigh its characters.
            kept = np.uint16 if self.size <= 1 << 16 else np.uint32
            return [np.concatenate([self._encode(c).astype(kept) for c in _chunks(values[0])], dtype=np.uint32)]
        if len(values) > 1:
            encodings = self._encoder.encode_batch_fast(list(values), add_special_tokens=False)
            return [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return [self._encode(value) for value in values]

    def _encode(self, text: str) -> np.ndarray:
        [encoding] = self._encoder.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, np.uint32)

    @cached_property
    def _encoder(self) -> Tokenizer:
        """What encodes: the tokenizer, in which no text can match the name of a control token."""
        return _without_control_tokens(self._tokenizer)

    @cached_property
    def _divisible(self) -> bool:
        return _divisible(json.loads(self._encoder.to_str()))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; bytes that are no valid UTF-8 become U+FFFD. What `encode` made comes back exactly where the
        tokenizer itself loses nothing: byte-level ones do not, Llama's turns a written "▁" into a space."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def bytes_of_id(self) -> np.ndarray:
        """(size,) int64: UTF-8 bytes of the text that each id stands for, 0 for special ones and for ids that no token
        has. Their sum over a text's ids is its length where the tokenizer loses nothing; one that puts a space before
        the text, as Llama's does, counts that too."""
        sizes, undecided = _bytes_by_name(json.loads(self._tokenizer.to_str()), self._tokenizer.get_vocab())
        anchor = next(iter(self.encode("a")[-1:].tolist()), None)  # some decoders treat what begins a text differently
        if anchor is not None:
            for id_ in undecided:
                sizes[id_] = len(self.decode([anchor, id_]).encode()) - len(self.decode([anchor]).encode())
        return sizes

    @classmethod
    def stored_bytes_of_id(cls, path: str | Path) -> np.ndarray:
        """`bytes_of_id` of a stored tokenizer, without the library `tokenizers` where the names of the tokens say it,
        as those of every byte-level one do. Raises ImportError where the library is needed and absent."""
        files = cls.files(path)
        if list(files) == [FILE_NAME]:
            sizes, undecided = _bytes_by_name(read_json(files[FILE_NAME]), read_vocabulary(files[FILE_NAME]))
            if not undecided:
                return sizes
        return cls.load(path).bytes_of_id()


def _bytes_by_name(described: Mapping[str, Any], vocabulary: Mapping[str, int]) -> tuple[np.ndarray, list[int]]:
    """(size,) int64: bytes of each id of a tokenizer.json, as far as the names of its tokens say it; and the ids whose
    bytes only its decoder knows."""
    decoders = described.get("decoder") or {}
    kinds = [part["type"] for part in decoders.get("decoders", [decoders]) if part]
    special_of_added = {token["id"]: token["special"] for token in described.get("added_tokens") or ()}
    sizes = np.zeros(1 + max(vocabulary.values()), np.int64)
    undecided = []
    for token, id_ in vocabulary.items():
        if "ByteFallback" in kinds and _BYTE.fullmatch(token):
            sizes[id_] = 1
        elif id_ in special_of_added:
            sizes[id_] = 0 if special_of_added[id_] else len(token.encode())
        elif "ByteLevel" in kinds:
            sizes[id_] = len(token)  # one character of the byte-level alphabet for each byte
        else:
            undecided.append(id_)
    return sizes, undecided


def _without_control_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer with the same ids, whose control tokens bear names that no text can hold."""
    from tokenizers import Tokenizer

    described = json.loads(tokenizer.to_str())
    model, added = described["model"], described["added_tokens"]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    control = {t["content"] for t in added if t["special"] or _CONTROL.fullmatch(t["content"])}
    if any(map(_IMAGE_CODE.fullmatch, vocabulary)):
        control |= {name for name in vocabulary if _CHAMELEON.fullmatch(name)}
    unknown = model.get("unk_token")  # the model looks it up by name; its id means "unknown" wherever it stands
    if model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    control.discard(unknown)
    # drawn anew in every process: nobody can write such a name into a document
    secret = secrets.token_hex(16)
    renamed = {name: f"\U0010ffff{secret}.{number}" for number, name in enumerate(sorted(control))}
    for token in added:
        if token["content"] in renamed:
            token.update(content=renamed[token["content"]], special=False)
    tokens = model["vocab"]
    if isinstance(tokens, list):  # Unigram: [token, log probability], in the order of ids
        model["vocab"] = [[renamed.get(token, token), score] for token, score in tokens]
    else:
        model["vocab"] = {renamed.get(token, token): id_ for token, id_ in tokens.items()}
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = ((pair, pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"])
        model["merges"] = [pair for pair, (a, b) in pairs if control.isdisjoint((a, b, a + b[prefix:]))]
    described["post_processor"] = None  # adds control tokens, or moves offsets: neither is asked for
    try:
        encoder = Tokenizer.from_str(json.dumps(described))
    except Exception as error:  # the Rust side raises plain Exception
        raise UserError(f"the tokenizer's control tokens cannot be kept out of texts: {error}") from error
    if encoder.get_vocab() != {renamed.get(token, token): id_ for token, id_ in vocabulary.items()}:
        raise UserError("the tokenizer's control tokens cannot be kept out of texts: other tokens' ids depend on them")
    encoder.encode_special_tokens = True  # of what bears its name still: the unknown token
    return encoder


def _divisible(described: Mapping[str, Any]) -> bool:
    """Whether a text may be encoded in `_chunks`: where the ids of a text are those of its chunks, one after another.

    It holds for a byte-level BPE that cuts texts by one of `_PATTERNS`. Such a pattern is matched again and again from
    where the last match ended. A match that ends in a letter, before a character of `_ENDS`, has taken all letters that
    stand there and looks no further; the next one begins at that character. So neither side knows of the other.
    """
    before, normalizer = described["pre_tokenizer"] or {}, described["normalizer"] or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    byte_level = steps[-1]
    if byte_level.get("type") != "ByteLevel" or byte_level["add_prefix_space"] or len(steps) > 2:
        return False
    if len(steps) == 2:
        split = steps[0]
        known = split.get("type") == "Split" and split["pattern"].get("Regex") in _PATTERNS and not split["invert"]
        if not known or split["behavior"] != "Isolated" or byte_level["use_regex"]:
            return False
    elif not byte_level["use_regex"]:
        return False
    if described["model"]["type"] != "BPE" or described["model"].get("dropout"):
        return False
    if normalizer and normalizer["type"] != "NFC":  # no character of _ENDS joins the one before it
        return False
    added = described["added_tokens"]  # these are looked for before anything is cut
    return not any(t["lstrip"] or t["rstrip"] or any(_ends_word(t["content"], i) for i in range(1, len(t["content"])))
                   for t in added)  # fmt: skip


def _ends_word(text: str, at: int) -> bool:
    """Whether a letter ends at `at`. Of Unicode 3.2's letters: newer ones are not letters to every library."""
    return bool(_ENDS.match(text, at)) and unicodedata.ucd_3_2_0.category(text[at - 1])[0] == "L"


def _chunks(text: str) -> Iterator[str]:
    """Pieces of about CHUNK characters, each but the last ending with a letter before a character of `_ENDS`."""
    start = 0
    while start < len(text):
        found = _ENDS.finditer(text, start + CHUNK)
        end = next((m.start() for m in found if _ends_word(text, m.start())), len(text))
        yield text[start:end]
        start = end


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
