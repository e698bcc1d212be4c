import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mom_tokenizers.speech.delay import DelayedCodebooks, delayed, undelayed

SIZE = 7


def by_definition(codes_TK):
    """Step s has the codes (s - k, k) of all frames there are, each a codebook's number times the size further on."""
    T, K = codes_TK.shape
    return [codes_TK[s - k, k] + k * SIZE for s in range(T + K - 1) for k in range(K) if 0 <= s - k < T]


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_the_delay_is_undone_exactly_and_each_id_follows_what_the_sampler_allows(frames, codebooks, seed):
    codes_TK = np.random.default_rng(seed).integers(0, SIZE, (frames, codebooks))
    ids = delayed(codes_TK, SIZE)
    assert ids.tolist() == by_definition(codes_TK)
    np.testing.assert_array_equal(undelayed(ids, codebooks, SIZE), codes_TK)
    state = DelayedCodebooks(codebooks)
    for number, id_ in enumerate(ids.tolist()):
        assert id_ // SIZE in state.allowed()
        assert codebooks == 1 or number == 0 or not state.ended()
        state.take(id_ // SIZE)
    assert state.ended()
    assert state.frames == frames
    assert list(state.allowed()) == ([0] if codebooks == 1 else [])


@given(st.integers(1, 5), st.integers(0, 999))
def test_whatever_the_sampler_chooses_is_a_whole_recording(codebooks, seed):
    rng, state, ids = np.random.default_rng(seed), DelayedCodebooks(codebooks), []
    while not (state.ended() and (codebooks > 1 or len(ids) >= 5)):
        codebook = rng.choice(state.allowed())
        ids.append(codebook * SIZE + rng.integers(SIZE))
        state.take(codebook)
    assert undelayed(np.array(ids), codebooks, SIZE).shape == (state.frames, codebooks)


def test_ids_in_another_order_are_refused():
    ids = delayed(np.zeros((4, 3), np.int64), SIZE)
    for wrong in (ids[:-1], ids[::-1], ids[3:]):
        with pytest.raises(ValueError, match="not whole frames of 3 codebooks of 7 codes"):
            undelayed(wrong, 3, SIZE)
