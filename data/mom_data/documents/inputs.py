"""The input files of a command: which files it means, which of their documents are held out for validation, and which
modalities their first documents have."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mom_data.documents.account import OTHER_SIDE, Account
from mom_data.documents.document import Document, documents_at_the_head, expand_inputs
from mom_data.documents.raw_files import READ_SUFFIXES
from mom_tokenizers.errors import UserError

_SIDES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_SIDE_OF_FILE = re.compile(rf"({'|'.join(_SIDES)})([-_.]\S*)?({'|'.join(map(re.escape, READ_SUFFIXES))})")
_HASHES = 1 << 64
_SAMPLED_FILES, _SAMPLED_DOCUMENTS, _SAMPLING_SECONDS = 64, 32, 20.0


def files_of_side(
    patterns: Sequence[str], split: str | None, account: Account | None = None
) -> tuple[list[Path], str | None]:
    """(the files that paths, globs and folders name, the split that is still to be made by document keys or None).

    Files that stand in train/ and val/ of one folder, or are called train-... and val-..., are split already, so the
    files of the wanted side are taken whole. Raises UserError where a pattern matches nothing, where such files are
    named without saying which side is meant, or where only some of them belong to a side.
    """
    files = expand_inputs(list(patterns), account)
    placed = _divided(files)
    if not placed:
        return files, split
    sides: dict[Path, set[str]] = {}
    for folder, side in placed.values():
        sides.setdefault(folder, set()).add(side)
    of_side = {file: placed[file][1] if file in placed else None for file in files}
    named = ", ".join(f"{folder}/ holds {' and '.join(sorted(names))}" for folder, names in sorted(sides.items()))
    if split is None:
        raise UserError(f"{named}: documents are held out there already. Say --split train or --split val, or name the "
                        "files of one side alone.")  # fmt: skip
    others = sorted(file for file, side in of_side.items() if side not in ("train", "val"))
    chosen = [file for file, side in of_side.items() if side == split]
    if others or not chosen:
        why = f"{others[0]} belongs to neither side" if others else f"nothing there is {split}"
        raise UserError(f"{named}, but {why}. Name the files of one side alone, without --split.")
    if account is not None:
        account.files = len(chosen)
        for file in sorted(set(files) - set(chosen)):
            account.leave_file(file, OTHER_SIDE)
    return chosen, None


def _divided(files: Sequence[Path]) -> dict[Path, tuple[Path, str]]:
    """Maps each file that belongs to a side to (the folder that is divided into sides, the side). The file's folder
    decides, or else its name. A folder that has only one side is not divided, since it may be called so by chance."""
    placed: dict[Path, tuple[Path, str]] = {}
    for rule in (_side_of_place, _side_of_name):  # inside train/ and val/ the names of files do not count
        found = {file: side for file in files if file not in placed and (side := rule(file)) is not None}
        names: dict[Path, set[str]] = {}
        for folder, name in found.values():
            names.setdefault(folder, set()).add(name)
        placed |= {file: where for file, where in found.items() if len(names[where[0]]) > 1}
    return placed


def _side_of_place(file: Path) -> tuple[Path, str] | None:
    return next(((folder.parent, _SIDES[folder.name]) for folder in file.parents if folder.name in _SIDES), None)


def _side_of_name(file: Path) -> tuple[Path, str] | None:
    match = _SIDE_OF_FILE.fullmatch(file.name)
    return (file.parent, _SIDES[match[1]]) if match else None


@dataclass
class Holdout:
    """A division of documents by the hash of their keys: the given share of them is val, the others are train.

    `least` is the lowest hash of the corpus, where it is known. The documents of that key are val at any share, so
    that even a small corpus has a validation set. Both sides use the same value, so no document is in both or in
    neither.
    """

    share: float
    least: int | None = None
    lowest: int = _HASHES
    """The lowest hash of all keys that `held_out` was called with."""

    def held_out(self, key: str) -> bool:
        """Whether the document with this key is val."""
        value = int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "little")
        self.lowest = min(self.lowest, value)
        return value < self.share * _HASHES or value == self.least


def least_held_out(share: float, lowest: Collection[int]) -> int | None:
    """The value for `Holdout.least` of a corpus whose files have these lowest hashes. None where the share is 0, or
    already takes at least one document."""
    least = min(lowest, default=_HASHES)
    return least if share > 0 and share * _HASHES <= least < _HASHES else None


def modalities_at_the_head(files: Sequence[Path], documents: int = _SAMPLED_DOCUMENTS) -> dict[str, tuple[Path, str]]:
    """Maps each modality to (file, key) of the first document found that has it. Only the first documents of files
    spread over the inputs are read.

    The search stops after some seconds, however slowly the files are read. Damaged files are skipped here, because
    whoever reads them completely reports them.
    """
    found: dict[str, tuple[Path, str]] = {}
    until = time.monotonic() + _SAMPLING_SECONDS
    step = max(1, -(-len(files) // _SAMPLED_FILES))
    for file in files[::step]:
        try:
            for item in islice(documents_at_the_head(file), documents):
                if isinstance(item, Document):
                    for segment in item.segments:
                        found.setdefault(segment.modality, (file, item.key))
        except UserError:
            continue
        if time.monotonic() > until:
            break
    return found


def check_modalities(
    files: Sequence[Path], tokenizers: Path, described: Mapping[str, object], drop: Collection[str] = ()
) -> None:
    """Raise UserError where first documents of the files have a modality that has no tokenizer and is not dropped."""
    found = modalities_at_the_head(files)
    missing = [modality for modality in found if modality not in described and modality not in drop]
    if missing:
        names = " and ".join(missing)
        file, key = found[missing[0]]
        raise UserError(
            f"the inputs hold {names} (document {key} of {file}), for which {tokenizers} has no tokenizer. Either "
            f"leave it out: tokenize_shards.py --drop-modalities {' '.join([*drop, *missing])}. Or make a tokenizer: "
            f"add '{missing[0]}' to the recipe, as configs/demo_tokenizers.yaml has it, run train_tokenizers.py again, "
            "and use the tokenizers.yaml that it writes."
        )
