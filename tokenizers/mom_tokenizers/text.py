"""The text tokenizer. It reads any Hugging Face `tokenizer.json` or a model's folder, or trains a byte-level BPE."""

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
# The files from which Transformers makes a fast tokenizer where there is no tokenizer.json: one of the vocabularies,
# and those of the others that exist.
_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_BESIDE = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")

_BYTE = re.compile("<0x[0-9A-F]{2}>")

# An added token with such a name is a control token even where the file does not call it special: "<eoss>", "[SEP]".
_CONTROL = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
# The names of image codes in Chameleon's vocabulary, and of all tokens that `vocab.chameleon_layout` uses.
_IMAGE_CODE = re.compile(r"IMGIMG[A-J]+Z")
_CHAMELEON = re.compile(r"IMGIMG[A-J]+Z|</?s>|<pad>|<racm3:break>|<eoss>|<reserved\d+>")

CHUNK = 1 << 16
"""How many characters of a long text are encoded at once. The library needs about 100 bytes of memory for each."""
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Known patterns for splitting text. They have no look-behind, and by each of them a word of letters ends at the first
# character of _ENDS, whatever follows.
_PATTERNS = (_GPT2, _GPT2.replace("(?:[sdmt]|ll|ve|re)", "s|'t|'re|'ve|'m|'ll|'d"), _CL100K % "{1,3}", _CL100K % "")
_ENDS = re.compile(r"[ \n.,\u3001\u3002\uff0c]")


class TextTokenizer:
    """Converts text to ids and back, with the Hugging Face library `tokenizers`.

    The name of a control token in a text, such as "</s>", becomes the ids of its characters, never the token's own id.
    Control tokens are those that the file calls special, and added tokens with a name in brackets, such as "<eoss>". In
    a vocabulary with Chameleon's image codes, these codes and the tokens used in its layout are control tokens too.
    """

    kind = "bpe"

    def __init__(self, tokenizer: Tokenizer, files: Mapping[str, Path] | None = None):
        # A tokenizer.json may hold a truncation or padding from training, which would change the text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._files = files  # the files it was loaded from; save() copies them, so that the fingerprint stays the same
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def train(cls, texts: Iterable[str], size: int, *, progress: bool = False) -> TextTokenizer:
        """Train a byte-level BPE with at most `size` ids. It has fewer where the texts hold too few pairs.

        Raises UserError for a size below 256, the number of bytes.
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
        """Load a tokenizer.json, a model's folder, or "hf://owner/name" from the Hugging Face hub. Raises UserError
        where there is no tokenizer that can be read."""
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
        except Exception as error:  # Transformers raises ImportError, KeyError and more
            raise UserError(f"{path}: Transformers finds no tokenizer in {', '.join(files)}: {error}") from error
        if not getattr(fast, "is_fast", False):
            raise UserError(f"{path}: {type(fast).__name__} has no fast form; save it elsewhere as tokenizer.json")
        return cls(fast.backend_tokenizer, files)

    @staticmethod
    def files(path: str | Path) -> dict[str, Path]:
        """The path of every file of the tokenizer by its name. Raises UserError where one is missing."""
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
        """The number of ids of a stored tokenizer. For a tokenizer.json this does not need the library `tokenizers`."""
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
        """16 hexadecimal digits, which are the same after save and load, and on every machine."""
        if self._files is not None:
            return fingerprint_files(self.kind, self._files)
        with TemporaryDirectory() as directory:
            self.save(directory)
            return fingerprint_files(self.kind, self.files(directory))

    def encode(self, value: str) -> np.ndarray:
        """The ids of a text, uint32 (n,), without added special tokens. Raises UserError for lone surrogates, which are
        not valid text."""
        return self.encode_batch([value])[0]

    def encode_batch(self, values: Sequence[str]) -> list[np.ndarray]:
        for value in values:
            try:
                if not value.isascii():
                    value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UserError(f"text is not valid Unicode: {error}") from error
        if len(values) == 1 and len(values[0]) > CHUNK and self._divisible:
            # Keep ids in the smallest type until all are there, because those of a long text take more memory than it.
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
        """The tokenizer that encodes, in which no text can match the name of a control token."""
        return _without_control_tokens(self._tokenizer)

    @cached_property
    def _divisible(self) -> bool:
        return _divisible(json.loads(self._encoder.to_str()))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids. Bytes that are not valid UTF-8 become U+FFFD. The ids that `encode` made give back the exact
        text where the tokenizer itself loses nothing. Byte-level ones lose nothing; Llama's turns "▁" into a space."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def bytes_of_id(self) -> np.ndarray:
        """The number of UTF-8 bytes of the text that each id stands for, int64 (size,). It is 0 for special tokens and
        for ids without a token. The sum over a text's ids is its length in bytes where the tokenizer loses nothing. A
        tokenizer that puts a space before the text, as Llama's does, counts this space too."""
        sizes, undecided = _bytes_by_name(json.loads(self._tokenizer.to_str()), self._tokenizer.get_vocab())
        anchor = next(iter(self.encode("a")[-1:].tolist()), None)  # some decoders treat the first token differently
        if anchor is not None:
            for id_ in undecided:
                sizes[id_] = len(self.decode([anchor, id_]).encode()) - len(self.decode([anchor]).encode())
        return sizes

    @classmethod
    def stored_bytes_of_id(cls, path: str | Path) -> np.ndarray:
        """`bytes_of_id` of a stored tokenizer. It does not need the library `tokenizers` where the names of the tokens
        tell their bytes, as in byte-level tokenizers. Raises ImportError where the library is needed and absent."""
        files = cls.files(path)
        if list(files) == [FILE_NAME]:
            sizes, undecided = _bytes_by_name(read_json(files[FILE_NAME]), read_vocabulary(files[FILE_NAME]))
            if not undecided:
                return sizes
        return cls.load(path).bytes_of_id()


def _bytes_by_name(described: Mapping[str, Any], vocabulary: Mapping[str, int]) -> tuple[np.ndarray, list[int]]:
    """(the number of bytes of each id of a tokenizer.json, int64 (size,), where the name of its token tells it; the ids
    whose bytes only its decoder knows)."""
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
            sizes[id_] = len(token)  # the byte-level alphabet has one character for each byte
        else:
            undecided.append(id_)
    return sizes, undecided


def _without_control_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer with the same ids, whose control tokens have names that no text can contain."""
    from tokenizers import Tokenizer

    described = json.loads(tokenizer.to_str())
    model, added = described["model"], described["added_tokens"]
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    control = {t["content"] for t in added if t["special"] or _CONTROL.fullmatch(t["content"])}
    if any(map(_IMAGE_CODE.fullmatch, vocabulary)):
        control |= {name for name in vocabulary if _CHAMELEON.fullmatch(name)}
    unknown = model.get("unk_token")  # keeps its name, by which the model looks it up; its id means "unknown" anyway
    if model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    control.discard(unknown)
    # The secret is drawn again in every process, so that nobody can write such a name into a document.
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
    described["post_processor"] = None  # it would add control tokens or move offsets; neither is wanted here
    try:
        encoder = Tokenizer.from_str(json.dumps(described))
    except Exception as error:  # the Rust side raises plain Exception
        raise UserError(f"the tokenizer's control tokens cannot be kept out of texts: {error}") from error
    if encoder.get_vocab() != {renamed.get(token, token): id_ for token, id_ in vocabulary.items()}:
        raise UserError("the tokenizer's control tokens cannot be kept out of texts: other tokens' ids depend on them")
    encoder.encode_special_tokens = True  # this concerns only the unknown token, which has kept its name
    return encoder


def _divisible(described: Mapping[str, Any]) -> bool:
    """Whether a text may be encoded in `_chunks`, because its ids are always those of its chunks one after another.

    This holds for a byte-level BPE that splits texts by one of `_PATTERNS`. Such a pattern is matched again and again,
    each time from where the last match ended. A match that ends with a letter before a character of `_ENDS` has taken
    all letters that stand there and looks no further, and the next match begins at that character. So the matches on
    either side do not depend on the other side.
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
    added = described["added_tokens"]  # the library searches for these before it splits the text
    return not any(t["lstrip"] or t["rstrip"] or any(_ends_word(t["content"], i) for i in range(1, len(t["content"])))
                   for t in added)  # fmt: skip


def _ends_word(text: str, at: int) -> bool:
    """Whether the character before `at` is a letter and the one at `at` belongs to `_ENDS`. Only letters of Unicode 3.2
    count, because not every library knows newer ones."""
    return bool(_ENDS.match(text, at)) and unicodedata.ucd_3_2_0.category(text[at - 1])[0] == "L"


def _chunks(text: str) -> Iterator[str]:
    """Pieces of at least CHUNK characters. Each but the last ends with a letter before a character of `_ENDS`."""
    start = 0
    while start < len(text):
        found = _ENDS.finditer(text, start + CHUNK)
        end = next((m.start() for m in found if _ends_word(text, m.start())), len(text))
        yield text[start:end]
        start = end


def hub_folder(name: str) -> Path:
    """The folder with the tokenizer's files of "hf://owner/name" or "hf://owner/name@revision", from the hub or its
    cache on this machine. Raises UserError where neither has them."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(HUB).partition("@")
    patterns = [FILE_NAME, *_VOCABULARIES, *_BESIDE]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # errors of the network, of the hub, or of a malformed name
        raise UserError(f"{name}: not to be had from the Hugging Face hub, nor from its cache: {error}") from error
