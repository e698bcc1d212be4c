"""The loader: the batches of a plan for one rank of many, made in this process or by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat

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
    """The sequences that a rank takes. Each step has `batch` sequences; the rank takes a contiguous part of them, in
    micro-batches of `micro_batch`. The first steps may have batches of their own."""

    rank: int
    world_size: int
    batch: int
    micro_batch: int
    ramp: tuple[tuple[int, int], ...] = ()
    """(number of steps, batch) of the parts that come first, before all steps have `batch`."""

    def micro_batches(self, start: int) -> Iterator[tuple[range, int]]:
        """(numbers of the sequences, number of the next step's first sequence) from sequence `start` on."""
        ramp = chain.from_iterable(repeat(batch, steps) for steps, batch in self.ramp)
        for batch in chain(ramp, repeat(self.batch)):
            per_rank = batch // self.world_size
            assert per_rank * self.world_size == batch
            assert per_rank % self.micro_batch == 0
            first = start + self.rank * per_rank
            for s in range(first, first + per_rank, self.micro_batch):
                yield range(s, s + self.micro_batch), start + batch
            start += batch


class PlannedBatches(IterableDataset["PackedBatch | tuple[torch.Tensor, Header] | UserError"]):
    """The rank's micro-batches from sequence `start` on, without end; worker k of n makes every n-th of them. Where a
    plan ends (`Plan.once`), all further rows are padding.

    Sequences of other ranks and workers are planned but not read, so the order never depends on who reads. `cursors`
    says for each lane where one of its chunks began, at or before `start`, so that planning can begin there.
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
        """The batches. In a worker process each is sent as one buffer, and a UserError is sent as the last item, since
        a DataLoader that passes an exception on adds the worker's traceback to its message."""
        info = get_worker_info()
        if info is None:
            yield from self.made()
            return
        try:
            yield from map(to_wire, self.made(info.id, info.num_workers))
        except UserError as error:
            yield error

    def made(self, worker: int = 0, workers: int = 1) -> Iterator[PackedBatch]:
        """The batches that this worker makes: every `workers`-th one, beginning with number `worker`."""
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
    """An endless stream of the rank's micro-batches.

    To resume, give as `start` the `end_sequence` of the last batch of a finished step, and the cursors of the batches
    up to it. Batches that were prefetched beyond it are made again.
    """
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
