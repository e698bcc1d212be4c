"""What all ranks agree on before a step: how much they hold, and whether one of them wants to stop or to save.

One all-reduce carries all of it, so that agreeing costs one message a step, whatever is agreed on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from mom_data.batches.batch import PackedBatch
from mom_tokenizers.errors import AgreedError
from mom_train.config.data import DataConfig
from mom_train.model.objective import Counts

log = logging.getLogger(__name__)


@dataclass
class StepCount:
    """Sums over one step's batches and, once `over_all_ranks` was called, over the ranks."""

    targets_M: Tensor
    """Targets of the cross-entropy by modality, int64 on the CPU."""
    tokens_M: Tensor
    """Input tokens by modality, padding left out, int64 on the CPU."""
    patches: int = 0
    """Latent patches."""
    documents_read: int = 0
    documents_damaged: int = 0
    """Documents of token shards that are masked, because their bytes are not what their checksum says."""
    documents_unreadable: int = 0
    """Raw documents that could not be read."""
    documents_left_out: int = 0
    """Raw documents that are empty or too large."""
    wants_to_save: int = 0
    """Ranks whose clock says that a checkpoint is due."""
    saves_finished: int = 0
    """Ranks whose part of the last checkpoint is written."""
    wants_to_stop: int = 0
    """Ranks that were asked to end."""
    wants_profile: int = 0
    """Ranks that were asked for a profile of the next steps."""
    wants_snapshot: int = 0
    """Ranks that were asked for a snapshot of the memory."""

    @classmethod
    def empty(cls, modalities: int) -> StepCount:
        return cls(torch.zeros(modalities, dtype=torch.int64), torch.zeros(modalities, dtype=torch.int64))

    def add(self, batch: PackedBatch, targets_M: Tensor) -> None:
        self.targets_M += targets_M
        self.tokens_M += batch.real_tokens
        self.patches += len(batch.latent_position)
        self.documents_read += batch.documents_read
        self.documents_damaged += batch.documents_damaged
        self.documents_unreadable += len(batch.unreadable)
        self.documents_left_out += len(batch.left_out)

    def over_all_ranks(self) -> StepCount:
        """The sums of all ranks. Collective: every rank is to call it, with as many modalities."""
        values = [getattr(self, field.name) for field in fields(self)]
        parts = [value if isinstance(value, Tensor) else torch.tensor([value]) for value in values]
        summed = torch.cat(parts)
        dist.all_reduce(summed)
        targets_M, tokens_M, *numbers = summed.split([len(part) for part in parts])
        return StepCount(targets_M, tokens_M, *(int(number) for number in numbers))


@dataclass(frozen=True)
class Agreement:
    """What all ranks know before a step."""

    counts: Counts
    """What the losses are divided by."""
    tokens_M: Tensor
    """Input tokens by modality, int64 on the CPU."""
    stop: int
    """`Stop.code` of whichever rank was asked to end, or 0."""
    save: bool
    """It is time for a checkpoint, by the clock."""
    profile: bool = False
    """Somebody asked for a profile of the next steps."""
    snapshot: bool = False
    """Somebody asked for a snapshot of the memory."""


class DocumentAccount:
    """Documents of all ranks since the process began: how many were read, and how many were not as they should be."""

    def __init__(self, config: DataConfig):
        self._config = config
        self.read = self.damaged = self.unreadable = self.left_out = 0
        self._named: set[str] = set()  # damaged documents that this rank has warned of

    def name_what_is_wrong(self, step_batches: Sequence[PackedBatch]) -> None:
        """Log each damaged or unreadable document of this rank's batches by name."""
        for batch in step_batches:
            for name in (n for n in batch.damaged if n not in self._named):
                self._named.add(name)
                log.warning("masked %s: its bytes are not what its checksum says, or cannot be had", name)
            for name in batch.unreadable:
                log.warning("left out %s", name)

    def add(self, count: StepCount) -> None:
        """Take in the count of all ranks. Raises AgreedError, on all ranks alike, where too many documents were bad."""
        self.read += count.documents_read
        self.damaged += count.documents_damaged
        self.unreadable += count.documents_unreadable
        self.left_out += count.documents_left_out
        share = self._config.max_unreadable_fraction
        if self.unreadable > share * max(self.read, 100):
            raise AgreedError(
                f"{self.unreadable} of {self.read} raw documents could not be read, more than "
                f"data.max_unreadable_fraction={share} allows. The log names them and says why: mend the inputs, or "
                "set a larger share. The last checkpoint is intact."
            )
        share = self._config.max_bad_fraction
        if self.damaged > share * max(self.read, 1000):
            raise AgreedError(
                f"{self.damaged} of {self.read} documents did not match their checksums, more than "
                f"data.max_bad_fraction={share} allows. Copy the shards again; the last checkpoint is intact."
            )

    def figures(self) -> dict[str, int]:
        return {"data/damaged": self.damaged, "data/unreadable": self.unreadable, "data/left_out": self.left_out}


def largest_over_all_ranks(value: int) -> int:
    """The largest `value` of all ranks. Collective: every rank is to call it."""
    agreed_on = torch.tensor(value)
    dist.all_reduce(agreed_on, dist.ReduceOp.MAX)
    return int(agreed_on)
