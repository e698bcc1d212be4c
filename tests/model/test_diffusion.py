from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from mom_data.batches.batch import first_sequences
from mom_data.batches.loader import Share, batches
from mom_data.order.plan import Plan, Source
from mom_data.shards.dataset import TokenDataset
from mom_data.shards.format import TokenSegment
from mom_train.config.model import DiffusionConfig, ModelConfig, ObjectiveConfig
from mom_train.generate.sampler import Sampler, Sampling
from mom_train.model.diffusion import cosine_alpha_bar, noise
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from mom_train.model.objective import Counts, drop_conditions, noised_patches, row_layout
from tests.helpers.corpus import VOCAB, write_dataset

WIDTH = 8
CONFIG = DiffusionConfig(patch_width=WIDTH)


def document(rng, latent_width):
    text = TokenSegment(0, rng.integers(0, 100, int(rng.integers(3, 20))).astype(np.uint16))
    picture = TokenSegment(1, rng.standard_normal((16, latent_width)).astype(np.float16))
    return [text, picture] if rng.random() < 0.5 else [picture, text, picture]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("d") / "d"
    write_dataset(folder, documents=60, shards=1, latent_width=WIDTH, make=document)
    return Plan((Source(TokenDataset(folder), 1.0),), 96, 2, 32, 0)


def batch(plan, rows=6, start=0):
    return next(batches(plan, VOCAB, Share(0, 1, rows, rows), start))


def test_the_schedule_is_diffusers_cosine():
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(cosine_alpha_bar(1000), theirs, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_noising_and_targets_are_diffusers(prediction):
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(40, WIDTH, generator=g), torch.randn(40, WIDTH, generator=g)
    picture = torch.arange(10).repeat_interleave(4).to(torch.int32)
    t = torch.randint(0, 990, (10,), generator=g)
    config = DiffusionConfig(patch_width=WIDTH, prediction=prediction, latent_scale=0.5, latent_shift=0.25)
    x, target = noise(x0, picture, t, eps, config)
    t_P, scheduler = t[picture.long()], DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    scaled = (x0 - 0.25) * 0.5
    torch.testing.assert_close(x, scheduler.add_noise(scaled, eps, t_P), atol=2e-5, rtol=1e-4)
    expected = eps if prediction == "epsilon" else scheduler.get_velocity(scaled, eps, t_P)
    torch.testing.assert_close(target, expected, atol=2e-5, rtol=1e-4)


def test_the_flow_interpolates_and_its_target_is_the_velocity():
    config = DiffusionConfig(patch_width=1, prediction="flow", steps=10)
    x0, eps = torch.tensor([[2.0], [2.0]]), torch.tensor([[5.0], [5.0]])
    x, target = noise(x0, torch.tensor([0, 1]), torch.tensor([9, 4]), eps, config)
    assert x.flatten().tolist() == pytest.approx([5.0, 3.5])
    assert target.flatten().tolist() == pytest.approx([3.0, 3.0])


def test_half_precision_latents_are_noised_in_fp32_even_at_the_first_timesteps():
    latents = torch.zeros(4, WIDTH, dtype=torch.float16)
    x, _ = noise(latents, torch.zeros(4, dtype=torch.int32), torch.tensor([0]), torch.ones(4, WIDTH), CONFIG)
    assert x.dtype == torch.float32
    assert x.min() > 0.005  # bf16 arithmetic would give exactly 0


def test_noise_belongs_to_the_picture_not_to_the_batch_it_comes_in(plan):
    """Therefore ranks, micro-batches and a resume do not change the noise."""
    whole = batch(plan, 6)
    patches = noised_patches(whole, 0, CONFIG)
    at = 0
    for start in (0, 2, 4):
        part = batch(plan, 2, start)
        some = noised_patches(part, 0, CONFIG)
        assert torch.equal(some.x, patches.x[at : at + len(some.x)])
        assert torch.equal(some.timestep[some.picture], patches.timestep[patches.picture][at : at + len(some.x)])
        at += len(some.x)
    assert at == len(patches.x)
    assert not torch.equal(noised_patches(whole, 1, CONFIG).x, patches.x)
    assert len(patches.timestep) == len(patches.x) // 16  # one timestep per picture
    assert len(patches.timestep.unique()) > 3


def test_means_and_log_variances_are_drawn_from_by_the_pictures_own_noise(plan):
    plain = batch(plan, 12)
    clean = noised_patches(plain, 0, CONFIG)

    def with_log_variance(value):
        rows = torch.full_like(plain.latents, value)
        return noised_patches(replace(plain, latents=torch.cat([plain.latents, rows], 1)), 0, CONFIG)

    assert torch.equal(with_log_variance(-100.0).x, clean.x)  # no variance: the means, with the same noise
    eta = (with_log_variance(0.0).x - clean.x).double()
    alpha = cosine_alpha_bar(CONFIG.steps)[clean.timestep].sqrt()[clean.picture]
    kept = alpha > 0.1
    scores = (eta[kept] / alpha[kept, None]).flatten()
    assert scores.mean().abs() < 5 / len(scores) ** 0.5
    assert scores.std() == pytest.approx(1, abs=5 / len(scores) ** 0.5)
    halves = (with_log_variance(-2 * float(np.log(2))).x - clean.x) * 2 - eta
    assert halves.abs().max() < 5e-3  # the log-variance is kept in fp16


def test_pictures_that_lead_their_text_stay_below_the_noise_limit(plan):
    limited = DiffusionConfig(patch_width=WIDTH, noise_limit=50)
    some = batch(plan, 20)
    timestep = noised_patches(some, 0, limited).timestep
    assert some.image_leads.any()
    assert not some.image_leads.all()
    assert (timestep[some.image_leads] < 50).all()
    assert (timestep[~some.image_leads] >= 50).any()
    null = VOCAB.specials["null"]
    for i, leads in enumerate(some.image_leads):  # and it is those that do lead
        row, at = divmod(int(some.latent_position[some.image_of_patch == i][0]), 96)
        same = some.document[row] == some.document[row, at]
        before = some.tokens[row, :at][same[:at]]
        text = (before < 100).sum()
        assert bool(leads) == (text == 0)
        assert null in some.tokens[row]


def test_dropped_conditions_are_the_configured_share_and_lose_their_labels(plan):
    null, some = VOCAB.specials["null"], batch(plan, 40)
    dropped = drop_conditions(some, 0, DiffusionConfig(patch_width=WIDTH, condition_dropout=0.5), VOCAB)
    changed = dropped.tokens != some.tokens
    assert (dropped.tokens[changed] == null).all()
    assert (dropped.labels[changed] == -100).all()
    assert (some.tokens[changed] < 100).all()  # content, never a special token
    hits = []
    for i in range(int(some.image_of_patch.max()) + 1):
        row, at = divmod(int(some.latent_position[some.image_of_patch == i][0]), 96)
        before = (some.document[row] == some.document[row, at]) & (torch.arange(96) < at - 1)
        before &= some.tokens[row] < 100
        if before.any():  # a picture that leads its document has no condition
            hits.append(bool((dropped.tokens[row][before] == null).all()))
    assert 0.3 < sum(hits) / len(hits) < 0.7
    assert drop_conditions(some, 0, CONFIG, VOCAB) is some


TEXT, SPEECH = TokenSegment(0, np.arange(3, dtype=np.uint16)), TokenSegment(2, np.arange(4, dtype=np.uint16))
PICTURE = TokenSegment(1, np.ones((4, WIDTH), np.float16))


@pytest.mark.parametrize(
    "document",
    [[TEXT, PICTURE], [TEXT, PICTURE, TEXT, PICTURE], [SPEECH, PICTURE], [PICTURE, SPEECH, TEXT, PICTURE], [PICTURE]],
    ids=lambda segments: "-".join(VOCAB.modalities[s.modality] for s in segments),
)
def test_sampling_asks_for_the_unconditional_side_that_training_showed(document, tmp_path, monkeypatch):
    """Before the last picture, both sides read the same ids, routed alike; no id of content is among them."""
    write_dataset(tmp_path / "d", documents=1, shards=1, latent_width=WIDTH, make=lambda *_: document)
    plan = Plan((Source(TokenDataset(tmp_path / "d"), 1.0),), 64, 1, 32, 0)
    always = DiffusionConfig(patch_width=WIDTH, condition_dropout=1.0)
    shown = drop_conditions(next(batches(plan, VOCAB, Share(0, 1, 1, 1))), 0, always, VOCAB)
    patches = shown.latent_position[shown.latent_position < int((shown.document[0] == shown.document[0, 0]).sum())]
    last = int(patches[-4])  # where the last picture of the row's first document begins
    trained = list(zip(shown.tokens[0, :last].tolist(), shown.modality[0, :last].tolist(), strict=True))

    model = LanguageModel(ModelConfig(dim=16, layers=1, decoupled=()), VOCAB.size, 3, diffusion=CONFIG).eval()
    initialize(model, 0)
    sampler = Sampler(model, VOCAB, Sampling(guidance=3.0, patches_per_picture=4, denoising_steps=1), 0)
    sampled, forward = [], model.forward

    def watched(tokens, layout, labels=None, patches=None, state=None):
        if state is sampler.unconditional:
            sampled.extend(zip(tokens.tolist(), layout.modality.tolist(), strict=True))
        return forward(tokens, layout, labels, patches, state)

    monkeypatch.setattr(model, "forward", watched)
    sampler.read([VOCAB.specials["bos"]])
    for at, segment in enumerate(document):
        if segment.modality:
            sampler.read([VOCAB.brackets(VOCAB.modalities[segment.modality])[0]])
        if at == len(document) - 1:
            break
        if segment.latent:
            sampler.picture()
        else:
            name = VOCAB.modalities[segment.modality]
            sampler.read(VOCAB.ids(name, segment.values).tolist(), segment.modality)
        if segment.modality:
            sampler.read([VOCAB.brackets(VOCAB.modalities[segment.modality])[1]])
    assert sampled == trained
    assert {token for token, _ in trained} <= set(VOCAB.specials.values())


def test_the_objective_is_the_mean_cross_entropy_plus_five_times_the_mean_square(plan):
    some = batch(plan)
    config = ModelConfig(dim=32, layers=1, decoupled=("in_proj",))
    model = LanguageModel(config, VOCAB.size, 3, diffusion=CONFIG)
    initialize(model, 0)
    torch.nn.init.normal_(model.patch_head.patch_out.weight, std=0.1)
    patches, layout = noised_patches(some, 0, CONFIG), row_layout(some, CONFIG)
    tokens, labels = some.tokens.view(-1)[some.rows], some.labels.view(-1)[some.rows]
    logits, predicted = model(tokens, layout, None, patches)
    losses = model(tokens, layout, labels, patches)
    targets = torch.bincount(torch.from_numpy(VOCAB.modality_of_id)[some.labels[some.labels >= 0]], minlength=3)
    assert targets.tolist()[1] == 0  # no code of a picture is ever a target
    counts = Counts(targets, len(some.latent_position), some.tokens.numel())
    total = counts.objective(losses, ObjectiveConfig(diffusion=CONFIG))
    expected = torch.nn.functional.cross_entropy(logits.double(), labels)
    expected = expected + 5 * torch.nn.functional.mse_loss(predicted.double(), patches.target.double())
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    total.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name

    # a batch without pictures runs the same modules on zero rows
    empty = first_sequences(some, 0)
    assert len(empty.latent_position) == 0
    losses = model(tokens, row_layout(empty, CONFIG), labels, noised_patches(empty, 0, CONFIG))
    assert losses.patches.item() == 0
    model.zero_grad()
    (losses.tokens + losses.patches).backward()
    assert model.patch_embedding.patch_in.weight.grad.abs().sum() == 0


def test_rows_beyond_the_wanted_sequences_lose_labels_and_patches(plan):
    some = batch(plan, 6)
    cut = first_sequences(some, 4)
    assert (cut.labels[4:] == -100).all()
    assert torch.equal(cut.labels[:4], some.labels[:4])
    kept = some.latent_position // 96 < 4
    assert torch.equal(cut.latents, some.latents[kept])
    assert torch.equal(noised_patches(cut, 0, CONFIG).x, noised_patches(some, 0, CONFIG).x[kept])
