"""The section of a config that describes the optimiser and the learning rate over the run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from mom_tokenizers.errors import UserError
from mom_train.config.muon import MuonConfig
from mom_train.config.section import Section

Decay = Annotated[float, Field(ge=0, lt=1)]


def _default(section: type[Section], key: str) -> Any:
    return section.model_fields[key].default


class RateFactors(Section):
    """Factors on the learning rate by kind of parameter, for AdamW and Muon alike. A factor of 1 changes nothing."""

    embedding: float = Field(default=1.0, gt=0)
    """Factor for the embedding, and for the layers that map patches of pictures and timesteps into the model."""
    head: float = Field(default=1.0, gt=0)
    """Factor for the head, and for the layers that map the model's output to patches."""
    norm: float = Field(default=1.0, gt=0)
    """Factor for the scales of all norms."""
    ssm: float = Field(default=1.0, gt=0)
    """Factor for A_log, D and the bias of the time step (dt_bias) of a Mamba."""
    conv: float = Field(default=1.0, gt=0)
    """Factor for the weights and the bias of a Mamba's convolution."""
    projection: float = Field(default=1.0, gt=0)
    """Factor for everything else in the blocks: the projections, attention, feed-forward and routers."""


class OptimizerConfig(Section):
    """The optimiser, its learning rate over the run, and gradient clipping."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`adamw` trains everything with AdamW. `muon` trains the matrices in the blocks with Muon and everything else with
    AdamW."""
    muon: MuonConfig | None = None
    """Settings of Muon (kind muon only). null takes the default of each."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate, of AdamW and of Muon."""
    warmup: int = Field(0, ge=0)
    """Number of steps over which the learning rate rises linearly to its peak."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """How the learning rate goes on after the warm-up: it falls along a cosine, it stays at its peak, or it stays there
    and falls in the last `decay` steps (warm-up, stable, decay)."""
    decay: PositiveInt | None = None
    """Number of steps at the end over which the learning rate falls (schedule wsd only, which needs it)."""
    decay_shape: Literal["linear", "sqrt", "cosine"] = "linear"
    """How the learning rate falls during the decay (schedule wsd only). With p from 0 to 1, it follows 1 - p, 1 -
    sqrt(p), or half a cosine."""
    final_fraction: float = Field(0.1, ge=0, le=1)
    """Learning rate of the last step as a fraction of the peak (schedules cosine and wsd). With 0, the last step does
    not change the weights, neither by its update nor by weight decay."""
    scale_with_batch: bool = False
    """Whether the learning rate of a step is multiplied by sqrt(batch of the step / training.batch). It needs
    training.batch_ramp."""
    groups: RateFactors = RateFactors()
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay of AdamW and Muon. It applies to matrices only, not to norms, biases, A_log and D."""
    decay_convolution: bool = True
    """Whether the weights of the convolution are decayed too, as in the published training of Mamba."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon. Without it, the embedding of an id that has not occurred yet would become NaN (0 / 0)."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient of the whole model. A gradient with a larger norm is scaled down to it."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> OptimizerConfig:
        if self.kind == "adamw" and self.muon is not None:
            raise UserError("muon: these are settings of Muon, and optimizer.kind is adamw; set kind: muon")
        if self.schedule == "wsd" and self.decay is None:
            raise UserError("schedule wsd needs decay: the number of steps over which the learning rate falls")
        if self.schedule != "wsd":
            given = [key for key in ("decay", "decay_shape") if getattr(self, key) != _default(type(self), key)]
            if given:
                raise UserError(f"{given[0]}: only the schedule wsd has it, and this is {self.schedule}")
        return self

    @property
    def as_muon(self) -> MuonConfig | None:
        """The settings of Muon, or None if AdamW trains everything."""
        return None if self.kind == "adamw" else self.muon or MuonConfig()
