"""Reads YAML files that users write, and replaces files in one step, so that nobody reads a partly written one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mom_tokenizers.errors import UserError, user_path


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`, text as UTF-8.

    Whoever reads it meanwhile, or after a crash, finds the old content or the new content, never a part. The bytes are
    on the disk when this returns. Raises OSError; then the old content is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


class UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a mapping with the same key twice. PyYAML itself silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):  # PyYAML itself refuses a list or a mapping as a key
                continue
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"found the key {key.value!r} twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The value in a user's YAML file. Raises UserError where it cannot be opened, is not valid YAML, or names a key of
    a mapping twice."""
    with user_path(path):
        text = Path(path).read_text(encoding="utf-8")
    try:
        return yaml.load(text, UniqueKeys)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {error}") from error
