"""The sections of a config that say what is trained on, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)

from mom_tokenizers.errors import UserError
from mom_train.config.section import Name, Section


class SourceConfig(Section):
    path: Name | None = None
    """A folder of token shards, as tools/tokenize_shards.py writes it (holds manifest.json): here, or at http(s)://,
    s3:// or another URL that fsspec knows."""
    raw: tuple[Name, ...] = ()
    """Instead of `path`: raw documents (files, folders, globs), tokenized by the run's `tokenizers` as they are first
    wanted, into data.cache. To try a corpus out; what is trained on for long is better tokenized once."""
    split: Literal["train", "val"] | None = None
    """Of `raw`: one side of a hold-out of documents by their keys, as tokenize_shards --split."""
    holdout: float = Field(default=0.03, ge=0, le=1)
    """Share of documents that is `val`."""
    weight: float = Field(1.0, gt=0)
    """Share of the tokens drawn from this source, relative to the other sources' weights."""
    shards: Name = "*"
    """Only the shards whose name matches this glob."""

    @model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        if (self.path is None) == (not self.raw):
            raise UserError("say where it is: either `path`, token shards, or `raw`, documents to tokenize online")
        if self.split is not None and not self.raw:
            raise UserError("split: only of `raw` documents; token shards were divided when they were made")
        if self.split is not None and not 0 < self.holdout < 1:
            raise UserError(f"holdout={self.holdout} leaves one side of the split empty: above 0 and below 1")
        return self


class DataConfig(Section):
    train: tuple[SourceConfig, ...]
    """What to train on."""
    validation: dict[str, tuple[SourceConfig, ...]] = Field(default_factory=dict)
    """Named validation sets: losses are logged as val/<name>/loss/<modality>."""
    sequence_length: int = Field(ge=2)
    """L, positions in a packed row."""
    lanes: PositiveInt = 16
    """Lanes that the order is dealt from: sequence i is the next one of lane i mod lanes. Part of the order: do not
    change it mid-run."""
    pack_window: PositiveInt = 2048
    """Pieces of documents packed together. Part of the order, as the next three are."""
    packing: Literal["best_fit", "concatenate"] = "best_fit"
    """How: best fit first, text split to fill gaps; or one after another, cut where a row ends."""
    cut_spans: bool = False
    """Whether codes of a picture and units of speech may be cut between rows. Latents never are."""
    shuffle_units: PositiveInt = 16
    """Shards, or parts of them, whose documents a lane shuffles together."""
    new_phase: bool = False
    """Carry a run on with other sources, weights or packing than its checkpoint's: from there on the new ones hold,
    every source goes on from where it was, and the checkpoint keeps the list of phases."""
    workers: int = Field(1, ge=0)
    """Loader processes per rank; 0 reads in the training process. Not part of the order."""
    cache: Path | None = None
    """Node-local folder for shards of remote sources, shared by the node's processes; by default
    $TMPDIR/mom-cache-UID."""
    cache_gib: float = Field(32.0, gt=0)
    """Most GiB the cache may hold. At least room for the shards that a node reads at a time and those it fetches ahead
    (2 x lanes of its ranks x sources), or they are fetched again and again."""
    corrupt_share: float = Field(default=0.0, ge=0, le=1)
    """Share of tokens routed as another modality than their own, in training and validation: an experiment on how
    much the modality mask matters."""
    max_bad_fraction: float = Field(1e-3, ge=0, le=1)
    """Documents of token shards that fail their checksum are masked and counted; past this share of those read, the run
    stops."""
    max_unreadable_fraction: float = Field(0.05, ge=0, le=1)
    """Documents of `raw` that cannot be read are left out and counted; past this share of those read, the run stops.
    One that is empty, or too large, is left out too, and does not count here."""
