"""The base of every section of a config: which values no key takes, and how paths are read."""

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

PATH_KEYS = ("path", "raw")
"""Keys whose text names a place: a path, a URL, and in `raw` a glob as well. So does every value of type Path."""


Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Numbers are finite everywhere, and each has the bounds outside of which nothing could come of it."""

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
        """Pydantic reads true as 1, and an empty path as the working directory; nobody means that."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        within = value if isinstance(value, list | tuple) else [value]
        if isinstance(value, dict) and any(get_origin(kind) is dict for kind in kinds):  # not a section's
            within = list(value.values())
        if bool not in kinds and any(isinstance(v, bool) for v in within):
            raise UserError("true and false are no value of this key")
        if Path in kinds and value == "":
            raise UserError("the path is empty")
        if (
            Path in kinds or str(info.field_name) in PATH_KEYS
        ):  # a shell expands ~ at the start of a word only, and YAML never
            if isinstance(value, list | tuple):
                return [os.path.expanduser(v) if isinstance(v, str) else v for v in value]
            return os.path.expanduser(value) if isinstance(value, str) else value
        return value
