"""The section of a config that says what the model writes while it trains."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt, field_validator

from mom_tokenizers.errors import UserError
from mom_train.config.section import Name, Section


class PromptConfig(Section):
    """What a sampled document begins with."""

    text: str = ""
    """Text that follows the token that opens the document."""
    start: Name | None = None
    """Name of a modality whose span is opened after the text, so that the model fills it."""
    shape: Name | None = None
    """Shape of the picture that `start: image` opens: width:height, such as 2:1, which gives the nearest of
    `picture_shapes`, or one of these as ROWSxCOLUMNS. null makes it square. In YAML a width and a height need quotes,
    '2:1', because YAML takes 2:1 for the number 121, in base 60."""

    @field_validator("shape", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            raise UserError(
                f"{value} is a number: write the shape in quotes, such as '2:1', which YAML reads in base 60"
            )
        return value


class SamplingConfig(Section):
    """Documents that the model writes while it trains, to look at and listen to in RUN/samples/step-N and TensorBoard.
    For this, rank 0 holds the whole model a second time while the other ranks wait. It needs `tokenizers`."""

    every: PositiveInt | None = None
    """Number of steps between samples. They are also written after the last step. null writes none at all."""
    prompts: tuple[PromptConfig, ...] = (PromptConfig(),)
    """The beginnings of the documents. One document is written from each, with the same random draws every time."""
    max_tokens: PositiveInt = 128
    """Largest number of positions in a document, including its prompt. A picture or recording that has begun is
    finished."""
    temperature: float = Field(default=0.9, ge=0)
    """Temperature that the logits are divided by. 0 always takes the most likely id."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus sampling: ids are drawn from the most likely ones that together have this probability."""
    denoising_steps: PositiveInt = 25
    """Number of denoising steps for a continuous picture."""
    guidance: float = Field(default=1.0, ge=0)
    """Strength of the classifier-free guidance of pictures, towards the words before them. 1 means no guidance.
    Continuous pictures need objective.diffusion.condition_dropout for it, and pictures of codes need documents that
    begin with a picture among those that were trained on."""
    seconds: float = Field(default=120.0, gt=0)
    """Number of seconds after which no further document is begun."""
