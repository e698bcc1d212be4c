"""Scores of targets are those of whole documents, one at a time, and retrieval and gains follow from them."""

import numpy as np
import pytest
import torch

from mom_data.batches.batch import assemble_document
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import TokenSegment
from mom_tokenizers.errors import UserError
from mom_tokenizers.speech.delay import delayed, undelayed
from mom_train.config.evaluation import EvaluationConfig
from mom_train.distributed.context import Context
from mom_train.distributed.ranks import process_group
from mom_train.model.diffusion import NoisedPatches, cosine_alpha_bar
from mom_train.model.init import initialize
from mom_train.model.language_model import build_model
from mom_train.ops.layout import RowLayout
from mom_train.passes import Passes
from mom_train.validation.evaluations import Evaluations, preferred, recall
from mom_train.validation.likelihood import Likelihood, Question
from mom_train.validation.pairs import altered, find_minimal_pairs, find_pairs, find_utterances
from tests.helpers.corpus import TOKENIZERS, VOCAB, write_dataset
from tests.helpers.run_config import tiny_config

MAMBA = {"dim": 32, "layers": 1, "decoupled": ["in_proj", "x_proj", "dt_proj", "out_proj"]}
TRANSFORMER = {
    "architecture": "transformer", "dim": 32, "layers": 2, "heads": 2, "decoupled": ["attention"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def one():
    with process_group() as ranks:
        yield ranks


def passes(folder, ranks, model=MAMBA, **changes):
    config = tiny_config(folder, model=model, **changes)
    network = build_model(config)
    network.to_empty(device="cpu")
    initialize(network, 1)
    with torch.no_grad():
        network.head.weight.mul_(20)
        if network.patch_head is not None:
            network.patch_head.patch_out.weight.normal_(0, 0.3)
    return Passes(config, config.layout, ranks, network, Context())


def text(rng, n):
    return TokenSegment(0, rng.integers(0, 100, n).astype(np.uint16))


def picture(rng, width=0):
    if width:
        return TokenSegment(1, rng.standard_normal((16, width)).astype(np.float16))
    return TokenSegment(1, rng.integers(0, 32, 16).astype(np.uint16))


def alone(model, before, target):
    """The log-likelihood of a target of codes in a row of its own, in float64. `model` is in float64."""
    ids, modality, _ = assemble_document([*before, target], VOCAB.modalities, VOCAB)
    ids, modality = torch.from_numpy(ids), torch.from_numpy(modality)
    layout = RowLayout.sort(modality[None], torch.zeros(1, len(ids), dtype=torch.int32), 3)
    with torch.no_grad():
        logits, _ = model(ids[layout.rows], layout)
    logits = logits[layout.order.long()]
    p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    end = len(ids) - 1 - (target.modality > 0)
    places = range(end - len(target.values), end)
    return sum(float(p[at - 1, ids[at]].log()) for at in places)


@pytest.mark.parametrize("model", [MAMBA, TRANSFORMER], ids=["mamba", "transformer"])
def test_scores_with_a_shared_beginning_are_those_of_whole_documents_in_float64(folder, one, model):
    rng = np.random.default_rng(0)
    before = (picture(rng), text(rng, 7))
    several = Question(before, tuple(text(rng, n) for n in (5, 9, 1, 5)))
    pictures = Question((text(rng, 12),), tuple(picture(rng) for _ in range(20)))
    lonely = Question((), (text(rng, 30),))
    these = passes(folder, one, model)
    found = Likelihood(these, 1).score([several, pictures, lonely])
    exact = these.model.double()
    for question, scores in zip([several, pictures, lonely], found, strict=True):
        expected = [alone(exact, question.before, target) for target in question.targets]
        assert scores == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("model", [MAMBA, TRANSFORMER], ids=["mamba", "transformer"])
def test_scores_of_latents_are_mean_errors_over_draws_that_all_targets_share(folder, one, model):
    """By hand: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps in whole documents, and the error of the predicted eps."""
    rng = np.random.default_rng(1)
    diffusion = {"patch_width": 4, "latent_scale": 0.5, "latent_shift": 0.1}
    these = passes(folder, one, model, objective={"diffusion": diffusion}, vocabulary=dict(VOCAB.sizes))
    words, first, draws = text(rng, 6), picture(rng, 4), 3
    targets = (*(picture(rng, 4) for _ in range(3)), TokenSegment(1, rng.standard_normal((9, 4)).astype(np.float16)))
    likelihood = Likelihood(these, draws)
    found, captions = likelihood.score([Question((words,), targets), Question((first,), (text(rng, 4), words))])
    steps = these.config.objective.diffusion.steps

    def row(segments, values, t, noise):
        """(logits, prediction) of a document with one picture."""
        ids, modality, [(at, _, _)] = assemble_document(segments, VOCAB.modalities, VOCAB)
        ids, modality, P = torch.from_numpy(ids), torch.from_numpy(modality), len(values)
        number = torch.full((1, len(ids)), -1, dtype=torch.int32)
        number[0, at : at + P] = 0
        layout = RowLayout.sort(modality[None], torch.zeros(1, len(ids), dtype=torch.int32), 3, picture_BL=number)
        x0 = (torch.from_numpy(values.astype(np.float32)) - 0.1) * 0.5
        x = x0 if noise is None else cosine_alpha_bar(steps)[t] ** 0.5 * x0
        if noise is not None:
            x = x + (1 - cosine_alpha_bar(steps)[t]) ** 0.5 * noise
        patches = NoisedPatches(
            x, x, layout.order.long()[at : at + P], torch.zeros(P, dtype=torch.int32), torch.tensor([t])
        )
        with torch.no_grad():
            logits, predicted = these.model(ids[layout.rows], layout, None, patches)
        return ids, logits[layout.order.long()], predicted

    assert these.config.objective.diffusion.prediction == "epsilon"
    for target, score in zip(targets, found, strict=True):
        errors = []
        for draw in range(draws):
            t = [steps // 6, steps // 2, steps * 5 // 6][draw]
            _, _, noise = likelihood._noised(torch.zeros(len(target.values), 4), draw, these.config.objective.diffusion)
            _, _, predicted = row([words, target], target.values, t, noise)
            errors.append((predicted - noise).square().mean().item())
        assert score == pytest.approx(-np.mean(errors), rel=1e-4)
    ids, logits, _ = row([first, words], first.values, 0, None)  # the picture before a caption is read clean
    n = len(words.values)
    nats = torch.nn.functional.cross_entropy(logits[-n - 2 : -2], ids[-n - 1 : -1], reduction="sum").item()
    assert captions[1] == pytest.approx(-nats, rel=1e-4)


def test_pictures_of_the_same_codes_and_other_shapes_have_scores_of_their_own(folder, one):
    """The token that opens a picture says its shape, so a plain picture is not the same one turned."""
    rng = np.random.default_rng(3)
    shapes = {"tokens": 16, "max_aspect_ratio": 4}
    these = passes(folder, one, vocabulary=dict(VOCAB.sizes), picture_shapes=shapes)
    targets = tuple(TokenSegment(1, np.full(16, 3, np.uint16), grid) for grid in ((2, 8), (8, 2), None, (2, 8)))
    [scores] = Likelihood(these, 1).score([Question((text(rng, 6),), targets)])
    assert len(set(scores[:3])) == 3
    assert scores[3] == scores[0]


def test_equal_targets_have_equal_scores_to_the_last_bit(folder, one):
    rng = np.random.default_rng(2)
    twice = text(rng, 8)
    targets = (twice, text(rng, 11), TokenSegment(0, twice.values.copy()), text(rng, 8))
    likelihood, question = Likelihood(passes(folder, one), 1), Question((picture(rng),), targets)
    [scores] = likelihood.score([question])
    [rows], _ = likelihood._rows([question])
    assert len(rows) == 3, "equal targets are computed once, for rows of a batch may differ in the last bit"
    assert scores[0] == scores[2]
    assert len(set(scores.tolist())) == 3


def test_recall_counts_a_tie_as_its_share_of_the_places():
    scores = np.array([[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 5.0, 5.0, 5.0], [2.0, 2.0, 9.0, 1.0]])
    assert recall(scores, np.array([0, 2, 0, 1]), 1).tolist() == [1.0, 0.25, 0.0, 0.0]
    assert recall(scores, np.array([0, 2, 0, 1]), 2).tolist() == [1.0, 0.5, 0.0, 0.5]
    rng = np.random.default_rng(0)  # by brute force: the mean over random orders of equal scores
    some = rng.integers(0, 3, (6, 5)).astype(float)
    right = rng.integers(0, 5, 6)
    for k in (1, 3):
        counts = np.zeros(6)
        for _ in range(4000):
            order = np.lexsort((rng.random(some.shape), -some), axis=1)[:, :k]
            counts += (order == right[:, None]).any(1)
        assert recall(some, right, k) == pytest.approx(counts / 4000, abs=0.03)
    assert preferred(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0])).tolist() == [0.0, 0.5, 1.0]


def test_an_altered_utterance_has_the_same_units_in_another_order():
    units = np.arange(31)
    assert altered(units).tolist() == [*range(10), *range(15, 20), *range(10, 15), *range(20, 31)]
    # with 3 codebooks of 50 codes, the frames change places, and the ids stay a whole recording
    codes_TK = np.stack([np.arange(24), 49 - np.arange(24), np.arange(24) % 7], 1).astype(np.uint16)
    other = altered(delayed(codes_TK, 50).astype(np.uint16), 3, 50)
    assert other.dtype == np.uint16
    frames = [*range(7), *range(12, 17), *range(7, 12), *range(17, 24)]
    np.testing.assert_array_equal(undelayed(other, 3, 50), codes_TK[frames])


def test_utterances_of_several_codebooks_are_altered_by_whole_frames(tmp_path):
    size = VOCAB.sizes[2][1]

    def spoken(rng, _):
        return [TokenSegment(2, delayed(rng.integers(0, size // 2, (30, 2)), size // 2).astype(np.uint16))]

    described = {**TOKENIZERS, "speech": {**TOKENIZERS["speech"], "codebooks": 2}}
    write_dataset(tmp_path / "d", documents=4, shards=1, tokenizers=described, make=spoken)
    found = find_utterances([TokenDataset(tmp_path / "d")], "speech", 4, 1000)
    assert len(found) == 4
    for right, other in found:
        assert (undelayed(right, 2, size // 2) != undelayed(other, 2, size // 2)).any(1).sum() <= 10


def captioned(rng, _):
    """A document whose picture shows its first word: the code is the word, sixteen times. Or an utterance of units
    that count upwards."""
    kind = int(rng.integers(3))
    if kind == 2:
        return [TokenSegment(2, ((int(rng.integers(20)) + np.arange(24)) % 20).astype(np.uint16))]
    word = int(rng.integers(32))
    said = TokenSegment(0, np.array([word, 40, 41], np.uint16))
    shown = TokenSegment(1, np.full(16, word, np.uint16))
    return [said, shown] if kind else [shown, said]


class Knows:
    """A model that has learned `captioned` by heart, as far as it can: it predicts the next id of a document with
    probability one half where it follows from the ids before, and any id equally where it does not."""

    def __init__(self, vocabulary):
        self.V = vocabulary

    def eval(self):
        pass

    def empty_state(self, batch):
        return [State(torch.zeros(batch, 0))]

    def __call__(self, tokens_T, layout, labels_T, patches, state):
        from mom_train.model.language_model import Losses

        order = layout.order.long()
        tokens, labels = (t[order].view(layout.batch, layout.length) for t in (tokens_T, labels_T))
        past = state[0].ids if state else torch.zeros(layout.batch, 0)
        tokens = torch.cat([past.long(), tokens], 1)
        nats = torch.zeros(labels.shape)
        for b, t in (labels >= 0).nonzero().tolist():
            expected = self.after(tokens[b, : past.shape[1] + t + 1].tolist())
            if expected is None:
                nats[b, t] = np.log(self.V)
            else:
                nats[b, t] = np.log(2) if int(labels[b, t]) == expected else np.log(2 * (self.V - 1))
        if state:
            state[0].ids = tokens
        losses = nats.reshape(-1)[layout.rows]
        return Losses(losses.sum(), losses, torch.zeros(()), torch.zeros(()), torch.zeros(0), torch.zeros(()))

    def after(self, ids):
        image, speech = VOCAB.offsets["image"], VOCAB.offsets["speech"]
        boi, eoi = VOCAB.brackets("image")
        last = ids[-1]
        if last >= speech:
            return speech + (last - speech + 1) % 20
        if last >= image:
            return last
        if last == boi and len(ids) > 2:
            return image + ids[1]
        if last == eoi:
            return ids[2] - image
        return None


class State:
    def __init__(self, ids):
        self.ids = ids


@pytest.fixture(scope="module")
def known(tmp_path_factory, one):
    """The evaluations of that model, with the control."""
    folder = tmp_path_factory.mktemp("known")
    write_dataset(folder / "val", documents=180, shards=2, seed=3, make=captioned)
    config = tiny_config(folder / "any")
    these = Passes(config, config.layout, one, Knows(config.layout.size), Context())
    settings = EvaluationConfig(pairs=32, pool=8)
    found = Evaluations(settings, these, {"val": [TokenDataset(folder / "val")]}, {}, control=True)
    return folder, found, found.figures()["val"], config.layout.size


def test_retrieval_and_gains_of_a_model_that_knows_are_as_theory_says(known):
    folder, found, figures, V = known
    pairs = find_pairs([TokenDataset(folder / "val")], "image", 32, lambda *_: True)
    shares = []
    for pool in range(0, 32, 8):
        words = [int(pair.text[0]) for pair in pairs[pool : pool + 8]]
        shares += [1 / words.count(word) for word in words]
    assert min(shares) < 1, "some pictures of a pool are equal"
    for name in ("recall1/text_to_image", "recall1/image_to_text", "recall1_pmi/text_to_image"):
        assert figures[name].value == pytest.approx(np.mean(shares))
        assert figures[name].chance == 1 / 8
        assert len(figures[name].values) == 32
    # without its text, the first code of a picture can be any id; with it, it is known as well as the other fifteen
    alone, after = np.log(V) + 15 * np.log(2), 16 * np.log(2)
    assert figures["loss/image"].value == pytest.approx(alone / 16)
    assert figures["loss/image_after_text"].value == pytest.approx(after / 16)
    assert figures["gain/image_after_text"].value == pytest.approx((alone - after) / 16)
    assert figures["gain_shuffled/image_after_text"].value < 0, "another text misleads"
    assert figures["gain/text_after_image"].value == pytest.approx((np.log(V) - np.log(2)) / 3)
    assert figures["minimal_pairs/altered_speech"].value == 1.0
    assert figures["minimal_pairs/altered_speech"].chance == 0.5
    assert found.notes == [
        "val: 0 documents consist of one text and one speech segment and have at most 128 positions, fewer than a pool "
        "of 8: speech is left out"
    ]


def test_shuffled_pairs_are_at_chance(known):
    _, _, figures, _ = known
    for label in ("text_to_image", "image_to_text"):
        for kind in ("", "_pmi"):
            one = figures[f"recall1{kind}_shuffled/{label}"]
            # 32 queries: a standard deviation is sqrt(p (1 - p) / 32) = 0.058 where each has another answer
            assert abs(one.value - 1 / 8) < 3 * 0.058
            assert figures[f"recall1{kind}/{label}"].value > one.value + 0.3


def test_documents_of_minimal_pairs_are_two_segments_of_one_modality(tmp_path):
    units = np.arange(6, dtype=np.uint16)
    right = [TokenSegment(2, units), TokenSegment(2, units[::-1].copy())]
    write_dataset(tmp_path / "pairs", documents=4, shards=1, make=lambda *_: right)
    found = find_minimal_pairs(TokenDataset(tmp_path / "pairs"), VOCAB, 100)
    assert len(found) == 4
    assert found[0][0].values.tolist() == units.tolist()
    with pytest.raises(UserError, match="a segment of 6 units, more than the 5"):
        find_minimal_pairs(TokenDataset(tmp_path / "pairs"), VOCAB, 5)
    write_dataset(tmp_path / "other", documents=2, shards=1, make=lambda *_: [*right, TokenSegment(0, units)])
    with pytest.raises(UserError, match="has the segments speech, speech, text: a document of minimal pairs"):
        find_minimal_pairs(TokenDataset(tmp_path / "other"), VOCAB, 100)


def test_where_nothing_can_be_evaluated_it_is_said(tmp_path, one):
    write_dataset(
        tmp_path / "text", documents=6, shards=1, make=lambda *_: [TokenSegment(0, np.arange(5, dtype=np.uint16))]
    )
    these = passes(tmp_path / "any", one)
    with pytest.raises(UserError, match="nothing to evaluate: text: 0 documents consist of one text and one image"):
        Evaluations(EvaluationConfig(), these, {"text": [TokenDataset(tmp_path / "text")]}, {})
