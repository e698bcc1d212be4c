"""Batches of a plan, for one rank of many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import torch
import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from mom_data.batches.batch import PackedBatch, build_batch
from mom_data.batches.wire import Header, from_wire, to_wire
from mom_data.order.plan import Cursor, Lane, Plan
from mom_tokenizers.errors import UserError
from mom_tokenizers.vocab import VocabLayout


@dataclass(frozen=True)
class Share:
    """Which sequences a rank takes: of each step's `batch`, the rank's contiguous part in passes of
    `micro_batch`."""

    rank: int
    world_size: int
    batch: int
    micro_batch: int

    def micro_batches(self, start: int) -> Iterator[tuple[range, int]]:
        """(numbers of the sequences, number of the next step's first sequence) from sequence `start` on."""
        per_rank = self.batch // self.world_size
        assert per_rank * self.world_size == self.batch
        assert per_rank % self.micro_batch == 0
        while True:
            first = start + self.rank * per_rank
            for s in range(first, first + per_rank, self.micro_batch):
                yield range(s, s + self.micro_batch), start + self.batch
            start += self.batch


class PlannedBatches(IterableDataset):
    """The rank's micro-batches from sequence `start` on, without end: worker k of n makes every n-th of them. Rows
    behind the end of a plan that has one (`Plan.once`) are padding alone.

    Sequences that others take are planned and not read, so the order never depends on who reads. `cursors` (lane ->
    where a chunk of it began, at or before `start`) spare planning everything from the first sequence on.
    """

    def __init__(
        self,
        plan: Plan,
        vocab: VocabLayout,
        share: Share,
        start: int = 0,
        cursors: Mapping[int, Cursor] | None = None,
        *,
        corrupt_share: float = 0.0,
    ):
        self.plan, self.vocab, self.share, self.start = plan, vocab, share, start
        self.cursors = dict(cursors or {})
        self.corrupt_share = corrupt_share

    def __iter__(self) -> Iterator[PackedBatch | tuple[torch.Tensor, Header] | UserError]:
        """Batches; in a loader's worker as one buffer each, and a UserError as the last item, because a loader that
        passes an exception on puts the worker's traceback into its message."""
        info = get_worker_info()
        if info is None:
            yield from self.made()
            return
        try:
            yield from map(to_wire, self.made(info.id, info.num_workers))
        except UserError as error:
            yield error

    def made(self, worker: int = 0, workers: int = 1) -> Iterator[PackedBatch]:
        plan = self.plan
        lanes: dict[int, Lane] = {}
        for sequences, end in islice(self.share.micro_batches(self.start), worker, None, workers):
            rows, cursors = [], {}
            for i in sequences:
                number, given = i % plan.lanes, i // plan.lanes
                lane = lanes.get(number)
                if lane is None:
                    lane = lanes[number] = Lane(plan, number, self.cursors.get(number))
                lane.skip_to(given)
                rows.append(next(lane, []))
                for source, shard in lane.entered:
                    plan.sources[source].dataset.prefetch(shard)
                lane.entered.clear()
                cursors[number] = lane.cursor
            batch = build_batch(rows, plan.sources, self.vocab, plan.length, sequences, self.corrupt_share)
            batch = replace(batch, end_sequence=end, cursors=cursors)
            yield batch


def batches(
    plan: Plan,
    vocab: VocabLayout,
    share: Share,
    start: int = 0,
    cursors: Mapping[int, Cursor] | None = None,
    *,
    workers: int = 0,
    pin: bool = False,
    corrupt_share: float = 0.0,
) -> Iterator[PackedBatch]:
    """An endless stream of the rank's micro-batches. The state to resume from is the `end_sequence` of the last
    batch of a finished step, with the cursors of the batches until there; what was prefetched beyond it is made
    again."""
    source = PlannedBatches(plan, vocab, share, start, cursors, corrupt_share=corrupt_share)
    if not workers:
        return (batch.pin_memory() if pin else batch for batch in source.made())
    pipeline = webdataset.DataPipeline(source)
    loader = webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers, pin_memory=pin)
    return map(_received, loader)


def _received(sent: tuple[torch.Tensor, Header] | UserError) -> PackedBatch:
    if isinstance(sent, UserError):
        raise sent
    return from_wire(*sent)
