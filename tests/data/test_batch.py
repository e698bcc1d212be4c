import numpy as np
import pytest
from corpus import MODALITIES, VOCAB, write_dataset

from mom_data.batch import assemble_document, build_batch
from mom_data.dataset import TokenDataset
from mom_data.plan import Piece, Source
from mom_data.shards import TokenSegment

S = VOCAB.specials


def test_a_document_is_bracketed_and_offset():
    doc = [
        TokenSegment(0, np.array([5, 6], np.uint16)),
        TokenSegment(1, np.array([0, 31], np.uint16)),
        TokenSegment(0, np.array([7], np.uint16)),
        TokenSegment(2, np.array([19], np.uint16)),
    ]
    ids, routes, _ = assemble_document(doc, MODALITIES, VOCAB)
    image, speech = VOCAB.offsets["image"], VOCAB.offsets["speech"]
    expected = [S["bos"], 5, 6, S["boi"], image, image + 31, S["eoi"], 7, S["bosp"], speech + 19, S["eosp"], S["eos"]]
    assert ids.tolist() == expected
    assert routes.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 2, 0, 0]
    assert [int(VOCAB.modality_of_id[i]) for i in ids] == routes.tolist()


@pytest.fixture(params=[0, 8])
def built(request, tmp_path):
    truth = write_dataset(tmp_path / "d", documents=30, shards=1, latent_width=request.param)
    sources = (Source(TokenDataset(tmp_path / "d"), 1.0),)
    whole = [2 + sum(len(s.values) + 2 * (s.modality > 0) for s in truth[0, d]) for d in range(30)]
    rows = [
        [Piece(0, 0, 0, 0, whole[0]), Piece(0, 0, 1, 0, whole[1])],
        [Piece(0, 0, 2, 0, whole[2] if request.param else min(whole[2], 7))],  # latents are never cut
        [Piece(0, 0, d, 0, whole[d]) for d in (4, 5, 6)],
    ]
    return build_batch(rows, sources, VOCAB, 1200, range(3)), rows, truth, request.param


def test_labels_are_the_next_token_of_the_same_document_and_never_touch_patches(built):
    batch, rows, truth, width = built
    null = S["null"]
    for b, pieces in enumerate(rows):
        used = sum(p.end - p.start for p in pieces)
        assert (batch.tokens[b, used:] == S["pad"]).all()
        assert (batch.labels[b, used:] == -100).all()
        for t in range(1199):
            same = batch.document[b, t] == batch.document[b, t + 1] and t + 1 < used
            token, following = batch.tokens[b, t], batch.tokens[b, t + 1]
            if not same or token == null or following == null:
                assert batch.labels[b, t] == -100
            else:
                assert batch.labels[b, t] == following
    images = [s for pieces in rows for p in pieces for s in truth[0, p.document] if s.modality == 1]
    if width:
        assert len(images) == int(batch.image_of_patch.max()) + 1
        assert (batch.tokens.reshape(-1)[batch.latent_position] == null).all()
        assert (batch.modality.reshape(-1)[batch.latent_position] == 1).all()
        assert np.array_equal(batch.latents.numpy(), np.concatenate([s.values for s in images]))
        assert (batch.labels == null).sum() == 0


def test_the_sort_is_stable_and_its_own_inverse(built):
    batch, *_ = built
    flat = batch.modality.reshape(-1).numpy()
    rows = batch.rows.numpy()
    assert rows.tolist() == sorted(range(len(flat)), key=lambda i: (flat[i], i))
    assert (rows[batch.order.numpy()] == np.arange(len(flat))).all()
    for m in range(3):
        s, e = batch.offsets[m], batch.offsets[m + 1]
        assert (flat[rows[s:e]] == m).all()
        padding = (batch.tokens == S["pad"]).sum() if m == 0 else 0
        assert batch.real_tokens[m] == e - s - padding
