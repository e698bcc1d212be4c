"""Opens raw files as a token dataset. Each part is tokenized when it is first wanted, by the same code that
tools/tokenize_shards.py uses.

A shard of the dataset is one part of a raw file. The file's headers say how many documents it has, so the order can be
planned. Their lengths are known once the part is tokenized, into a folder of this node that all its processes share and
that grows to the size of the token dataset. Where every document can be read, the bytes are those that
tools/tokenize_shards.py writes for the same parts with one shard each. A document that is left out (empty, too large or
unreadable) keeps its place, where nothing is learned, and is counted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from mom_data.documents.account import is_damage
from mom_data.documents.document import Limits
from mom_data.documents.inputs import check_modalities, files_of_side
from mom_data.documents.json_lines import MAX_CHARACTERS
from mom_data.shards.content import content_of
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import SCHEMA, schema_of
from mom_data.shards.storage import LocalFolder, Stored
from mom_data.shards.tokenize import (
    READER,
    Job,
    Settings,
    index,
    jobs_of,
    names_of,
    tokenize_part,
    tokenizing,
    with_a_document_held_out,
)
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import EXIT_USER_ERROR, UserError, exit_clearly, user_path
from mom_tokenizers.media.pictures import MAX_PIXELS

log = logging.getLogger(__name__)

LIMITS = Limits(pixels=MAX_PIXELS, seconds=7200, characters=MAX_CHARACTERS)  # the same as in tokenize_shards


class OnlineDataset(TokenDataset):
    """Raw files, named by paths, globs or folders, that can be read like a folder of token shards.

    At most `processes` processes of the node tokenize at the same time, on `device`. Split, dropped modalities and
    limits have the same meaning as in tokenize_shards. The counts of tokens in `manifest` are NaN, because they are
    unknown. Raises UserError where inputs or tokenizers are missing or damaged.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        tokenizers: Path,
        cache: Path,
        shards: str = "*",
        *,
        part_bytes: int = 64 << 20,
        split: str | None = None,
        holdout: float = 0.03,
        drop: tuple[str, ...] = (),
        limits: Limits = LIMITS,
        processes: int = 2,
        device: str = "cpu",
    ):
        described = Tokenizers.load(tokenizers).describe()
        files, split = files_of_side(inputs, split)
        sources = [path.absolute() for path in files]
        names = names_of(sources)
        settings = Settings(
            tokenizers.absolute(), described, part_bytes, None, split, holdout, drop, limits, keep_empty=True
        )
        self.location = ", ".join(map(str, inputs))
        bar = tqdm(sources, desc="read raw files", unit="file", mininterval=0.5 if sys.stderr.isatty() else 10)
        contents = [content_of(source, cache.absolute() / "raw-files") for source in bar]
        # The headers decide which document is held out at least, and so which tokens the dataset has.
        headers = cache.absolute() / f"headers-{_fingerprint(names, sources, contents, settings)}"
        bar = tqdm(sources, desc="read headers", unit="file", mininterval=0.5 if sys.stderr.isatty() else 10)
        found = [index(source, name, settings, headers) for source, name in zip(bar, names, strict=True)]
        check_modalities(sources, tokenizers, described, drop)
        held_out = with_a_document_held_out(settings, found)
        if held_out != settings:
            settings = held_out
            found = [index(source, name, settings, headers) for source, name in zip(sources, names, strict=True)]
        self.fingerprint = _fingerprint(names, sources, contents, settings)
        folder = cache.absolute() / f"tokens-{self.fingerprint}"
        jobs = {
            f"{job.name}-00000.tar": job
            for job in jobs_of(sources, names, [one.parts for one in found], settings, folder)
            if job.part.wanted and fnmatch(f"{job.name}-00000.tar", shards)
        }
        if not jobs:
            raise UserError(f"{self.location}: no document in the shards that match {shards!r}")
        self.modalities = list(described)
        self.tokenizers = described
        self.token_dtype = np.dtype(settings.token_dtype).newbyteorder("<")
        self._latent_width = max(int(t.get("patch_width", 0)) for t in described.values())
        self.shards = [{"name": name, "documents": job.part.wanted} for name, job in jobs.items()]
        self.manifest = {
            "schema": schema_of(described),
            "modalities": self.modalities,
            "tokenizers": self.tokenizers,
            "token_bytes": self.token_dtype.itemsize,
            "latent_width": self._latent_width,
            "documents": sum(job.part.wanted for job in jobs.values()),
            "tokens": dict.fromkeys(self.modalities, math.nan),
            "skipped": {},
            "shards": self.shards,
        }
        self._folder = OnlineFolder(folder, jobs, processes, device)
        self._tars = [Stored(name, "", None) for name in jobs]
        self._index_files = self._tars
        self._forget_process()

    def skipped(self, shard: int) -> list[dict[str, Any]]:
        """The key, number and reason of each document of the shard that is left out. Waits until it is tokenized."""
        folder: Any = self._folder
        return folder.record(self.shards[shard]["name"])["skipped"]

    def _counts(self, shard: int) -> tuple[int, Mapping[str, int]]:
        # The plan relies on the number of documents from the headers. The record says how many tokens they have.
        folder: Any = self._folder
        record = self.shards[shard]
        return record["documents"], folder.record(record["name"])["shards"][0]["tokens"]

    def left_out(self, shard: int, document: int) -> tuple[str, bool] | None:
        folder: Any = self._folder
        reason = folder.reasons(self.shards[shard]["name"]).get(document)
        return None if reason is None else (reason, is_damage(reason))

    def values(
        self, shard: int, document: int, whole: tuple[int, int], tokens: tuple[int, int], latents: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        # A document without any token was left out when it was tokenized.
        return None if whole == (0, 0) else super().values(shard, document, whole, tokens, latents)


class OnlineFolder(LocalFolder):
    """The folder of this node into which parts are tokenized, each when one of its files is first wanted."""

    def __init__(self, folder: Path, jobs: dict[str, Job], processes: int, device: str):
        super().__init__(folder)
        self._jobs, self._processes, self._device = jobs, processes, device
        self._records: dict[str, dict[str, Any]] = {}
        self._wanted: tuple[int, queue.SimpleQueue[str], set[str]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_wanted": None}

    def record(self, name: str) -> dict[str, Any]:
        """The record of a shard, which is tokenized now where it was not before. Raises UserError for what the user can
        mend, such as a damaged file or a full disk, and RuntimeError with the other process's traceback for anything
        else."""
        if name not in self._records:
            job = self._jobs[name]
            record = job.finished()
            if record is None:
                record = self._make(job)
                if skipped := record["skipped"]:
                    counts = Counter(entry["reason"].partition(":")[0] for entry in skipped)
                    first = next((e for e in skipped if is_damage(e["reason"])), skipped[0])
                    log.warning(
                        "%s: %d of %d documents are left out (%s), as %s: %s", job.name, len(skipped), job.part.wanted,
                        ", ".join(f"{n} {reason}" for reason, n in counts.most_common()), first["key"], first["reason"],
                    )  # fmt: skip
            self._records[name] = record
        return self._records[name]

    @functools.lru_cache(maxsize=64)  # noqa: B019  # a folder lives as long as its process
    def reasons(self, name: str) -> dict[int, str]:
        """Maps the number of each document of a shard that was left out to the reason."""
        return {entry["number"]: entry["reason"] for entry in self.record(name)["skipped"]}

    def _make(self, job: Job) -> dict[str, Any]:
        # Tokenizing runs in a process of its own, because a loader's worker may not fork, use a GPU or load a model.
        task = pickle.dumps((job, self._processes, self._device))
        made = subprocess.run(
            [sys.executable, "-m", "mom_data.shards.online"], input=task, capture_output=True, check=False
        )
        record = job.finished()
        if record is None:
            said = made.stderr.decode(errors="replace").strip() or f"exit code {made.returncode}"
            if made.returncode == EXIT_USER_ERROR:
                raise UserError(f"{job.source} could not be tokenized: {said.splitlines()[-1]}")
            raise RuntimeError(f"{job.source} could not be tokenized:\n{said}")
        return record

    def checked(self, file: Stored) -> bytes:
        shard = self.record(file.name)["shards"][0]
        return super().checked(Stored(f"{file.name.removesuffix('.tar')}.idx", shard["index_sha256"], None))

    def open(self, file: Stored) -> int:
        self.record(file.name)
        return super().open(file)

    def prefetch(self, file: Stored) -> None:
        """Tokenize in the background, one shard after another. Errors are raised only when the shard is opened."""
        if self._wanted is None or self._wanted[0] != os.getpid():
            self._wanted = os.getpid(), queue.SimpleQueue(), set()
            threading.Thread(target=self._make_wanted, args=self._wanted[1:], daemon=True).start()
        _, wanted, names = self._wanted
        if file.name not in names and file.name not in self._records:
            names.add(file.name)
            wanted.put(file.name)

    def _make_wanted(self, wanted: queue.SimpleQueue[str], names: set[str]) -> None:
        while True:
            name = wanted.get()
            with contextlib.suppress(Exception):
                self.record(name)
            names.discard(name)


def _fingerprint(names: Sequence[str], sources: Sequence[Path], contents: Sequence[str], settings: Settings) -> str:
    """16 hexadecimal digits that identify everything which decides the tokens, including the contents of the files."""
    made_by = {m: t["fingerprint"] for m, t in settings.described.items()}
    identity = [SCHEMA, READER, made_by, settings.part_bytes, settings.split, settings.holdout, sorted(settings.drop)]
    identity += [settings.least] if settings.least is not None else []
    identity += [{m: t["shapes"]} for m, t in settings.described.items() if "shapes" in t]
    limits = settings.limits
    identity += [[limits.pixels, limits.seconds, limits.characters]]
    # The name of a file is part of the keys of documents that have no key of their own.
    identity += [[name, source.name, sha] for name, source, sha in zip(names, sources, contents, strict=True)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _slot(folder: Path, processes: int) -> FileLock:
    """The lock of one of the node's `processes` places for a process that tokenizes. Waits until a place is free."""
    while True:
        for k in range(processes):
            lock = FileLock(folder / f".slot-{k}.lock", timeout=0)
            with contextlib.suppress(Timeout):
                lock.acquire()
                return lock
        time.sleep(0.1)


def main() -> None:
    """Tokenize the part that standard input names; the parent process wrote it there."""
    # Unpickling can run code. What is read here was pickled by the parent (`_make`) a moment ago and comes by a pipe of
    # its own, without a file or a network between.
    job, processes, device = pickle.loads(sys.stdin.buffer.read())
    held = []

    def load() -> Tokenizers:
        held.append(_slot(job.output, processes))
        return tokenizing(job.settings.tokenizers, device)

    with exit_clearly(), user_path(job.output):
        tokenize_part(job, load)


if __name__ == "__main__":
    main()
