"""The image loss of Transfusion: latent patches of pictures get noise in the input, which the model must predict.

    loss = mean over patches and channels of (prediction - target)^2,  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps

The prediction is made at the positions of the patches themselves. Each picture has one timestep. Every random draw is a
function of (seed, sequence, picture), so no random state needs to be saved, and a resumed run repeats exactly.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

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

    x (P, W) fp32; target (P, W) fp32; row (P,) and picture (P,) of each patch; timestep (I,) of each picture.
    """

    x: Tensor
    target: Tensor
    row: Tensor
    picture: Tensor
    timestep: Tensor


def cosine_alpha_bar(steps: int) -> Tensor:
    """abar_t for t = 0..steps-1, in fp32: the product of 1 - beta of the cosine schedule (Nichol & Dhariwal, arXiv
    2102.09672, eq. 17), with beta at most 0.999."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0).float()


def draw(seed: int, sequence: int, picture: int, config: DiffusionConfig, leads: bool) -> tuple[int, torch.Generator]:
    """The timestep of the `picture`-th picture of a sequence, and the generator for its noise.

    `leads` says whether text follows the picture in its document, so that `noise_limit` applies.
    """
    digest = hashlib.blake2b(f"noise/{seed}/{sequence}/{picture}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)
    limit = min(config.steps, config.noise_limit or config.steps) if leads else config.steps
    return int(torch.randint(limit, (), generator=generator)), generator


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
    if config.prediction == "flow":
        s = ((t_P + 1) / config.steps).unsqueeze(1)
        return (1 - s) * x0 + s * epsilon_PW, epsilon_PW - x0
    abar = cosine_alpha_bar(config.steps).to(x0.device)[t_P].unsqueeze(1)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * epsilon_PW
    target = epsilon_PW if config.prediction == "epsilon" else abar.sqrt() * epsilon_PW - (1 - abar).sqrt() * x0
    return x_t, target


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
