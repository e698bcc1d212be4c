from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mom_data.order.packing import Piece, assembled_lengths, best_fit, concatenate, cut

ROW = 64
segment = st.tuples(st.integers(1, 200), st.integers(0, 2))
documents = st.lists(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2)), min_size=1, max_size=5), max_size=40)


def spans(segments):
    """(start, end) of each bracketed span of an assembled document, and the length of the document."""
    at, found = 1, []
    for n, modality in segments:
        end = at + n + 2 * (modality > 0)
        if modality:
            found.append((at, end))
        at = end
    return found, at + 1


@given(st.lists(segment, min_size=1, max_size=8), st.integers(24, 120), st.booleans(), st.none() | st.integers(0, 120))
def test_cutting_covers_a_document_and_splits_no_span_that_fits_a_row(segments, row, cut_spans, room):
    room = None if room is None else min(room, row)
    lengths, modalities = zip(*segments, strict=True)
    pieces = cut(lengths, modalities, [False] * len(segments), row, room=room, cut_spans=cut_spans)
    inner, total = spans(segments)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == total
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    assert all(0 < e - s <= row for s, e, _ in pieces[1:])
    assert pieces[0][1] <= (row if room is None else room)
    for start, end in inner:
        if end - start <= row and not cut_spans:
            assert not any(start < s < end for s, _, _ in pieces)
    for start, end, divisible in pieces:
        holds = [a for a, b in inner if a < end and b > start and b - a <= row]
        assert divisible == (cut_spans or not holds)


def test_latents_that_do_not_fit_a_row_are_refused_and_latents_are_never_cut():
    with pytest.raises(ValueError, match="256 patches does not fit a row of 200"):
        cut([256], [1], [True], 200, cut_spans=True)
    pieces = cut([50, 100], [0, 1], [False, True], 128, cut_spans=True)
    assert [p[:2] for p in pieces] == [(0, 51), (51, 154)]


@given(documents)
@settings(max_examples=50)
def test_assembled_lengths_are_those_of_the_segments(docs):
    start = np.cumsum([0, *map(len, docs)])
    flat = [s for d in docs for s in d]
    lengths = assembled_lengths(start, np.array([n for n, _ in flat], np.uint32), np.array([m for _, m in flat], int))
    assert lengths.tolist() == [spans(d)[1] for d in docs]


def positions(pieces):
    return Counter((p.document, i) for p in pieces for i in range(p.start, p.end))


@given(st.lists(st.tuples(st.integers(1, ROW), st.booleans()), max_size=80))
@settings(max_examples=100)
def test_best_fit_keeps_every_position_splits_only_what_may_be_and_overfills_no_row(sizes):
    pieces = [Piece(0, 0, i, 0, n, divisible) for i, (n, divisible) in enumerate(sizes)]
    rows = best_fit(pieces, ROW)
    placed = [p for row in rows for p in row]
    assert positions(placed) == positions(pieces)
    assert {p for p in placed if not p.divisible} == {p for p in pieces if not p.divisible}
    assert all(0 < sum(p.end - p.start for p in row) <= ROW for row in rows)
    assert all(p.end > p.start for p in placed)


def test_text_is_split_into_the_gaps_that_pictures_leave():
    """Three captions with 1,024 codes fill three quarters of a row of 4,096, and no fourth fits: a quarter wasted by
    any packing that cuts nothing, and next to nothing once there is enough text."""
    pictures = [Piece(0, 0, i, 0, 1060) for i in range(300)]
    wasted = 1 - 300 * 1060 / (4096 * len(best_fit(pictures, 4096)))
    assert wasted > 0.22
    texts = [Piece(0, 1, i, 0, 300 + 37 * i % 2000, True) for i in range(200)]
    rows = best_fit([*pictures, *texts], 4096)
    tokens = sum(p.end - p.start for row in rows for p in row)
    assert 1 - tokens / (4096 * len(rows)) <= 0.01  # one row of 140 more than could be
    assert min(p.end - p.start for row in rows for p in row) >= 64


@given(documents, st.booleans())
@settings(max_examples=100)
def test_concatenation_keeps_the_order_and_cuts_only_where_a_row_ends(docs, cut_spans):
    pieces = [Piece(0, 0, i, 0, spans(d)[1], all(m == 0 for _, m in d)) for i, d in enumerate(docs)]

    def segments_of(piece):
        d = docs[piece.document]
        return [n for n, _ in d], [m for _, m in d], [False] * len(d)

    rows = concatenate(pieces, ROW, segments_of, cut_spans)
    flat = [(p.document, i) for row in rows for p in row for i in range(p.start, p.end)]
    assert flat == [(p.document, i) for p in pieces for i in range(p.end)]
    filled = [sum(p.end - p.start for p in row) for row in rows]
    assert all(0 < n <= ROW for n in filled)
    if cut_spans:
        assert all(n == ROW for n in filled[:-1])
    for row in rows:
        for p in row:
            inside = [(a, b) for a, b in spans(docs[p.document])[0] if b - a <= ROW and not cut_spans]
            assert not any(a < at < b for a, b in inside for at in (p.start, p.end))
