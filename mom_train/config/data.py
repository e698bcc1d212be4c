"""The sections of a config that say what data a run is trained on, and in which order."""

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
    """One source of documents: either token shards (`path`) or documents that are tokenized online (`raw`)."""

    path: Name | None = None
    """A folder of token shards that tools/tokenize_shards.py wrote (it holds manifest.json). It is a local path, or an
    http(s)://, s3:// or other URL that fsspec can read."""
    raw: tuple[Name, ...] = ()
    """Files, folders or globs of raw documents, given instead of `path`. The run's `tokenizers` tokenize a document
    when it is first needed and keep the result in data.cache. This is meant for trying a corpus out; tokenize a corpus
    beforehand if you train on it for long."""
    split: Literal["train", "val"] | None = None
    """Take only the training or only the validation documents of `raw`. The key of a document decides which side it
    is on, in the same way as in tokenize_shards --split. null takes all documents."""
    holdout: float = Field(default=0.03, ge=0, le=1)
    """Share of the documents of `raw` that `split` assigns to `val`."""
    weight: float = Field(1.0, gt=0)
    """Share of the tokens that are drawn from this source, relative to the weights of the other sources."""
    shards: Name = "*"
    """Use only the shards whose names match this glob."""

    @model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        if (self.path is None) == (not self.raw):
            raise UserError("say where it is: either `path` (token shards) or `raw` (documents to tokenize online)")
        if self.split is not None and not self.raw:
            raise UserError("split: only of `raw` documents; token shards were divided when they were made")
        if self.split is not None and not 0 < self.holdout < 1:
            raise UserError(f"holdout={self.holdout} leaves one side empty: choose a share above 0 and below 1")
        return self


class DataConfig(Section):
    """What the run reads, and how documents are packed into rows."""

    train: tuple[SourceConfig, ...]
    """The sources to train on."""
    validation: dict[str, tuple[SourceConfig, ...]] = Field(default={})
    """Validation sets by name. The losses of each are logged as val/<name>/loss/<modality>."""
    sequence_length: int = Field(ge=2)
    """L, the number of positions in a packed row."""
    lanes: PositiveInt = 16
    """Number of independent streams of rows that the training order takes turns between: sequence i is the next row of
    lane i mod lanes. It is part of the order, so do not change it during a run."""
    pack_window: PositiveInt = 2048
    """Number of pieces of documents that are packed into rows together. This key and the next three are part of the
    order."""
    packing: Literal["best_fit", "concatenate"] = "best_fit"
    """How documents are packed into rows. `best_fit` puts each piece where it leaves the least room and splits text to
    fill gaps; `concatenate` puts documents one after another and cuts them where a row ends."""
    cut_spans: bool = False
    """Whether the codes of a picture and the units of speech may be divided between two rows. Latents never are."""
    shuffle_units: PositiveInt = 16
    """Number of shards, or of parts of large shards, whose documents a lane shuffles together."""
    new_phase: bool = False
    """Continue a run with other sources, weights or packing than its checkpoint has. The new ones apply from that
    checkpoint on, every source continues where it was, and the checkpoint keeps the list of phases."""
    workers: int = Field(1, ge=0)
    """Number of loader processes per rank; with 0 the training process itself reads. It is not part of the order."""
    cache: Path | None = None
    """Folder on the node's own disk that holds shards of remote sources and is shared by the node's processes. null
    stands for $TMPDIR/mom-cache-UID."""
    cache_gib: float = Field(32.0, gt=0)
    """Largest size of the cache in GiB. It must have room for the shards that a node reads at the same time and those
    that it fetches ahead (2 x lanes of its ranks x sources); otherwise shards are fetched again and again."""
    corrupt_share: float = Field(default=0.0, ge=0, le=1)
    """Share of tokens that are routed as a modality other than their own, in training and in validation. It serves
    experiments on how much the modality mask matters."""
    max_bad_fraction: float = Field(1e-3, ge=0, le=1)
    """Documents of token shards whose checksum is wrong are masked and counted. The run stops when they exceed this
    share of the documents read."""
    max_unreadable_fraction: float = Field(0.05, ge=0, le=1)
    """Documents of `raw` that cannot be read are left out and counted. The run stops when they exceed this share of the
    documents read. Documents that are empty or too large are left out too, but are not counted here."""
