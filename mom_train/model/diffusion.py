"""The image loss of Transfusion: latent patches of pictures get noise in the input, which the model must predict.

    loss = mean over patches and channels of (prediction - target)^2,  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps

The prediction is made at the positions of the patches themselves. Each picture has one timestep. Every random draw is a
function of (seed, sequence, picture), so no random state needs to be saved, and a resumed run repeats exactly.

Two options change which noise is drawn, in training, and visited, in sampling. Let x_t = a x_0 + s eps, and let
lambda = log(a^2 / s^2) be its logarithmic signal-to-noise ratio.

    shift by alpha:       lambda' = lambda - 2 log(alpha)        (Esser et al., arXiv 2403.03206, section 5.3.2)
    logit-normal draw:    lambda = -2 z,  z ~ N(mean, deviation)  (the same, section 3.1)

For a rectified flow, a = 1 - t and s = t, the first is t' = alpha t / (1 + (alpha - 1) t), and the second is
t = sigmoid(z). The more values a picture has, the more noise is needed to hide it, because neighbouring values say
the same; alpha = sqrt(m / n) makes m values as noisy as a schedule for n values meant. The model is told the noise
itself, as the timestep of the unshifted schedule that has it, so the same weights can be used with any shift.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mom_tokenizers.vocab import VocabLayout
from mom_train.config.model import DiffusionConfig

TIME_WIDTH = 256
"""Number of sines and cosines that encode a timestep."""


@dataclass(frozen=True)
class NoisedPatches:
    """The P noised patches of a batch and what is to be predicted from them.

    x (P, W) fp32; target (P, W) fp32; row (P,) and picture (P,) of each patch; timestep (I,) of each picture, int64, or
    fp32 between two timesteps where the schedule is shifted.
    """

    x: Tensor
    target: Tensor
    row: Tensor
    picture: Tensor
    timestep: Tensor


def cosine_alpha_bar(steps: int) -> Tensor:
    """abar_t for t = 0..steps-1, in fp32: the product of 1 - beta of the cosine schedule (Nichol & Dhariwal, arXiv
    2102.09672, eq. 17), with beta at most 0.999."""
    return _alpha_bar(steps).float()


def _alpha_bar(steps: int) -> Tensor:
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0)


@lru_cache(maxsize=8)
def log_snr(config: DiffusionConfig) -> np.ndarray:
    """lambda_t = log(a_t^2 / s_t^2) for t = 0..steps-1 of the schedule without a shift, float64, decreasing. A flow's
    last is -inf."""
    if config.prediction == "flow":
        t = np.arange(1, config.steps + 1) / config.steps
        with np.errstate(divide="ignore"):
            return 2 * (np.log1p(-t) - np.log(t))
    alpha_bar = _alpha_bar(config.steps).numpy()
    return np.log(alpha_bar) - np.log1p(-alpha_bar)


def levels(config: DiffusionConfig, timestep: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, ...]:
    """(a, s, told) at timesteps of a schedule that is shifted by alpha, each float64 of the same shape: the factors of
    the data and of the noise, and the timestep that has this noise without a shift, which the model is told. Timestep
    -1 stands for no noise."""
    if config.prediction == "flow":
        t = (timestep + 1) / config.steps
        s = alpha * t / (1 + (alpha - 1) * t)
        return 1 - s, s, config.steps * s - 1
    table = log_snr(config)
    shifted = np.where(timestep < 0, np.inf, table[timestep]) - 2 * np.log(alpha)
    told = np.interp(-shifted, -table, np.arange(config.steps))
    return np.sqrt(_sigmoid(shifted)), np.sqrt(_sigmoid(-shifted)), told


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


@lru_cache(maxsize=8)
def _drawn_up_to(config: DiffusionConfig) -> Tensor:
    """The probability that the logit-normal draw gives a timestep of at most t, for t = 0..steps-1, float64."""
    if config.prediction == "flow":  # timestep t stands for the times between t / T and (t + 1) / T
        logit = -log_snr(config) / 2
    else:  # timestep t stands for the noise that is nearer to its own than to that of its neighbours
        table = log_snr(config)
        logit = np.append(-(table[:-1] + table[1:]) / 4, np.inf)
    return torch.special.ndtr(torch.from_numpy((logit - config.logit_mean) / config.logit_deviation))


def draw(seed: int, sequence: int, picture: int, config: DiffusionConfig, leads: bool) -> tuple[int, torch.Generator]:
    """The timestep of the `picture`-th picture of a sequence, and the generator for its noise.

    `leads` says whether text follows the picture in its document, so that `noise_limit` applies.
    """
    digest = hashlib.blake2b(f"noise/{seed}/{sequence}/{picture}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)
    limit = min(config.steps, config.noise_limit or config.steps) if leads else config.steps
    if config.draw == "uniform":
        return int(torch.randint(limit, (), generator=generator)), generator
    up_to = _drawn_up_to(config)[:limit]
    share = torch.rand((), generator=generator, dtype=torch.float64) * up_to[-1]
    return min(int(torch.searchsorted(up_to, share, right=True)), limit - 1), generator


def noise(
    latents_PW: Tensor,
    picture_P: Tensor,
    timestep_I: Tensor,
    epsilon_PW: Tensor,
    config: DiffusionConfig,
) -> tuple[Tensor, Tensor]:
    """Returns (noised patches, target), both in fp32: in bf16, the first ten timesteps would have no noise at all."""
    x0 = (latents_PW.float() - (config.latent_shift or 0.0)) * (config.latent_scale or 1.0)
    t_P = timestep_I[picture_P.long()]
    if config.shifted:
        a_I, s_I, _ = levels(config, timestep_I.numpy(), shifts(config, picture_P, len(timestep_I)))
        a, s = (torch.from_numpy(x).float()[picture_P.long()].unsqueeze(1) for x in (a_I, s_I))
        x_t = a * x0 + s * epsilon_PW
        if config.prediction == "flow":
            return x_t, epsilon_PW - x0
        return x_t, epsilon_PW if config.prediction == "epsilon" else a * epsilon_PW - s * x0
    if config.prediction == "flow":
        s = ((t_P + 1) / config.steps).unsqueeze(1)
        return (1 - s) * x0 + s * epsilon_PW, epsilon_PW - x0
    abar = cosine_alpha_bar(config.steps).to(x0.device)[t_P].unsqueeze(1)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * epsilon_PW
    target = epsilon_PW if config.prediction == "epsilon" else abar.sqrt() * epsilon_PW - (1 - abar).sqrt() * x0
    return x_t, target


def shifts(config: DiffusionConfig, picture_P: Tensor, pictures: int) -> np.ndarray:
    """The shift alpha of each of some pictures, float64 (I,); `picture_P` says to which a patch belongs."""
    patches = torch.bincount(picture_P.long(), minlength=pictures).tolist()
    return np.array([config.alpha(n) for n in patches])


def told(config: DiffusionConfig, timestep_I: Tensor, picture_P: Tensor) -> Tensor:
    """What the model is told of the noise of each picture: its timestep, or where the schedule is shifted the timestep
    without a shift that has the same noise, fp32 (I,)."""
    if not config.shifted:
        return timestep_I
    return torch.from_numpy(levels(config, timestep_I.numpy(), shifts(config, picture_P, len(timestep_I)))[2]).float()


class PatchEmbedding(nn.Module):
    """Maps patches into the residual stream: a linear map plus an embedding of the timestep of the picture."""

    def __init__(self, config: DiffusionConfig, dim: int):
        super().__init__()
        self.patch_in = nn.Linear(config.patch_width, dim)
        self.time_in = nn.Linear(TIME_WIDTH, dim)
        self.time_out = nn.Linear(dim, dim)

    def forward(self, patches: NoisedPatches) -> Tensor:
        """Returns (P, dim). P may be 0, so that a rank without pictures does the same collective operations."""
        half = TIME_WIDTH // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=patches.x.device) / half)
        angle = patches.timestep.float().unsqueeze(1) * frequency
        time_Id = self.time_out(F.silu(self.time_in(torch.cat([angle.cos(), angle.sin()], 1))))
        return self.patch_in(patches.x) + time_Id.index_select(0, patches.picture)


class PatchHead(nn.Module):
    """Maps the residual stream to a prediction for each patch. It starts from zero, as in diffusion transformers."""

    def __init__(self, config: DiffusionConfig, dim: int):
        super().__init__()
        self.patch_out = nn.Linear(dim, config.patch_width)

    def forward(self, x_Pd: Tensor) -> Tensor:
        return self.patch_out(x_Pd).float()


def without_condition(tokens: Tensor, vocab: VocabLayout) -> Tensor:
    """The ids before a picture as the unconditional pass of classifier-free guidance reads them.

    `tokens` are int64 vocabulary ids of any shape; the result has the same shape. Every id of content, whether text or
    codes of any modality, becomes <null>. The special ids stay: the opening of the document and the brackets of spans
    say where a picture is and not what it shows, and the weights for a position are chosen by its modality, which does
    not change. The latents of earlier pictures are not ids and stay as well. So guidance is towards the words and the
    speech, with the same earlier pictures in both passes.

    Training (`objective.drop_conditions`) and sampling (`generate/sampler.py`) both call this function, because
    sampling must use the same unconditional input that the model was trained on.
    """
    specials = torch.tensor(sorted(vocab.specials.values()), device=tokens.device)
    return torch.where(torch.isin(tokens, specials), tokens, vocab.specials["null"])
