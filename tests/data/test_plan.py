from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from corpus import VOCAB, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mom_data.dataset import TokenDataset
from mom_data.loader import PlannedBatches, Share, batches
from mom_data.plan import Lane, Piece, Plan, Source, cut, pack, permutation

segment = st.tuples(st.integers(1, 200), st.integers(0, 2))


@given(st.lists(segment, min_size=1, max_size=8), st.integers(24, 120))
def test_cutting_covers_a_document_and_splits_no_span_that_fits_a_row(segments, row):
    lengths, modalities = zip(*segments, strict=True)
    pieces = cut(lengths, modalities, [False] * len(segments), row)
    total = 2 + sum(n + 2 * (m > 0) for n, m in segments)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == total
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    assert all(0 < e - s <= row for s, e in pieces)
    at = 1
    for n, m in segments:
        end = at + n + 2 * (m > 0)
        if m and end - at <= row:
            assert not any(at < s < end for s, _ in pieces)
        at = end


def test_latents_that_do_not_fit_a_row_are_refused():
    with pytest.raises(ValueError, match="256 patches does not fit a row of 200"):
        cut([256], [1], [True], 200)


@given(st.lists(st.integers(1, 64), max_size=60))
@settings(max_examples=50)
def test_packing_keeps_every_piece_and_overfills_no_row(sizes):
    pieces = [Piece(0, 0, i, 0, n) for i, n in enumerate(sizes)]
    rows = pack(pieces, 64)
    assert Counter(p for row in rows for p in row) == Counter(pieces)
    fill = [sum(p.end - p.start for p in row) for row in rows]
    assert all(f <= 64 for f in fill)
    # best fit leaves no two rows that could be one: at most one row is half empty or less
    assert sum(f <= 32 for f in fill) <= 1


@given(st.integers(0, 300), st.integers(0, 5))
def test_permutations_are_permutations(n, seed):
    assert sorted(permutation(n, seed, "x").tolist()) == list(range(n))


def test_permutations_do_not_change_with_any_library():
    """Values worked out with plain integers below, not taken from the code's own output."""
    import hashlib

    def splitmix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    key = int.from_bytes(hashlib.blake2b(repr((3, "rows", 1)).encode(), digest_size=8).digest(), "little")
    expected = sorted(range(50), key=lambda i: splitmix(i ^ key))
    assert permutation(50, 3, "rows", 1).tolist() == expected


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    write_dataset(folder / "a", documents=240, shards=3, seed=1, latent_width=4)
    write_dataset(folder / "b", documents=90, shards=2, seed=2)
    sources = (Source(TokenDataset(folder / "a"), 3.0), Source(TokenDataset(folder / "b"), 1.0))
    return Plan(sources, length=128, lanes=4, window=64, seed=5)


def rows_of(plan, world, batch, micro_batch, workers, start, steps):
    """Global sequence number -> its tensors, gathered from every rank."""
    seen = {}
    for rank in range(world):
        share = Share(rank, world, batch, micro_batch)
        passes = steps * batch // world // micro_batch
        numbers = [i for chosen, _ in islice(share.micro_batches(start), passes) for i in chosen]
        stream = islice(batches(plan, VOCAB, share, start, workers=workers), passes)
        tensors = []
        for b in stream:
            where = b.latent_position // 128
            for row in range(micro_batch):
                latents = b.latents[where == row].numpy().tobytes()
                tensors.append((b.tokens[row], b.modality[row], b.document[row], b.labels[row], latents))
        seen.update(zip(numbers, tensors, strict=True))
    return {i: [x if isinstance(x, bytes) else x.numpy().tobytes() for x in t] for i, t in seen.items()}


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (4, 0), (8, 0), (1, 2), (2, 2)])
def test_the_order_does_not_depend_on_ranks_workers_batch_or_where_one_resumes(plan, world, workers):
    reference = rows_of(plan, 1, 8, 8, 0, 0, 12)
    for batch, micro_batch, start in ((8, 1, 0), (16, 2, 0), (8, 1, 40), (16, 2, 24)):
        got = rows_of(plan, world, batch, micro_batch, workers, start, 2)
        assert got == {i: reference[i] for i in range(start, start + 2 * batch)}


def test_every_position_of_every_document_comes_once_per_epoch(plan):
    alone = Plan(plan.sources[:1], length=128, lanes=4, window=64, seed=0)
    for number in range(4):
        lane = Lane(alone, number)
        units = lane._units(0, 0)
        wanted = {(shard, d) for shard, a, b in units for d in range(a, b)}
        assert wanted
        covered: dict[tuple[int, int], int] = Counter()
        while sum(covered.values()) == 0 or set(covered) != wanted or len(set(covered.values())) > 1:
            for piece in next(lane):
                covered[piece.shard, piece.document] += piece.start == 0
                assert covered[piece.shard, piece.document] <= 1, "a document came again before the epoch was over"
    every = [unit for number in range(4) for unit in Lane(alone, number)._units(0, 0)]
    assert sum(b - a for _, a, b in every) == 240


def test_sources_get_their_share_of_the_tokens(plan):
    used = [0, 0]
    for row in islice(Lane(plan, 0), 400):
        for piece in row:
            used[piece.source] += piece.end - piece.start
    assert used[0] / sum(used) == pytest.approx(0.75, abs=0.01)


def test_the_fingerprint_knows_what_decides_the_order(plan):
    same = Plan(plan.sources, 128, 4, 64, 5)
    assert same.fingerprint == plan.fingerprint
    others = [
        Plan(plan.sources, 128, 4, 64, 6),
        Plan(plan.sources, 120, 4, 64, 5),
        Plan(plan.sources, 128, 2, 64, 5),
        Plan((plan.sources[0], Source(plan.sources[1].dataset, 2.0)), 128, 4, 64, 5),
        Plan(plan.sources[:1], 128, 4, 64, 5),
    ]
    assert len({p.fingerprint for p in (plan, *others)}) == 6
    with pytest.raises(ValueError, match="cannot be dealt to 400 lanes"):
        Plan(plan.sources, 128, 400, 64, 5)


def test_a_damaged_document_is_masked_in_place_and_nothing_else_moves(plan, tmp_path):
    """Property of the whole path: shards, plan, batch."""
    truth = write_dataset(tmp_path / "d", documents=60, shards=1)
    clean_plan = Plan((Source(TokenDataset(tmp_path / "d"), 1.0),), 128, 2, 32, 0)
    clean = next(iter(PlannedBatches(clean_plan, VOCAB, Share(0, 1, 24, 24))))
    path = tmp_path / "d/part-00000.tar"
    content = bytearray(path.read_bytes())
    for victim in (3, 17):
        content[int(clean_plan.sources[0].dataset.index(0).token_offset[victim])] ^= 1
    path.write_bytes(content)
    dirty_plan = Plan((Source(TokenDataset(tmp_path / "d"), 1.0),), 128, 2, 32, 0)
    dirty = next(iter(PlannedBatches(dirty_plan, VOCAB, Share(0, 1, 24, 24))))
    assert {d.rsplit("#")[1] for d in dirty.damaged} == {"3", "17"}
    changed = (clean.tokens != dirty.tokens) | (clean.labels != dirty.labels)
    masked = (dirty.tokens == VOCAB.specials["pad"]) & (clean.tokens != VOCAB.specials["pad"])
    assert bool((changed <= (masked | changed & (dirty.labels == -100))).all())
    assert bool((dirty.labels[masked] == -100).all())
    assert bool((dirty.document == clean.document).all())
    lost = sum(2 + sum(len(s.values) + 2 * (s.modality > 0) for s in truth[0, v]) for v in (3, 17))
    assert 0 < int(masked.sum()) <= lost
    assert np.array_equal(dirty.tokens[~masked], clean.tokens[~masked])


def test_a_corrupted_mask_routes_the_share_of_tokens_elsewhere_and_changes_nothing_else(plan):
    share = Share(0, 1, 8, 8)
    clean = next(batches(plan, VOCAB, share))
    dirty = next(batches(plan, VOCAB, share, corrupt_share=0.2))
    changed = clean.modality != dirty.modality
    assert 0.17 < changed.float().mean() < 0.23
    for name in ("tokens", "labels", "document", "real_tokens", "latent_position"):
        assert bool((getattr(clean, name) == getattr(dirty, name)).all())
    flat = dirty.modality.reshape(-1)
    assert (flat[dirty.rows].int().diff() >= 0).all()
    assert dirty.offsets.tolist() == [0, *np.bincount(flat, minlength=3).cumsum()]
    again = next(batches(plan, VOCAB, Share(0, 1, 4, 4), 0, corrupt_share=0.2))
    assert bool((again.modality == dirty.modality[:4]).all())
