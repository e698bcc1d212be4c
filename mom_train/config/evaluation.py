"""The section `evaluation` of the config: retrieval, conditional gains and minimal pairs while a run trains."""

from __future__ import annotations

from pydantic import Field, PositiveInt, model_validator

from mom_tokenizers.errors import UserError
from mom_train.config.data import SourceConfig
from mom_train.config.section import Section


class EvaluationConfig(Section):
    """Evaluations by likelihood on the sets of `data.validation` while the run trains, logged as eval/SET/...:
    retrieval between texts and other segments, conditional gains, and minimal pairs of speech. `mom evaluate` computes
    the same for any checkpoint. No key here changes what is trained."""

    every: PositiveInt | None = None
    """Number of validations between evaluations, such as 4 for every fourth validation. They are also made at step 0
    and after the last step. null makes none."""
    pairs: int = Field(default=64, ge=2)
    """Largest number of documents of each kind that are taken from each set. They are the same every time."""
    pool: int = Field(default=16, ge=2)
    """Number of candidates among which the right one is looked for. The work grows with pairs x pool."""
    draws: PositiveInt = 4
    """Number of timesteps, each with its noise, over which the squared error of a continuous picture is averaged."""
    minimal_pairs: dict[str, tuple[SourceConfig, ...]] = Field(default={})
    """Further sets by name, in which every document consists of two segments of one modality: the right utterance and
    then the altered one. All of their documents are taken."""

    @model_validator(mode="after")
    def _in_pools(self) -> EvaluationConfig:
        if self.pairs < self.pool:
            raise UserError(f"evaluation.pool ({self.pool}) must not be above evaluation.pairs ({self.pairs})")
        return self
