import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from mom_data.batches.batch import assemble_document
from mom_data.shards.format import TokenSegment
from mom_tokenizers.bundle import Tokenizers
from mom_tokenizers.errors import UserError
from mom_tokenizers.speech.delay import undelayed
from mom_tokenizers.vocab import VocabLayout
from mom_train.config.model import PROJECTIONS, DiffusionConfig, ModelConfig
from mom_train.config.sampling import PromptConfig
from mom_train.generate.sampler import Sampler, Sampling, denoise, sample_document, timesteps
from mom_train.generate.samples import check_latents, prompt_segments
from mom_train.model.diffusion import NoisedPatches
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.ops.layout import RowLayout

VOCAB = VocabLayout({"text": 40, "image": 16, "speech": 8})
MAMBA = ModelConfig(dim=32, layers=1, decoupled=PROJECTIONS)
TRANSFORMER = ModelConfig(architecture="transformer", dim=32, layers=2, heads=2, decoupled=())


def build(config, diffusion=None):
    model = LanguageModel(config, VOCAB.size, 3, diffusion=diffusion).eval()
    initialize(model, 0)
    with torch.no_grad():  # brackets likely enough that every kind of span comes up
        model.head.weight[[VOCAB.specials["boi"], VOCAB.specials["bosp"]]] += 0.5
    return model


@pytest.mark.parametrize("limit", [None, 2.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_denoising_is_diffusers_ddim(prediction, limit):
    config = DiffusionConfig(patch_width=6, prediction=prediction)
    theirs = DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", set_alpha_to_one=True,
        clip_sample=limit is not None, clip_sample_range=limit or 1.0,
        prediction_type="epsilon" if prediction == "epsilon" else "v_prediction", timestep_spacing="trailing",
    )  # fmt: skip
    theirs.set_timesteps(20)
    pairs = timesteps(config, 20)
    assert [t for t, _ in pairs] == theirs.timesteps.tolist()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    for t, following in pairs:
        x = denoise(x, torch.sin(3 * x + t), t, following, config, limit or np.inf)
        y = theirs.step(torch.sin(3 * y + t), t, y).prev_sample
    torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)


def test_euler_steps_of_a_flow_reach_the_data_along_a_straight_line():
    config = DiffusionConfig(patch_width=1, prediction="flow", steps=100)
    data, eps = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    x = eps.clone()
    for t, following in timesteps(config, 7):
        x = denoise(x, eps - data, t, following, config)
    assert x.item() == pytest.approx(2.0, abs=1e-5)


@pytest.mark.parametrize("config", [MAMBA, TRANSFORMER], ids=["mamba", "transformer"])
@pytest.mark.parametrize("diffusion", [None, DiffusionConfig(patch_width=4)], ids=["codes", "latents"])
def test_sampled_documents_are_well_formed_and_repeat_with_their_seed(config, diffusion):
    model = build(config, diffusion)
    sampling = Sampling(max_tokens=120, patches_per_picture=9, max_units=12, denoising_steps=3)
    prompt = [TokenSegment(0, np.array([1, 2, 3])), TokenSegment(1, np.zeros(0, np.uint32))]
    kinds = set()
    for seed in range(3):
        spans = list(sample_document(model, VOCAB, prompt, sampling, seed))
        assert spans[0][0] == "image"
        for modality, values in spans:
            kinds.add(modality)
            if isinstance(values, torch.Tensor):
                assert modality == "image"
                assert values.shape == (9, 4)
                assert values.isfinite().all()
                continue
            size = dict(VOCAB.sizes)[modality]
            extra = len(VOCAB.specials) if modality == "text" else 0
            assert all(0 <= i < size + extra for i in values)
            if modality == "image":
                assert len(values) == 9
            if modality == "speech":
                assert 1 <= len(values) <= 12
        again = list(sample_document(model, VOCAB, prompt, sampling, seed))
        assert [m for m, _ in again] == [m for m, _ in spans]
        for (_, a), (_, b) in zip(spans, again, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert kinds == {"text", "image", "speech"}


def test_greedy_sampling_follows_the_full_forward():
    model = build(MAMBA)
    sampler = Sampler(model, VOCAB, Sampling(temperature=0), 0)
    ids, routes, _ = assemble_document(
        [TokenSegment(0, np.array([5, 6])), TokenSegment(1, np.arange(9)), TokenSegment(0, np.array([7]))],
        VOCAB.modalities,
        VOCAB,
    )
    for token, modality in zip(ids[:-1].tolist(), routes.tolist(), strict=False):
        sampler.read([token], modality)
    modality = torch.from_numpy(routes[:-1])[None]
    layout = RowLayout.sort(modality, torch.zeros(modality.shape, dtype=torch.int32), 3)
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(ids[:-1])[layout.rows], layout)
    expected = logits[layout.order.long()[-1]]
    torch.testing.assert_close(sampler.logits_V, expected, atol=1e-4, rtol=1e-4)
    allowed = torch.ones(VOCAB.size, dtype=torch.bool)
    assert sampler.choose(allowed) == int(expected.argmax())
    allowed[int(expected.argmax())] = False
    assert sampler.choose(allowed) == int(expected.topk(2).indices[1])


def test_top_p_samples_only_the_likeliest():
    sampler = Sampler(build(MAMBA), VOCAB, Sampling(temperature=1.0, top_p=0.6), 0)
    sampler.logits_V = torch.full((VOCAB.size,), -10.0)
    sampler.logits_V[[3, 4, 5]] = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    drawn = {sampler.choose(torch.ones(VOCAB.size, dtype=torch.bool)) for _ in range(200)}
    assert drawn == {3, 4}


def test_guidance_moves_the_prediction_away_from_the_unconditional_one():
    """Guided by w, the first step's prediction is u + w (c - u), with u from the same positions with <null>."""
    diffusion = DiffusionConfig(patch_width=4)
    model = build(MAMBA, diffusion)
    torch.nn.init.normal_(model.patch_head.patch_out.weight)
    results = {}
    for w in (1.0, 3.0):
        sampling = Sampling(guidance=w, patches_per_picture=4, denoising_steps=1, denoised_limit=np.inf)
        sampler = Sampler(model, VOCAB, sampling, 0)
        sampler.read([VOCAB.specials["bos"], 1, 2, 3, VOCAB.specials["boi"]])
        results[w] = sampler.picture()
    nulls = [VOCAB.specials[k] for k in ("bos", "null", "null", "null", "boi")]

    def first_prediction(ids):
        sampler = Sampler(model, VOCAB, Sampling(patches_per_picture=4), 0)
        sampler.read(ids)
        layout = sampler._layout(4, 1, picture=True)
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
        patches = NoisedPatches(x, x, layout.order.long(), torch.zeros(4, dtype=torch.int64), torch.tensor([999]))
        with torch.no_grad():
            predicted = model(torch.full((4,), VOCAB.specials["null"]), layout, None, patches, sampler.state)[1]
        return x, predicted

    x, conditional = first_prediction([VOCAB.specials["bos"], 1, 2, 3, VOCAB.specials["boi"]])
    _, without = first_prediction(nulls)
    for w, result in results.items():
        expected = denoise(x, without + w * (conditional - without), 999, -1, diffusion)
        torch.testing.assert_close(result, expected, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("config", [MAMBA, TRANSFORMER], ids=["mamba", "transformer"])
def test_guidance_of_codes_moves_logits_away_from_those_of_a_picture_that_begins_its_document(config):
    """The greedy codes at strength w, against whole sequences that the model reads at once in float64: at each position
    the largest of u + w (c - u), with u after <bos> <boi> and the same codes."""
    model, w = build(config), 6.0
    bos, boi = (VOCAB.specials[k] for k in ("bos", "boi"))
    sampling = Sampling(guidance=w, temperature=0, patches_per_picture=6)
    prompt = [TokenSegment(0, np.array([1, 2, 3])), TokenSegment(1, np.zeros(0, np.uint32))]
    drawn = next(sample_document(model, VOCAB, prompt, sampling, 0))[1]
    model = model.double()

    def logits(before, codes):
        ids = torch.tensor([*before, *VOCAB.ids("image", np.array(codes, np.int64)).tolist()])
        modality = torch.tensor([[0] * len(before) + [1] * len(codes)], dtype=torch.uint8)
        layout = RowLayout.sort(modality, torch.zeros_like(modality, dtype=torch.int32), 3)
        with torch.no_grad():
            sorted_TV, _ = model(ids[layout.rows.long()], layout)
        return sorted_TV[layout.order.long()][-1][VOCAB.ids("image", np.arange(16))]

    expected: list[int] = []
    plain: list[int] = []
    for _ in range(6):
        c, u = logits([bos, 1, 2, 3, boi], expected), logits([bos, boi], expected)
        expected.append(int((u + w * (c - u)).argmax()))
        plain.append(int(logits([bos, 1, 2, 3, boi], plain).argmax()))
    assert drawn == expected != plain


def test_guidance_of_a_model_without_pictures_is_refused():
    vocab = VocabLayout({"text": 40, "speech": 8})
    with pytest.raises(UserError, match="only pictures are guided, and this model has none"):
        next(sample_document(build(MAMBA), vocab, [], Sampling(guidance=2.0), 0))


@pytest.mark.parametrize(
    ("prompt", "settings", "diffusion", "message"),
    [
        ([TokenSegment(0, np.arange(20))], {"max_tokens": 21}, None, "takes 21 positions of at most 21"),
        ([TokenSegment(1, np.arange(9))], {"max_tokens": 5}, None, "takes 12 positions of at most 5"),
        ([], {"denoising_steps": 9}, DiffusionConfig(patch_width=4, steps=8), "9 denoising steps, of 8"),
    ],
)
def test_what_would_be_written_as_nothing_or_otherwise_than_asked_is_refused(prompt, settings, diffusion, message):
    with pytest.raises(UserError, match=message):
        next(sample_document(build(MAMBA, diffusion), VOCAB, prompt, Sampling(**settings), 0))


def test_a_prompt_up_to_the_limit_and_a_span_opened_beyond_it_are_written():
    model, text = build(MAMBA), TokenSegment(0, np.arange(20))
    assert list(sample_document(model, VOCAB, [text], Sampling(max_tokens=22, max_units=3), 0))
    opened = [text, TokenSegment(1, np.zeros(0, np.uint32))]
    sampling = Sampling(max_tokens=10, patches_per_picture=9)
    assert [m for m, _ in sample_document(model, VOCAB, opened, sampling, 0)] == ["image"]
    empty = list(sample_document(model, VOCAB, [TokenSegment(0, np.zeros(0))], Sampling(max_tokens=9), 0))
    nothing = list(sample_document(model, VOCAB, [], Sampling(max_tokens=9), 0))
    assert empty == nothing


def test_an_autoencoder_of_another_width_than_the_models_is_named_with_both():
    class Described:
        def describe(self):
            return {"image": {"fingerprint": "f00", "patch_width": 128, "model_class": "AutoencoderDC"}}

    message = r"patches of 12 values .*, but .* AutoencoderDC f00, have 128"
    with pytest.raises(UserError, match=message):
        check_latents(Described(), DiffusionConfig(patch_width=12))
    check_latents(Described(), DiffusionConfig(patch_width=128))
    check_latents(Tokenizers(()), DiffusionConfig(patch_width=12))


@pytest.mark.parametrize("start", ["text", "video"])
def test_a_span_that_the_vocabulary_has_not_cannot_be_opened(start):
    with pytest.raises(UserError, match=f"no spans of .{start}. to open; .* are: image, speech"):
        prompt_segments(PromptConfig(text="", start=start), Tokenizers(()), VOCAB)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"patches_per_picture": 0},
        {"max_units": 0},
    ],
)
def test_sampling_that_nothing_could_come_of_cannot_be_described(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Sampling(**settings)


def test_only_ids_that_the_tokenizer_has_are_sampled():
    sampling = Sampling(max_tokens=120, patches_per_picture=9, sizes={"text": 10, "image": 3, "speech": 2})
    for modality, values in sample_document(build(MAMBA), VOCAB, [TokenSegment(1, np.zeros(0))], sampling, 0):
        below = [i for i in values if i < VOCAB.sizes[VOCAB.modalities.index(modality)][1]]
        assert all(i < sampling.sizes[modality] for i in below)


def test_several_codebooks_are_sampled_as_whole_recordings_in_the_delay_pattern():
    model = build(MAMBA)
    prompt = [TokenSegment(2, np.zeros(0, np.uint32))]
    frames = set()
    for seed in range(12):
        sampling = Sampling(max_units=15, max_tokens=40, codebooks={"speech": 2})
        modality, ids = next(sample_document(model, VOCAB, prompt, sampling, seed))
        assert modality == "speech"
        codes_TK = undelayed(np.array(ids), 2, dict(VOCAB.sizes)["speech"] // 2)  # raises for any other order
        frames.add(len(codes_TK))
    assert min(frames) >= 1
    assert max(frames) <= 7
    assert len(frames) > 2
