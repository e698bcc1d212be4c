"""The shift of the noise schedule and the draw of timesteps, against diffusers and closed forms."""

import math

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy.stats import kstest, norm

from mom_tokenizers.errors import UserError
from mom_tokenizers.vocab import VocabLayout
from mom_train.config.model import DiffusionConfig, ModelConfig
from mom_train.generate.sampler import Sampler, Sampling, denoise, timesteps
from mom_train.model.diffusion import draw, levels, noise, told
from mom_train.model.init import initialize
from mom_train.model.language_model import LanguageModel
from tests.model.test_diffusion import WIDTH, batch, noised_patches, plan  # noqa: F401, a fixture

PREDICTIONS = ("epsilon", "v", "flow")


def schedule(prediction, **settings):
    return DiffusionConfig.model_validate({"patch_width": WIDTH, "prediction": prediction, **settings})


def some(patches=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(10 * patches, WIDTH, generator=g), torch.randn(10 * patches, WIDTH, generator=g)


PICTURE = torch.arange(10).repeat_interleave(4).to(torch.int32)
TIMESTEP = torch.tensor([0, 1, 5, 50, 100, 300, 500, 700, 900, 989])


@pytest.mark.parametrize("alpha", [3.0, 0.5])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_shift_of_a_variance_preserving_schedule_is_cogvideox(prediction, alpha):
    """Its snr_shift_scale divides the signal-to-noise ratio, which the shift divides by alpha squared."""
    kept = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": False}
    theirs = CogVideoXDDIMScheduler(**(kept | {"beta_schedule": "linear"}), snr_shift_scale=1.0)
    cosine = DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    # CogVideoX has no cosine of its own, so that its formula is applied to diffusers' cosine
    theirs.alphas_cumprod = (cosine / (alpha**2 + (1 - alpha**2) * cosine)).float()
    x0, eps = some()
    config = schedule(prediction, shift=alpha)
    x, target = noise(x0, PICTURE, TIMESTEP, eps, config)
    t_P = TIMESTEP[PICTURE.long()]
    torch.testing.assert_close(x, theirs.add_noise(x0, eps, t_P), atol=2e-4, rtol=1e-3)
    expected = eps if prediction == "epsilon" else theirs.get_velocity(x0, eps, t_P)
    torch.testing.assert_close(target, expected, atol=2e-4, rtol=1e-3)
    ratio = CogVideoXDDIMScheduler(snr_shift_scale=alpha**2, rescale_betas_zero_snr=False).alphas_cumprod.double()
    plain = CogVideoXDDIMScheduler(snr_shift_scale=1.0, rescale_betas_zero_snr=False).alphas_cumprod.double()
    torch.testing.assert_close(plain / (1 - plain) / alpha**2, ratio / (1 - ratio), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("alpha", [3.0, 0.5])
def test_the_shift_of_a_flow_is_that_of_diffusers_scheduler(alpha):
    sigmas = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=alpha).sigmas.flip(0)  # rising
    x0, eps = some()
    x, target = noise(x0, PICTURE, TIMESTEP, eps, schedule("flow", shift=alpha))
    sigma = sigmas[TIMESTEP][PICTURE.long()].unsqueeze(1)
    torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * eps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(target, eps - x0)
    seen = told(schedule("flow", shift=alpha), TIMESTEP, PICTURE)
    torch.testing.assert_close((seen + 1) / 1000, sigmas[TIMESTEP], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_logarithm_of_the_signal_to_noise_ratio_falls_by_two_logarithms_of_alpha(prediction):
    at = np.arange(0, 999)
    a, s, _ = levels(schedule(prediction), at, np.array(1.0))
    shifted_a, shifted_s, seen = levels(schedule(prediction, shift=7.0), at, np.array(7.0))
    np.testing.assert_allclose(2 * np.log(shifted_a / shifted_s), 2 * np.log(a / s) - 2 * math.log(7), atol=1e-9)
    # what the model is told is where the schedule without a shift has the same noise
    inside = seen < 900
    between = np.interp(seen[inside], at, np.log(a / s))
    np.testing.assert_allclose(between, np.log(shifted_a / shifted_s)[inside], atol=5e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_alpha_follows_from_the_values_of_each_picture(prediction):
    """RAE: alpha = sqrt(tokens x channels / 4,096), for pictures of different sizes in the same batch."""
    for tokens, channels, alpha in ((256, 768, 6.928), (1024, 16, 2.0), (256, 16, 1.0), (64, 48, 0.866)):
        config = schedule(prediction, patch_width=channels, shift_base=4096)
        assert config.alpha(tokens) == pytest.approx(alpha, abs=1e-3)
    picture, at = torch.tensor([0] * 4 + [1] * 16, dtype=torch.int32), torch.tensor([500, 500])
    x0, eps = torch.randn(20, WIDTH), torch.randn(20, WIDTH)
    based = schedule(prediction, shift_base=8)
    x, target = noise(x0, picture, at, eps, based)
    for number, rows, alpha in ((0, slice(0, 4), 2.0), (1, slice(4, 20), 4.0)):
        given = schedule(prediction, shift=alpha)
        alone = noise(x0[rows], picture[rows] * 0, at[:1], eps[rows], given)
        torch.testing.assert_close((x[rows], target[rows]), alone)
        assert told(based, at, picture)[number] == told(given, at[:1], picture[rows] * 0)[0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_logit_normal_draw_and_a_shift_are_a_logit_normal_draw_of_another_mean(prediction):
    mean, deviation, alpha, n = 0.4, 0.8, 3.0, 3000
    config = schedule(prediction, draw="logit_normal", logit_mean=mean, logit_deviation=deviation, shift=alpha)
    drawn = np.array([draw(0, i, 0, config, False)[0] for i in range(n)])
    a, s, _ = levels(config, drawn, np.array(alpha))
    logit = np.log(s / np.maximum(a, 1e-12))
    found = kstest(logit, norm(mean + math.log(alpha), deviation).cdf)
    assert found.statistic < 1.63 / n**0.5 + 2e-3  # the 1 % limit, and a timestep's width
    torch.manual_seed(0)
    # diffusers counts from the side of the noise, where u = 0 is the noisiest
    theirs = 1 - compute_density_for_timestep_sampling("logit_normal", n, logit_mean=-mean, logit_std=deviation).numpy()
    assert kstest(logit - math.log(alpha), np.log(theirs / (1 - theirs))).pvalue > 0.01


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("limit", [1, 50, 400])
def test_pictures_that_lead_their_text_stay_below_the_limit_in_the_same_proportions(prediction, limit):
    config = schedule(prediction, draw="logit_normal", noise_limit=limit)
    leading = np.array([draw(0, i, 0, config, True)[0] for i in range(400)])
    assert 0 <= leading.min() <= leading.max() < limit
    if limit == 400:
        every = np.array([draw(1, i, 0, config, False)[0] for i in range(2000)])
        assert kstest(leading, every[every < limit]).pvalue > 0.01


@pytest.mark.parametrize("draws", ["uniform", "logit_normal"])
def test_a_draw_belongs_to_its_picture(draws):
    config = schedule("v", draw=draws)
    assert draw(3, 5, 1, config, False)[0] == draw(3, 5, 1, config, False)[0]
    assert len({draw(3, i, 1, config, False)[0] for i in range(50)}) > 30


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_sampling_with_a_shift_is_diffusers_ddim_on_the_shifted_table(prediction):
    alpha, config = 3.0, schedule(prediction, shift=3.0)
    theirs = DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", set_alpha_to_one=True, clip_sample=False,
        prediction_type="epsilon" if prediction == "epsilon" else "v_prediction", timestep_spacing="trailing",
    )  # fmt: skip
    cosine = theirs.alphas_cumprod.double()
    theirs.alphas_cumprod = (cosine / (alpha**2 + (1 - alpha**2) * cosine)).float()
    theirs.set_timesteps(20)
    x = y = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    for t, following in timesteps(config, 20)[1:]:  # at the first, cosine divides by almost zero
        x = denoise(x, torch.sin(3 * x + t), t, following, config, alpha=alpha)
        y = theirs.step(torch.sin(3 * y + t), t, y).prev_sample
    torch.testing.assert_close(x, y, atol=1e-3, rtol=5e-3)


def test_sampling_a_shifted_flow_is_diffusers_euler():
    config, steps = schedule("flow", shift=3.0), 13
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    pairs = timesteps(config, steps)
    theirs.set_timesteps(sigmas=[(t + 1) / 1000 for t, _ in pairs])
    x = y = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    for (t, following), at in zip(pairs, theirs.timesteps, strict=True):
        assert float(at) == pytest.approx(levels(config, np.array([t]), np.array(3.0))[1][0] * 1000, rel=1e-5)
        x = denoise(x, torch.sin(3 * x + t), t, following, config, alpha=3.0)
        y = theirs.step(torch.sin(3 * y + t), at, y).prev_sample
    torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sampling_visits_and_tells_the_noise_that_training_shows(prediction, monkeypatch):
    config = schedule(prediction, patch_width=4, shift_base=9)  # pictures of 9 patches: alpha = 2
    vocab = VocabLayout({"text": 40, "image": 1})
    model = LanguageModel(ModelConfig(dim=16, layers=1, decoupled=()), vocab.size, 2, diffusion=config).eval()
    initialize(model, 0)
    torch.nn.init.normal_(model.patch_head.patch_out.weight)
    seen, forward = [], model.forward

    def watched(tokens, layout, labels=None, patches=None, state=None):
        result = forward(tokens, layout, labels, patches, state)
        if patches is not None:
            seen.append((float(patches.timestep), patches.x, result[1]))
        return result

    monkeypatch.setattr(model, "forward", watched)
    sampler = Sampler(model, vocab, Sampling(patches_per_picture=9, denoising_steps=4, denoised_limit=np.inf), 0)
    sampler.read([vocab.specials["bos"], vocab.specials["boi"]])
    sampler.picture()
    pairs = timesteps(config, 4)
    expected = told(config, torch.tensor([t for t, _ in pairs]), torch.arange(4).repeat_interleave(9))
    assert [t for t, _, _ in seen] == pytest.approx([*expected.tolist(), 0.0])
    for (t, following), (_, x, predicted), (_, after, _) in zip(pairs, seen[:-1], seen[1:], strict=True):
        torch.testing.assert_close(after, denoise(x, predicted, t, following, config, alpha=2.0))
        assert not torch.allclose(after, denoise(x, predicted, t, following, schedule(prediction)), rtol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_shift_of_one_is_none_up_to_rounding_and_nothing_set_is_the_same_to_the_last_bit(prediction, plan):  # noqa: F811
    one = schedule(prediction, shift=1.0)
    pictures = batch(plan, 6)
    plain, shifted = (noised_patches(pictures, 0, c) for c in (schedule(prediction), one))
    torch.testing.assert_close(shifted.x, plain.x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shifted.timestep, plain.timestep.float(), atol=2e-3, rtol=1e-4)
    assert plain.timestep.dtype == torch.int64
    x0, eps = some()
    x, _ = noise(x0, PICTURE, TIMESTEP, eps, schedule(prediction))
    if prediction == "flow":
        t = ((TIMESTEP[PICTURE.long()] + 1) / 1000).unsqueeze(1)
        assert torch.equal(x, (1 - t) * x0 + t * eps)
    assert torch.equal(x, noise(x0, PICTURE, TIMESTEP, eps, schedule(prediction, draw="logit_normal"))[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 3.0, "shift_base": 4096}, "both say how far"),
        ({"logit_mean": 0.5}, "have no effect; set draw: logit_normal"),
        ({"draw": "logit_normal", "logit_deviation": 0.0}, "logit_deviation"),
        ({"shift": 0.0}, "shift"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises((UserError, ValueError), match=message):
        schedule("flow", **settings)
