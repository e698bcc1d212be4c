from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mom_data.batches.batch import PackedBatch, assemble_document, build_batch, sort_by_modality
from mom_data.batches.wire import from_wire, to_wire
from mom_data.order.packing import Piece, cut
from mom_data.order.plan import Lane, Plan, Source
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import ShardWriter, TokenSegment, write_manifest
from mom_tokenizers.vocab import VocabLayout
from tests.helpers.corpus import MODALITIES, TOKENIZERS, VOCAB, random_document, write_dataset

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


def test_the_sort_of_any_positions_is_the_one_that_the_loader_places(built):
    batch, *_ = built
    order, rows, offsets = sort_by_modality(batch.modality, len(batch.offsets) - 1)
    for sorted_here, placed in ((order, batch.order), (rows, batch.rows), (offsets, batch.offsets)):
        assert sorted_here.dtype == placed.dtype
        assert torch.equal(sorted_here, placed)


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


def assembled(rows, datasets, truth, vocab, length):
    """The batch's fields as plain lists, position by position, straight from the documents."""
    s, fields = vocab.specials, ("tokens", "modality", "document", "labels")
    out: dict[str, list] = {name: [] for name in fields}
    latents: list = []
    latent_position: list[int] = []
    image_of_patch: list[int] = []
    leads: list[bool] = []
    real = [0] * len(vocab.modalities)
    for b, pieces in enumerate(rows):
        row: dict[str, list] = {name: [] for name in fields}
        for number, piece in enumerate(pieces):
            segments = truth[piece.source][piece.shard, piece.document]
            names = [datasets[piece.source].modalities[x.modality] for x in segments or ()]
            stream: list = [(s["bos"], 0, None)]  # id, modality, (picture, number of the patch)
            for i, name in enumerate(names):
                m = vocab.modalities.index(name)
                if segments[i].latent:
                    codes: list = [(s["null"], m, (i, j)) for j in range(len(segments[i].values))]
                else:
                    codes = [(vocab.offsets[name] + int(v), m, None) for v in segments[i].values]
                if m:
                    pair = vocab.brackets(name)
                    codes = [(pair[0], 0, None), *codes, (pair[1], 0, None)]
                stream += codes
            stream.append((s["eos"], 0, None))
            stream = stream[piece.start : piece.end]
            if segments is None:
                stream = [(s["pad"], 0, None)] * (piece.end - piece.start)
            for j, (token, m, patch) in enumerate(stream):
                following = stream[j + 1] if j + 1 < len(stream) else None
                usable = segments is not None and following and patch is None and following[2] is None
                if segments is not None:
                    real[m] += 1
                if patch:
                    if patch[1] == 0:
                        leads.append("text" in names and "text" not in names[: patch[0]])
                    latents.append(segments[patch[0]].values[patch[1]])
                    latent_position.append(b * length + len(row["tokens"]))
                    image_of_patch.append(len(leads) - 1)
                row["tokens"].append(token)
                row["modality"].append(m)
                row["document"].append(number)
                row["labels"].append(following[0] if usable else -100)
        for name, padding in zip(fields, (s["pad"], 0, len(pieces), -100), strict=True):
            out[name].append(row[name] + [padding] * (length - len(row[name])))
    flat = [m for row in out["modality"] for m in row]
    rows_of = sorted(range(len(flat)), key=lambda i: (flat[i], i))
    order = [0] * len(flat)
    for r, i in enumerate(rows_of):
        order[i] = r
    offsets = [sum(x < m for x in flat) for m in range(len(vocab.modalities) + 1)]
    out |= {"latent_position": latent_position, "image_of_patch": image_of_patch, "image_leads": leads}
    out |= {"rows": rows_of, "order": order, "offsets": offsets, "real_tokens": real}
    return out, latents


DTYPES = {
    **dict.fromkeys(("tokens", "labels", "latent_position", "rows", "offsets", "real_tokens"), torch.int64),
    **dict.fromkeys(("document", "order", "image_of_patch"), torch.int32),
    "modality": torch.uint8,
    "image_leads": torch.bool,
}


def damage(folder, index, document):
    """Flip a bit of the document's first token."""
    at = int(index.token_offset[document])
    with open(folder / "part-00000.tar", "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A dataset of codes, and one of latents whose speech comes before its pictures. The vocabulary has one more
    modality."""
    folder = tmp_path_factory.mktemp("corpora")
    truth = [write_dataset(folder / "codes", documents=40, shards=2, seed=3)]
    other = ("text", "speech", "image")
    made, rng = {}, np.random.default_rng(4)
    (folder / "latents").mkdir()
    with ShardWriter(folder / "latents" / "part-00000.tar", other) as writer:
        for d in range(40):
            segments = random_document(rng, 6)
            made[0, d] = [TokenSegment((0, 2, 1)[x.modality], x.values) for x in segments]
            writer.add(str(d), made[0, d])
    write_manifest(folder / "latents", [writer.record()], {m: TOKENIZERS[m] for m in other}, np.uint16, {})
    truth.append(made)
    datasets = [TokenDataset(folder / name) for name in ("codes", "latents")]
    for dataset, documents, name in zip(datasets, truth, ("codes", "latents"), strict=True):
        for d in [d for d in (3, 11) if sum(not x.latent for x in documents[0, d])]:
            damage(folder / name, dataset.index(0), d)
            documents[0, d] = None
    assert sum(x is None for documents in truth for x in documents.values()) >= 2
    lengths = {
        (k, shard, d): 2 + sum(n + 2 * (m > 0) for n, m in zip(*index.segments(d)[:2], strict=True))
        for k, dataset in enumerate(datasets)
        for shard in range(len(dataset.shards))
        for index in [dataset.index(shard)]
        for d in range(dataset.shards[shard]["documents"])
    }
    return datasets, truth, lengths


WIDER = VocabLayout({"text": 100, "video": 7, "image": 32, "speech": 20})


@given(seed=st.integers(0, 2**32), length=st.integers(40, 300))
@settings(max_examples=60, deadline=None)
def test_a_batch_is_what_its_documents_say_position_by_position(corpora, seed, length):
    datasets, truth, lengths = corpora
    rng = np.random.default_rng(seed)
    vocab = (VOCAB, WIDER)[seed % 2]
    rows, everything = [], list(lengths)
    for _ in range(int(rng.integers(1, 5))):
        row, free = [], length
        for key in rng.permutation(len(everything))[: rng.integers(0, 7)].tolist():
            k, shard, d = everything[key]
            sizes, modalities, latent = datasets[k].index(shard).segments(d)
            cuts = cut(sizes, modalities, latent, max(length, 22), cut_spans=bool(seed & 2))
            start, end = cuts[int(rng.integers(len(cuts)))][:2]
            if end - start <= free:
                row.append(Piece(k, shard, d, start, end))
                free -= end - start
        rows.append(row)
    batch = build_batch(rows, [Source(d, 1.0) for d in datasets], vocab, length, range(len(rows)))
    expected, latents = assembled(rows, datasets, truth, vocab, length)
    for name, values in expected.items():
        assert getattr(batch, name).tolist() == values, name
        assert getattr(batch, name).dtype == DTYPES[name], name
    assert batch.latents.numpy().tobytes() == np.array(latents, np.float16).tobytes()
    assert len(batch.latents) == len(latents)
    masked = [p for row in rows for p in row if truth[p.source][p.shard, p.document] is None]
    names = [f"{datasets[p.source].where(p.shard)}#{p.document}" for p in masked]
    assert batch.damaged == tuple(dict.fromkeys(names))
    assert batch.documents_damaged == sum(p.start == 0 for p in masked)
    assert batch.documents_read == sum(p.start == 0 for row in rows for p in row)


def test_a_document_damaged_only_outside_the_piece_is_masked_all_the_same(tmp_path):
    write_dataset(
        tmp_path / "d", documents=1, shards=1, make=lambda rng, _: [TokenSegment(0, np.arange(90, dtype="u2"))]
    )
    dataset = TokenDataset(tmp_path / "d")
    damage(tmp_path / "d", dataset.index(0), 0)
    batch = build_batch([[Piece(0, 0, 0, 50, 60)]], [Source(dataset, 1.0)], VOCAB, 16, [0])
    assert len(batch.damaged) == 1
    assert (batch.documents_read, batch.documents_damaged) == (0, 0), "it is counted where it begins"
    assert (batch.tokens == S["pad"]).all()
    assert (batch.labels == -100).all()


def test_a_damaged_document_in_a_hundred_pieces_is_one_damaged_document(tmp_path):
    write_dataset(
        tmp_path / "d", documents=1, shards=1, make=lambda rng, _: [TokenSegment(0, np.arange(798, dtype="u2") % 90)]
    )
    dataset = TokenDataset(tmp_path / "d")
    damage(tmp_path / "d", dataset.index(0), 0)
    plan = Plan((Source(dataset, 1.0),), 8, 4, 16, 0)
    lanes = [Lane(plan, number) for number in range(4)]
    rows = [next(lanes[i % 4]) for i in range(100)]
    whole = build_batch(rows, plan.sources, VOCAB, 8, range(100))
    assert (len(whole.damaged), whole.documents_read, whole.documents_damaged) == (1, 1, 1)
    halves = [build_batch(rows[a : a + 50], plan.sources, VOCAB, 8, range(a, a + 50)) for a in (0, 50)]
    assert sum(b.documents_damaged for b in halves) == 1


class Sender(torch.utils.data.IterableDataset):
    """Yields the batches of a list, as flat buffers, from a worker process."""

    def __init__(self, built):
        self.built = built

    def __iter__(self):
        assert torch.utils.data.get_worker_info() is not None
        return iter([to_wire(b) for b in self.built])


def test_a_batch_crosses_from_a_worker_as_one_tensor_unchanged(corpora):
    datasets, _, lengths = corpora
    whole = [[Piece(k, shard, d, 0, n)] for (k, shard, d), n in lengths.items()]
    sources = [Source(d, 1.0) for d in datasets]
    length = max(lengths.values())
    sent = [build_batch(whole[i : i + 3], sources, VOCAB, length, range(3)) for i in range(0, len(whole) - 3, 3)]
    sent += [build_batch([[]], sources, VOCAB, length, [7])]
    sent = [replace(b, cursors={3: (i, [0, 1])}, end_sequence=i) for i, b in enumerate(sent)]
    got = list(torch.utils.data.DataLoader(Sender(sent), batch_size=None, num_workers=1))
    assert len(got) == len(sent)
    for before, (flat, header) in zip(sent, got, strict=True):
        after = from_wire(flat, header)
        for f in fields(PackedBatch):
            a, b = getattr(before, f.name), getattr(after, f.name)
            if isinstance(a, torch.Tensor):
                assert a.dtype == b.dtype, f.name
                assert a.shape == b.shape, f.name
                assert a.numpy().tobytes() == b.numpy().tobytes(), f.name
                assert b.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr(), "copied"
                assert b.data_ptr() % b.itemsize == 0
            else:
                assert a == b, f.name
