import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from itertools import chain, count, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mom_data.batches.loader import PlannedBatches, Share, batches
from mom_data.order import plan as plan_module
from mom_data.order.plan import Cursor, Lane, Plan, Source, permutation
from mom_data.shards.dataset import TokenDataset
from tests.helpers.corpus import VOCAB, write_dataset


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


@pytest.fixture(scope="module")
def streams_plan(plan):
    """A plan of the same sources with a stream for each lane, as where they have many documents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "ONE_STREAM_DOCUMENTS", 0)
        many = Plan(plan.sources, length=128, lanes=4, window=64, seed=5)
    assert (plan.streams, many.streams) == (1, 4)
    return many


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


@pytest.fixture(scope="module")
def reference(plan):
    """What one rank reads, one batch at a time, from the first sequence."""
    return rows_of(plan, 1, 8, 8, 0, 0, 24)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_order_does_not_depend_on_ranks_workers_batch_or_where_one_resumes(plan, reference, world, workers):
    points = [(8, 0), (16, 0), (8, 40), (16, 24), (32, 96), (8, 184)] + [(8, 8 * i) for i in range(1, 18)]
    rng = np.random.default_rng(world * 3 + workers)
    chosen = points if not workers else [points[i] for i in rng.choice(len(points), 2, replace=False)]
    for batch, start in chosen:
        micro_batch = int(rng.choice([n for n in (1, 2, 4) if (batch // world) % n == 0]))
        got = rows_of(plan, world, batch, micro_batch, workers, start, 1)
        assert got == {i: reference[i] for i in range(start, start + batch)}


def test_the_order_of_streams_does_not_depend_on_ranks_workers_batch_or_where_one_resumes(streams_plan):
    reference = rows_of(streams_plan, 1, 8, 8, 0, 0, 6)
    for world, workers, batch, start in ((4, 0, 8, 0), (2, 1, 16, 24), (8, 0, 8, 40)):
        got = rows_of(streams_plan, world, batch, 1, workers, start, 1)
        assert got == {i: reference[i] for i in range(start, start + batch)}


def test_every_position_of_every_document_comes_once_per_epoch_of_a_stream(plan, monkeypatch):
    monkeypatch.setattr(plan_module, "ONE_STREAM_DOCUMENTS", 0)
    alone = Plan(plan.sources[:1], length=128, lanes=4, window=64, seed=0)
    for number in range(4):
        lane = Lane(alone, number)
        units = [unit for pool in alone.pools(number, 0, 0) for unit in pool]
        wanted = {(shard, d) for shard, a, b in units for d in range(a, b)}
        assert wanted
        covered: dict[tuple[int, int], int] = Counter()
        while sum(covered.values()) == 0 or set(covered) != wanted or len(set(covered.values())) > 1:
            for piece in next(lane):
                covered[piece.shard, piece.document] += piece.start == 0
                assert covered[piece.shard, piece.document] <= 1, "a document came again before the epoch was over"
    every = [unit for number in range(4) for pool in alone.pools(number, 0, 0) for unit in pool]
    assert sum(b - a for _, a, b in every) == 240


def test_sources_get_their_share_of_the_tokens(plan):
    used = [0, 0]
    for number in range(4):
        for piece in (p for row in islice(Lane(plan, number), 100) for p in row):
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
        Plan(plan.sources, 128, 4, 64, 5, pool=3),
        Plan(plan.sources, 128, 4, 64, 5, packing="concatenate"),
        Plan(plan.sources, 128, 4, 64, 5, cut_spans=True),
        Plan(plan.sources, 128, 4, 64, 5, before=plan, since=8),
        Plan(plan.sources, 128, 4, 64, 5, since=8),
    ]
    assert len({p.fingerprint for p in (plan, *others)}) == 11


def test_a_source_named_twice_is_refused(plan):
    with pytest.raises(ValueError, match="more than once"):
        Plan((plan.sources[0], plan.sources[0]), 128, 4, 64, 5)


@pytest.mark.parametrize("many_streams", [False, True])
@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_a_lane_goes_on_from_its_cursor_at_any_point(plan, packing, many_streams, monkeypatch):
    if many_streams:
        monkeypatch.setattr(plan_module, "ONE_STREAM_DOCUMENTS", 0)

    def planned():  # a new plan each time, for one keeps chunks
        return Plan(plan.sources, 128, 4, 16, 5, pool=2, packing=packing)

    for number in range(4):
        lane, rows, cursors = Lane(planned(), number), [], []
        for _ in range(160):  # several epochs of both sources
            rows.append(next(lane))
            cursors.append(Cursor(*json.loads(json.dumps(lane.cursor))))
        assert cursors[-1].sources[0][0] >= 1
        for start in (1, 7, 50, 51, 159):
            again = Lane(planned(), number, cursors[start - 1])
            again.skip_to(start)
            assert list(islice(again, 160 - start)) == rows[start:]


@pytest.mark.parametrize("many_streams", [False, True])
def test_a_changed_mix_takes_over_at_the_next_chunk_and_nothing_is_repeated_or_left_out(
    plan, tmp_path, many_streams, monkeypatch
):
    if many_streams:
        monkeypatch.setattr(plan_module, "ONE_STREAM_DOCUMENTS", 0)
    write_dataset(tmp_path / "c", documents=240, shards=2, seed=3)
    first = Plan(plan.sources, 128, 4, 16, 5)
    new = (Source(plan.sources[1].dataset, 1.0), Source(TokenDataset(tmp_path / "c"), 3.0))
    since = 64
    second = Plan(new, 128, 4, 24, 5, before=first, since=since)
    assert [s.weight for s in second.sources] == [0.0, 1.0, 3.0]
    assert second.streams == first.streams

    def rows_of_stream(plan, stream, n):
        """(where its chunk begins, row) of the stream's first rows."""
        if plan.streams == 4:
            lanes, found = [Lane(plan, stream)], []
        else:
            lanes, found = [Lane(plan, number) for number in range(4)], []
        for i in range(n):
            row = next(lanes[i % len(lanes)])
            found.append((lanes[i % len(lanes)].cursor.rows, row))
        return found

    for stream in range(second.streams):
        n = 480 // second.streams
        rows, old = rows_of_stream(second, stream, n), rows_of_stream(first, stream, n)
        at_hand = old[since // second.streams - 1][0]
        chunk_end = next(i for i, (begun, _) in enumerate(old) if begun > at_hand)
        assert chunk_end >= since // second.streams
        assert rows[:chunk_end] == old[:chunk_end], "the chunk at hand is ended"
        after = [p for _, row in rows[chunk_end:] for p in row]
        assert all(p.source != 0 for p in after)
        used = [sum(p.end - p.start for p in after if p.source == s) for s in range(3)]
        assert used[2] / sum(used) == pytest.approx(0.75, abs=0.04)
        # a source that both phases have is gone through once before it comes again
        chosen = [(p.shard, p.document) for _, row in rows for p in row if p.source == 1 and p.start == 0]
        epoch = sum(b - a for pool in second.pools(stream, 1, 0) for _, a, b in pool)
        assert len(chosen) > epoch
        assert len(set(chosen[:epoch])) == epoch
    # and the cursor knows its phase
    half, rows = Lane(second, 3), list(islice(Lane(second, 3), 120))
    half.skip_to(60)
    assert next(half) == rows[60]
    again = Lane(Plan(new, 128, 4, 24, 5, before=first, since=since), 3, half.cursor)
    again.skip_to(61)
    assert list(islice(again, 20)) == rows[61:81]
    with pytest.raises(AssertionError):
        Plan(new, 64, 4, 24, 5, before=first, since=since)


@pytest.mark.parametrize("many_streams", [False, True])
def test_a_plan_may_begin_at_any_sequence_with_each_document_once_from_there(plan, many_streams, monkeypatch):
    if many_streams:
        monkeypatch.setattr(plan_module, "ONE_STREAM_DOCUMENTS", 0)
    begun = Plan(plan.sources[1:], 128, 4, 64, 5, since=30)
    lanes = [Lane(begun, number) for number in range(4)]
    seen = Counter()
    for i in range(30, 60):
        lanes[i % 4].skip_to(i // 4)
        seen.update((p.shard, p.document) for p in next(lanes[i % 4]) if p.start == 0)
    assert seen
    assert set(seen.values()) == {1}


def _consume(pipe, folder, world, workers, start, cursors, steps, batch):
    """Child of the test below: every rank's documents of `steps` steps, said step by step."""
    plan = Plan((Source(TokenDataset(folder), 1.0),), 128, 4, 16, 9, pool=2)
    streams = [batches(plan, VOCAB, Share(r, world, batch, 1), start, cursors, workers=workers) for r in range(world)]
    for _ in range(steps):
        known = {}
        for stream in streams:
            for made in islice(stream, batch // world):
                known |= {n: c for n, c in made.cursors.items() if c.rows >= known.get(n, Cursor()).rows}
                end = made.end_sequence
        pipe.send((end, known))
    time.sleep(60)  # until it is killed


def test_every_document_comes_once_per_epoch_however_often_a_run_is_killed_and_resharded(tmp_path):
    """4 ranks -> SIGKILL -> 2 -> 1 -> 4, with loader workers, each from what the last one had said."""
    truth = write_dataset(tmp_path / "d", documents=400, shards=4, seed=8)
    context = multiprocessing.get_context("fork")
    sequence, cursors, consumed = 0, {}, []
    for world, workers, steps in ((4, 1, 3), (2, 0, 4), (1, 2, 2), (4, 0, 5)):
        mine, theirs = context.Pipe()
        arguments = (theirs, tmp_path / "d", world, workers, sequence, cursors, steps, 8)
        child = context.Process(target=_consume, args=arguments)
        child.start()
        for _ in range(steps):
            assert mine.poll(60)
            end, known = mine.recv()
            consumed += range(sequence, end)
            sequence = end
            cursors = {n: Cursor(*json.loads(json.dumps(c))) for n, c in (cursors | known).items()}
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert consumed == list(range(14 * 8))
    plan = Plan((Source(TokenDataset(tmp_path / "d"), 1.0),), 128, 4, 16, 9, pool=2)
    # the rest of the epoch, planned from the cursors, and what was consumed, planned from the start
    covered = Counter()
    lanes, consumed_rows = [], [[]] * sequence
    for number in range(4):
        before = sequence // 4
        lane = Lane(plan, number, cursors[number])
        lane.skip_to(before)
        lanes.append(lane)
        consumed_rows[number::4] = islice(Lane(plan, number), before)
    wanted = {
        (k, d, i)
        for (k, d), segments in truth.items()
        for i in range(2 + sum(len(s.values) + 2 * (s.modality > 0) for s in segments))
    }
    rest = (next(lanes[i % 4]) for i in count())
    left = len(wanted)
    for piece in (p for row in chain(consumed_rows, rest) for p in row):
        covered.update((piece.shard, piece.document, i) for i in range(piece.start, piece.end))
        if not (left := left - (piece.end - piece.start)):
            break
    assert set(covered) == wanted
    assert set(covered.values()) == {1}


def test_cursors_of_128_lanes_and_two_sources_stay_under_16_kib(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "ONE_STREAM_DOCUMENTS", 0)
    for seed, name in enumerate(("a", "b")):
        write_dataset(tmp_path / name, documents=1200, shards=3, seed=seed)
    sources = tuple(Source(TokenDataset(tmp_path / name), 1.0) for name in ("a", "b"))
    far = Plan(sources, 128, 128, 8, 0)
    state = [Cursor(100_000 + n, 3, ((12, 345, 4095, 123_456_789),) * 2) for n in range(128)]
    assert len(json.dumps(state)) <= 16384
    lane = Lane(far, 77)
    lane.skip_to(200)
    next(lane)
    assert len(json.dumps(lane.cursor)) <= 128


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
    assert bool((next(batches(plan, VOCAB, share, corrupt_share=1.0)).modality != clean.modality).all())
