"""The section of a config that describes the optimiser Muon."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mom_tokenizers.errors import UserError
from mom_train.config.model import ModelConfig
from mom_train.config.section import Section

Projection = Literal["in_proj", "x_proj", "dt_proj", "out_proj", "qkv_proj", "gate_up_proj", "down_proj"]


class MuonConfig(Section):
    """Muon, which orthogonalises the update of each matrix in the blocks. Everything outside these matrices is trained
    by AdamW with the settings beside this section. See docs/explanation/muon.md."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate of the average of gradients."""
    nesterov: bool = True
    """Whether to mix the gradient into the average once more before it is orthogonalised."""
    iterations: int = Field(default=5, ge=1, le=20)
    """Number of Newton-Schulz iterations."""
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """a, b and c of an iteration X <- aX + b(XX^T)X + c(XX^T)^2X. The default is the published one (Jordan 2024)."""
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor on the learning rate for a matrix of A rows and B columns. `match_rms_adamw` is 0.2 sqrt(max(A, B)), which
    makes updates as large as those of AdamW, so that its learning rate and weight decay fit (arXiv 2502.16982).
    `original` is sqrt(max(1, A / B)), which needs a learning rate of its own, such as 0.02."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the iteration, and of what ranks send each other for it. The momentum is always fp32. On a processor
    without bf16 instructions `bf16` makes a step several times slower than `fp32`."""
    exclude: tuple[Projection, ...] = ()
    """Projections that AdamW trains instead, such as [in_proj]. Megatron does so for the in_proj of Mamba."""

    @model_validator(mode="after")
    def _once(self) -> MuonConfig:
        for name in self.exclude:
            if self.exclude.count(name) > 1:
                raise UserError(f"exclude names '{name}' twice")
        return self

    def names(self, model: ModelConfig) -> list[str]:
        """Names of the projections that Muon trains. Raises UserError if there are none, or if the model lacks one of
        those that are excluded."""
        for name in self.exclude:
            if name not in model.matrices:
                raise UserError(
                    f"optimizer.muon.exclude names '{name}', but a {model.architecture} has only "
                    f"{', '.join(model.matrices)}"
                )
        if not (names := [name for name in model.matrices if name not in self.exclude]):
            raise UserError(
                "optimizer.muon.exclude names every projection, so Muon has nothing to orthogonalise: exclude fewer, "
                "or set optimizer.kind: adamw"
            )
        return names
