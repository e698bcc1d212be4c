"""Every document comes exactly once per epoch, whatever the sizes."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from mom_data.order import plan as plan_module
from mom_data.order.plan import Lane, Plan, Source
from tests.helpers.corpus import Indices

ROW = 64


def source_of(seed, documents, longest, shards, kinds):
    """A source of documents of text, or also of codes (1) and of latents (2). Some of its shards are empty."""
    rng = np.random.default_rng(seed)
    modality = rng.integers(0, kinds, (documents, 3))
    length = np.where(modality == 2, rng.integers(1, 20, (documents, 3)), rng.integers(1, longest + 1, (documents, 3)))
    made = [
        [(n, m, m == 2) for n, m in zip(lengths[:k], modalities[:k], strict=True)]
        for lengths, modalities, k in zip(
            length.tolist(), modality.tolist(), rng.integers(1, 4, documents).tolist(), strict=True
        )
    ]
    cuts = np.sort(rng.integers(0, documents + 1, shards - 1))
    return Indices(f"{seed}-{documents}-{longest}-{shards}", made, np.diff([0, *cuts, documents]).tolist())


class Epochs:
    """Reads pieces in order and fails where a source's epoch mixes with the next one."""

    def __init__(self, plan):
        self.lengths = [source.dataset.lengths for source in plan.sources]
        self.total = [sum(lengths.values()) for lengths in self.lengths]
        self.left = [dict(lengths) for lengths in self.lengths]
        self.positions = [0] * len(self.lengths)
        self.pieces = [[] for _ in self.lengths]

    def read(self, row):
        for piece in row:
            k, document = piece.source, (piece.shard, piece.document)
            size = piece.end - piece.start
            assert size > 0
            self.left[k][document] -= size
            assert self.left[k][document] >= 0, "a document came again before the epoch was over"
            self.pieces[k].append((document, piece.start, piece.end))
            self.positions[k] += size
            if self.positions[k] % self.total[k] == 0:
                self._ends(k)

    def _ends(self, k):
        assert not any(self.left[k].values()), "an epoch ended without some documents"
        at = {}
        for document, start, end in sorted(self.pieces[k]):
            assert start == at.get(document, 0), "positions left out or given twice"
            at[document] = end
        assert at == self.lengths[k]
        self.left[k], self.pieces[k] = dict(self.lengths[k]), []

    @property
    def ended(self):
        return [positions // total for positions, total in zip(self.positions, self.total, strict=True)]


sources = st.lists(
    st.tuples(st.integers(1, 5000) | st.integers(1, 40), st.sampled_from([3, 30, 300]), st.integers(1, 5),
              st.integers(1, 3), st.sampled_from([1.0, 1.0, 0.3, 0.01])),
    min_size=1, max_size=3,
)  # fmt: skip


@given(
    sources, st.integers(1, 128), st.sampled_from([ROW, 512, 4096]),
    st.integers(1, 200) | st.sampled_from([600, 2048]), st.integers(0, 20),
    st.sampled_from(["best_fit", "concatenate"]), st.booleans(),
)  # fmt: skip
@example([(1, 30, 1, 1, 1.0)], 128, 4096, 2048, 0, "best_fit", False)
@example([(5000, 30, 3, 2, 1.0)], 128, 512, 2048, 0, "best_fit", False)
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking is slow
def test_read_in_the_runs_order_every_document_of_a_source_comes_once_before_any_comes_again(
    chosen, lanes, length, window, seed, packing, cut_spans
):
    made = [Source(source_of(seed + 100 * i, *c[:4]), c[4]) for i, c in enumerate(chosen)]
    plan = Plan(tuple(made), length, lanes, window, seed, packing=packing, cut_spans=cut_spans)
    streams = [Lane(plan, number) for number in range(lanes)]
    epochs = Epochs(plan)
    for i in range(max(2 * lanes, 3000)):
        row = next(streams[i % lanes])
        assert sum(p.end - p.start for p in row) <= length
        epochs.read(row)
        if sum(epochs.positions) > 60_000 or min(epochs.ended) >= 2:
            break
    assert max(epochs.ended) >= 1 or max(epochs.total) > 40_000


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
@pytest.mark.parametrize("documents", [300, 3000])
def test_a_long_epoch_takes_rows_of_its_own(documents, packing):
    plan = Plan((Source(source_of(0, documents, 90, 3, 2), 1.0),), ROW, 16, 256, 0, packing=packing)
    lanes = [Lane(plan, number) for number in range(16)]
    seen = Counter()
    for i in range(10_000):
        seen.update((p.shard, p.document) for p in next(lanes[i % 16]) if p.start == 0)
        if seen.keys() == plan.sources[0].dataset.lengths.keys():
            break
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
@pytest.mark.parametrize("documents", [3, 7, 32, 150, 999])
def test_epochs_kept_apart_cost_little_padding(documents, packing):
    plan = Plan((Source(source_of(0, documents, 30, 1, 3), 1.0),), 512, 16, 256, 0, packing=packing)
    lanes = [Lane(plan, number) for number in range(16)]
    used = sum(p.end - p.start for i in range(50) for p in next(lanes[i % 16]))
    assert used / (50 * 512) > 0.92


def test_a_tiny_source_mixed_into_a_large_one_costs_little_padding():
    large, tiny = source_of(1, 5000, 40, 2, 2), source_of(2, 32, 40, 1, 2)
    alone = Plan((Source(large, 1.0),), 512, 4, 1024, 0)
    for weight in (0.01, 0.3):
        mixed = Plan((Source(large, 1 - weight), Source(tiny, weight)), 512, 4, 1024, 0)
        used = [sum(p.end - p.start for row in islice(Lane(p, 0), 100) for p in row) for p in (alone, mixed)]
        assert used[1] > 0.98 * used[0]


@given(st.integers(1, 700), st.integers(1, 6), st.integers(1, 40), st.integers(1, 16), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_where_lanes_are_streams_an_epochs_documents_are_dealt_to_them_once_and_evenly(
    documents, shards, lanes, pool, seed
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "ONE_STREAM_DOCUMENTS", 0)
        plan = Plan((Source(source_of(seed, documents, 3, shards, 1), 1.0),), ROW, lanes, 50, seed, pool=pool)
    assert plan.streams == lanes
    units = Counter()
    for epoch in range(5):
        dealt = Counter()
        for number in range(lanes):
            own = [unit for units in plan.pools(number, 0, epoch) for unit in units]
            units[number] += len(own)
            dealt.update((shard, d) for shard, a, b in own for d in range(a, b))
        assert dealt == dict.fromkeys(plan.sources[0].dataset.lengths, 1)
    counts = [units[number] for number in range(lanes)]
    assert max(counts) - min(counts) <= 1
    # a lane goes through its own documents epoch by epoch
    number = seed % lanes
    lane, given_so_far, begun = Lane(plan, number), [], Counter()
    epochs = [[(k, d) for pool in plan.pools(number, 0, e) for k, a, b in pool for d in range(a, b)] for e in range(3)]
    wanted = sum(map(len, epochs))
    while len(given_so_far) < wanted:
        for piece in next(lane):
            if piece.start == 0:
                given_so_far.append((piece.shard, piece.document))
    if documents >= 2 * lanes:
        for own in epochs:
            assert Counter(given_so_far[: len(own)]) == Counter(own)
            del given_so_far[: len(own)]
    else:  # a stream that gets one document of an epoch or none has no epochs of its own
        begun.update(given_so_far)
        assert begun.keys() <= plan.sources[0].dataset.lengths.keys()


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
@pytest.mark.parametrize("sizes", [(1,), (40,), (900, 7), (3, 800, 40)])
def test_a_plan_of_one_pass_gives_every_document_once_and_ends(sizes, packing):
    made = tuple(Source(source_of(i, n, 90, 2, 3), 1.0 + i) for i, n in enumerate(sizes))
    plan = Plan(made, ROW, 1, 100, 0, packing=packing, once=True)
    epochs = Epochs(plan)
    lane = Lane(plan, 0)
    for row in lane:
        epochs.read(row)
    assert epochs.positions == epochs.total
    assert next(lane, None) is None
    again = Lane(plan, 0)
    again.skip_to(10_000)
    assert next(again, None) is None


def test_a_source_without_documents_is_refused_by_name():
    empty = Indices("nothing", [], [0, 0])
    with pytest.raises(ValueError, match="nothing holds no documents"):
        Plan((Source(source_of(0, 5, 3, 1, 1), 1.0), Source(empty, 1.0)), ROW, 4, 8, 0)
