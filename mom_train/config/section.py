"""The base class of all sections of a config: which values no key accepts, and how paths are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from mom_tokenizers.errors import UserError

PATH_KEYS = ("path", "raw", "run")
"""Keys whose text names a place: a path or a URL, and in `raw` also a glob. Values of type Path name places too."""


Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A section of a config. Unknown keys and numbers that are not finite are errors, and values cannot be changed."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        validate_default=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses booleans as numbers and an empty path, which Pydantic would read as 1, 0 and the working folder."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        within = value if isinstance(value, list | tuple) else [value]
        if isinstance(value, dict) and any(get_origin(kind) is dict for kind in kinds):  # a mapping, not a section
            within = list(value.values())
        if bool not in kinds and any(isinstance(v, bool) for v in within):
            raise UserError("true and false are not values of this key")
        if Path in kinds and value == "":
            raise UserError("the path is empty")
        # The user's folder ~ is expanded here, because a shell does so only at the start of a word, and YAML never.
        if Path in kinds or str(info.field_name) in PATH_KEYS:
            if isinstance(value, list | tuple):
                return [os.path.expanduser(v) if isinstance(v, str) else v for v in value]
            return os.path.expanduser(value) if isinstance(value, str) else value
        return value
