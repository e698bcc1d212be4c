"""The sections of a config that describe the model: its blocks, its routing and its losses."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import (
    Field,
    PositiveInt,
    model_validator,
)

from mom_tokenizers.errors import UserError
from mom_tokenizers.media.shapes import WIDEST, Shapes
from mom_train.config.section import Section

Part = Literal["in_proj", "x_proj", "dt_proj", "out_proj", "attention", "feed_forward", "norm"]


PROJECTIONS: tuple[Part, ...] = ("in_proj", "x_proj", "dt_proj", "out_proj")
"""The parts that the paper decouples. Mixture-of-Mamba is a Mamba that has all four of them once per modality."""


_PARTS: dict[str, tuple[Part, ...]] = {
    "mamba": (*PROJECTIONS, "norm"),
    "transformer": ("attention", "feed_forward", "norm"),
}


_ONLY: dict[str, tuple[str, ...]] = {
    "mamba": ("state", "conv", "expand", "dt_rank", "normalise", "normalise_eps"),
    "transformer": ("heads", "base_heads", "rope_base", "qk_norm"),
}


_COUNTERPART = {"normalise": "model.qk_norm", "qk_norm": "model.normalise"}
"""What does for the other architecture what a key does for its own."""


_PART_OF: dict[str, Part] = {
    "qkv_proj": "attention",
    "gate_up_proj": "feed_forward",
    "down_proj": "feed_forward",
}
"""The part that decouples a projection, where it has another name."""


QUARTERS = 4
"""Number of parts that validation divides the diffusion timesteps into: t0 has the least noise and t3 the most."""


class ModelConfig(Section):
    """The blocks of the model and which of their parts each modality has for itself."""

    architecture: Literal["mamba", "transformer"] = "mamba"
    """Kind of block: `mamba` is Mamba-1; `transformer` is attention with rotary positions (RoPE) and a SwiGLU
    feed-forward."""
    dim: PositiveInt
    """Width of the residual stream. The inner width of a Mamba block is `expand` times this."""
    base_dim: PositiveInt | None = None
    """Width at which the learning rate was tuned (muP). Initial values, learning rates and weight decay are then scaled
    so that the same settings are meant to fit at `dim`. null scales nothing, which is the same as the value of `dim`.
    See docs/explanation/width-transfer.md."""
    layers: PositiveInt
    """Number of layers. A layer is two Mamba blocks, as in the published model, or one Transformer block."""
    decoupled: tuple[Part, ...]
    """Parts of a block that have separate weights for each modality. All four `*_proj` make the Mixture-of-Mamba, and
    [] makes a dense model. In a Transformer, attention, feed_forward and norm together make the
    Mixture-of-Transformers. A Mamba may have `norm` as well."""
    router: Literal["rule", "learned"] = "rule"
    """What chooses the matrix of a decoupled projection for a token. With `rule`, the token's modality does, and with
    more than one expert a learned top-1 router chooses among those of the modality. With `learned`, a learned top-1
    router chooses among all."""
    experts: PositiveInt = 1
    """Number of matrices per modality in each decoupled projection. More than one makes a mixture of experts inside
    each modality (`router: rule`) or a larger pool of experts for all tokens (`router: learned`)."""
    heads: PositiveInt | None = None
    """Number of attention heads (Transformer only). `dim / heads` must be an even number."""
    base_heads: PositiveInt | None = None
    """Number of attention heads at the width `base_dim` (Transformer only). null stands for `heads`, so that heads grow
    wider with the model instead of more."""
    rope_base: float = Field(default=10000.0, gt=1)
    """Base of the rotary position embedding (Transformer only)."""
    state: PositiveInt = 16
    """N, the size of the state of each channel (Mamba only)."""
    conv: PositiveInt = 4
    """Number of taps of the causal convolution (Mamba only)."""
    expand: PositiveInt = 2
    """Inner width of a block as a multiple of `dim` (Mamba only)."""
    dt_rank: PositiveInt | None = None
    """Rank of the time-step projection (Mamba only). null stands for ceil(dim / 16)."""
    norm_eps: float = Field(default=1e-5, gt=0, lt=1)
    """Number that RMSNorm adds to the mean square before it takes the root."""
    normalise: bool = False
    """Whether dt, B and C, the three parts of the output of x_proj, each pass an RMSNorm without weights, as in
    FalconMamba (Mamba only). It limits how large the steps and the inputs of the scan can become. See
    docs/explanation/stability.md."""
    normalise_eps: float = Field(default=1e-6, gt=0, lt=1)
    """The number that the norms of `normalise` add to the mean square. The default is that of FalconMamba."""
    qk_norm: bool = False
    """Whether queries and keys pass an RMSNorm in each head before the rotary embedding (Transformer only). Its weights
    are shared by the heads of a block, and separate for each modality if `norm` is decoupled. It limits how large the
    scores of attention can become. See docs/explanation/stability.md."""
    identical_modalities: bool = False
    """Start every modality from the same weights. Otherwise the weights of each are drawn independently."""

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
                f"router={self.router}, experts={self.experts}: there is nothing to choose between, because no part "
                "but norms is decoupled; name parts in model.decoupled, or leave router and experts out"
            )
        if self.architecture == "transformer" and (self.heads is None or self.dim % (2 * self.heads)):
            raise UserError(f"a transformer needs heads such that dim / heads is even (dim {self.dim})")
        if self.base_heads is not None and self.base_dim is None:
            raise UserError("base_heads: it belongs to base_dim, which is not set")
        base = self.base
        if base.heads is not None and base.dim % (2 * base.heads):
            raise UserError(
                f"base_dim / {'heads' if self.base_heads is None else 'base_heads'} must be an even number "
                f"({base.dim} / {base.heads}); set base_heads if the model of width {base.dim} had other heads"
            )
        [other] = {*_ONLY} - {self.architecture}
        for key in _ONLY[other]:
            if getattr(self, key) != type(self).model_fields[key].default:
                instead = f"; {_COUNTERPART[key]} is for a {self.architecture}" if key in _COUNTERPART else ""
                raise UserError(f"{key}: only a {other} has it, and this is a {self.architecture}{instead}")
        if self.normalise_eps != type(self).model_fields["normalise_eps"].default and not self.normalise:
            raise UserError("normalise_eps: there are no such norms; set model.normalise=true, or leave it out")
        return self

    @property
    def blocks(self) -> int:
        """Number of blocks in the model."""
        return self.layers if self.architecture == "transformer" else 2 * self.layers

    @property
    def feed_forward(self) -> int:
        """Hidden width of the SwiGLU feed-forward: 8/3 of `dim`, rounded up to a multiple of 256."""
        return -(-8 * self.dim // (3 * 256)) * 256

    @property
    def head(self) -> int:
        """Width of an attention head."""
        assert self.heads is not None, "a Mamba has no heads"
        return self.dim // self.heads

    @property
    def inner(self) -> int:
        """Inner width of a Mamba block."""
        return self.expand * self.dim

    @property
    def base(self) -> ModelConfig:
        """The same model at the width `base_dim`, or this model if that is not set."""
        if self.base_dim is None:
            return self
        changes = {"dim": self.base_dim, "heads": self.base_heads or self.heads, "base_dim": None, "base_heads": None}
        return self.model_copy(update=changes)

    @property
    def matrices(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """For each projection of a block, its input width and the rows of the linear maps that its matrix stacks.

        in_proj stacks the maps to x and to z, x_proj those to dt, B and C, qkv_proj those to q, k and v, and
        gate_up_proj those to gate and up. A decoupled projection has all of this once per modality (and expert).
        """
        d, D, h = self.dim, self.inner, self.feed_forward
        if self.architecture == "transformer":
            return {
                "qkv_proj": (d, (d, d, d)),
                "out_proj": (d, (d,)),
                "gate_up_proj": (d, (h, h)),
                "down_proj": (h, (d,)),
            }
        return {
            "in_proj": (d, (D, D)),
            "x_proj": (D, (self.rank, self.state, self.state)),
            "dt_proj": (self.rank, (D,)),
            "out_proj": (D, (d,)),
        }

    @property
    def routed(self) -> list[str]:
        """Projections whose matrix a learned router chooses."""
        if self.router == "rule" and self.experts == 1:
            return []
        return [name for name in self.matrices if self.copies(name, 2) > 1]

    def copies(self, projection: str, modalities: int) -> int:
        """Number of matrices of a projection: one, or one for each modality and expert if its part is decoupled."""
        part: str = _PART_OF.get(projection, projection)
        if self.architecture == "transformer" and projection == "out_proj":
            part = "attention"
        return modalities * self.experts if part in self.decoupled else 1

    @property
    def rank(self) -> int:
        """Rank of the time-step projection: `dt_rank`, or by default ceil(dim / 16)."""
        return self.dt_rank or -(-self.dim // 16)


class PictureShapesConfig(Section):
    """The shapes that pictures may have besides the square. It has the values that `shapes` has in tokenizers.yaml."""

    tokens: PositiveInt
    """Number of codes or latent patches of a square picture. No other picture has more."""
    max_aspect_ratio: float = Field(4.0, gt=1, le=WIDEST)
    """How many times as long the longer side of a picture may be."""

    @model_validator(mode="after")
    def _fits(self) -> PictureShapesConfig:
        _ = self.shapes  # raises an error if there is no such table
        return self

    @property
    def shapes(self) -> Shapes:
        """The table of shapes. Raises UserError for a table that is not possible."""
        return Shapes(self.tokens, self.max_aspect_ratio)


class DiffusionConfig(Section):
    """The image loss of Transfusion, which denoises latent patches (DDPM)."""

    patch_width: PositiveInt
    """Number of values in a patch: latent channels x patch side squared. It must equal the `latent_width` of the
    shards."""
    weight: float = Field(5.0, ge=0)
    """Weight lambda of the image loss in LM + lambda * DDPM. The paper does not state it; all nine rows of its Table 4
    give (overall - text) / image = 5."""
    steps: PositiveInt = 1000
    """T, the number of diffusion steps of the cosine schedule."""
    prediction: Literal["epsilon", "v", "flow"] = "epsilon"
    """What the model predicts: `epsilon` is the noise, as in the paper; `v` is the v-prediction; `flow` is the velocity
    of a rectified flow."""
    noise_limit: PositiveInt | None = None
    """Timesteps below this one are drawn for a picture that has text after it in its document. null sets no limit; the
    paper mentions none. The limit counts before a shift, which raises or lowers the noise of each timestep."""
    shift: float | None = Field(None, gt=0)
    """alpha, by which the noise schedule is shifted as in SD3: the ratio of noise to signal is alpha times as large at
    every timestep, in training and in sampling. 3 is SD3's for pictures of 1,024 x 1,024. null is no shift, or that of
    `shift_base`."""
    shift_base: PositiveInt | None = None
    """Number of values of a picture (patches x patch_width) for which the schedule needs no shift. A picture of m
    values has alpha = sqrt(m / shift_base). 4096 is RAE's. null is no shift, or that of `shift`."""
    draw: Literal["uniform", "logit_normal"] = "uniform"
    """How training draws timesteps: `uniform` gives each the same share; `logit_normal` gives those in the middle of
    the schedule more, as SD3 does. The shift comes on top."""
    logit_mean: float = 0.0
    """Mean of log(noise / signal) in the logit-normal draw. Above 0 there is more noise."""
    logit_deviation: float = Field(1.0, gt=0)
    """Standard deviation of log(noise / signal) in the logit-normal draw."""
    condition_dropout: float = Field(0.0, ge=0, le=1)
    """Share of pictures whose preceding text and codes are replaced by <null>, so that the model learns to be sampled
    with classifier-free guidance. Special tokens and earlier pictures stay."""
    latent_scale: float | None = Field(None, gt=0)
    """Number that latents are multiplied by (the scaling_factor of a VAE). null takes the number that the shards
    record, or 1 if they record none."""
    latent_shift: float | None = None
    """Number that is subtracted from latents before they are scaled. null takes the number that the shards record, or 0
    if they record none."""

    @model_validator(mode="after")
    def _fits(self) -> DiffusionConfig:
        if self.steps < QUARTERS:
            raise UserError(f"steps={self.steps}: at least {QUARTERS}, as losses are logged by quarter of timesteps")
        if self.noise_limit is not None and self.noise_limit > self.steps:
            raise UserError(f"noise_limit={self.noise_limit} is above steps={self.steps}, so it limits nothing")
        if self.shift is not None and self.shift_base is not None:
            raise UserError(
                f"shift={self.shift} and shift_base={self.shift_base} both say how far the noise schedule is shifted; "
                "give one of them"
            )
        if self.draw == "uniform" and (self.logit_mean, self.logit_deviation) != (0.0, 1.0):
            raise UserError("logit_mean and logit_deviation have no effect; set draw: logit_normal, or leave them out")
        return self

    @property
    def shifted(self) -> bool:
        """Whether the noise schedule is shifted."""
        return self.shift is not None or self.shift_base is not None

    def alpha(self, patches: int) -> float:
        """The factor by which the shift of the noise schedule raises the ratio of noise to signal of a picture of
        `patches` patches. 1 is no shift."""
        if self.shift_base is not None:
            return math.sqrt(patches * self.patch_width / self.shift_base)
        return self.shift or 1.0


class ObjectiveConfig(Section):
    """The losses that are added to the cross-entropy of the next token."""

    load_balance: float = Field(default=0.01, ge=0)
    """Weight of the load-balance loss of the learned routers. It has no effect in a model that has no router."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the z-loss: the squared log-normaliser of the softmax, averaged over targets."""
    diffusion: DiffusionConfig | None = None
    """Settings of continuous pictures (Transfusion). null makes every modality discrete (Chameleon)."""
