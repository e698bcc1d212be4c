"""The sections of a config that say what the model is: its blocks, its routing, its losses."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)

from mom_tokenizers.errors import UserError
from mom_train.config.section import Section

Part = Literal["in_proj", "x_proj", "dt_proj", "out_proj", "attention", "feed_forward", "norm"]


PROJECTIONS: tuple[Part, ...] = ("in_proj", "x_proj", "dt_proj", "out_proj")
"""What the paper decouples: Mixture-of-Mamba is Mamba with all four of them by modality."""


_PARTS: dict[str, tuple[Part, ...]] = {
    "mamba": (*PROJECTIONS, "norm"),
    "transformer": ("attention", "feed_forward", "norm"),
}


_ONLY: dict[str, tuple[str, ...]] = {
    "mamba": ("state", "conv", "expand", "dt_rank"),
    "transformer": ("heads", "rope_base"),
}


QUARTERS = 4
"""Parts that a validation divides the timesteps of diffusion into: t0 has the least noise, t3 the most."""


class ModelConfig(Section):
    architecture: Literal["mamba", "transformer"] = "mamba"
    """Which block: Mamba-1, or attention (RoPE) with a SwiGLU feed-forward."""
    dim: PositiveInt
    """Width of the residual stream. Mamba's inner width is `expand` times this."""
    layers: PositiveInt
    """A layer is two Mamba blocks, as in the published model, or one Transformer block."""
    decoupled: tuple[Part, ...]
    """Parts with weights of their own for each modality. Mixture-of-Mamba: all four *_proj; dense: []. Transformer:
    attention, feed_forward and norm together make the Mixture-of-Transformers. `norm` gives Mamba per-modality norms
    as well."""
    router: Literal["rule", "learned"] = "rule"
    """Who chooses a decoupled projection's matrix: the token's modality, or a learned top-1 router per projection."""
    experts: PositiveInt = 1
    """Matrices per modality. More than one makes a mixture of experts inside each modality (`rule`), or a larger pool
    (`learned`)."""
    heads: PositiveInt | None = None
    """Attention heads (Transformer only); must divide `dim`."""
    rope_base: float = Field(default=10000.0, gt=1)
    """Base of the rotary position embedding (Transformer only)."""
    state: PositiveInt = 16
    """N, the size of each channel's state."""
    conv: PositiveInt = 4
    """Taps of the causal convolution."""
    expand: PositiveInt = 2
    """Inner width over `dim`."""
    dt_rank: PositiveInt | None = None
    """Rank of the time-step projection; ceil(dim / 16) by default."""
    norm_eps: float = Field(default=1e-5, gt=0, lt=1)
    """Added to the mean square in RMSNorm."""
    identical_modalities: bool = False
    """Start every modality from the same weights instead of independent draws."""

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        known = _PARTS[self.architecture]
        for part in self.decoupled:
            if part not in known:
                raise UserError(f"a {self.architecture} has no part '{part}' to decouple; it has {', '.join(known)}")
            if self.decoupled.count(part) > 1:
                raise UserError(f"decoupled names '{part}' twice")
        if (self.router != "rule" or self.experts > 1) and not {*self.decoupled} - {"norm"}:
            raise UserError(
                f"router={self.router}, experts={self.experts}: there is nothing to choose between, for no part but "
                "norms is decoupled; name parts in model.decoupled, or leave router and experts out"
            )
        if self.architecture == "transformer" and (self.heads is None or self.dim % (2 * self.heads)):
            raise UserError(f"a transformer needs heads such that dim / heads is even (dim {self.dim})")
        [other] = {*_ONLY} - {self.architecture}
        for key in _ONLY[other]:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise UserError(f"{key}: only a {other} has it, and this is a {self.architecture}")
        return self

    @property
    def blocks(self) -> int:
        return self.layers if self.architecture == "transformer" else 2 * self.layers

    @property
    def feed_forward(self) -> int:
        """Hidden width of the SwiGLU feed-forward: 8/3 of `dim`, rounded up to a multiple of 256."""
        return -(-8 * self.dim // (3 * 256)) * 256

    @property
    def inner(self) -> int:
        return self.expand * self.dim

    @property
    def rank(self) -> int:
        return self.dt_rank or -(-self.dim // 16)


class DiffusionConfig(Section):
    """The image loss of Transfusion: denoising of latent patches (DDPM)."""

    patch_width: PositiveInt
    """Values of a patch: latent channels x patch side squared, as the shards' `latent_width`."""
    weight: float = Field(5.0, ge=0)
    """Lambda in LM + lambda * DDPM. 5 is recovered from Table 4: (overall - text) / image in all nine rows."""
    steps: PositiveInt = 1000
    """T, diffusion steps of the cosine schedule."""
    prediction: Literal["epsilon", "v", "flow"] = "epsilon"
    """What the model predicts: the noise (the paper), v, or the velocity of a rectified flow."""
    noise_limit: PositiveInt | None = None
    """Largest timestep (exclusive) for a picture that precedes text in its document; null, as the paper is silent."""
    condition_dropout: float = Field(0.0, ge=0, le=1)
    """Share of pictures whose preceding text and codes are replaced by <null>, for classifier-free guidance. Special
    tokens and earlier pictures stay."""
    latent_scale: float | None = Field(None, gt=0)
    """Latents are multiplied by this (a VAE's scaling_factor); null takes the shards', which is 1 where they record
    none."""
    latent_shift: float | None = None
    """Subtracted from the latents before scaling; null takes the shards', which is 0 where they record none."""

    @model_validator(mode="after")
    def _fits(self) -> DiffusionConfig:
        if self.steps < QUARTERS:
            raise UserError(f"steps={self.steps}: at least {QUARTERS}, for losses are told by quarter of the timesteps")
        if self.noise_limit is not None and self.noise_limit > self.steps:
            raise UserError(f"noise_limit={self.noise_limit} is above steps={self.steps}, so it limits nothing")
        return self


class ObjectiveConfig(Section):
    load_balance: float = Field(default=0.01, ge=0)
    """Weight of the routers' load-balance loss, where there are routers."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-normaliser of the softmax, averaged over targets."""
    diffusion: DiffusionConfig | None = None
    """Continuous pictures (Transfusion). Without it every modality is discrete (Chameleon)."""
