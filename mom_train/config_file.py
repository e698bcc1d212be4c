"""A run's YAML file: inheritance, dotted overrides, and errors that say where and what would be right.

base: ../chameleon/common.yaml      # optional, relative to this file; mappings merge, the rest replaces
model: {dim: 256, layers: 4}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mom_tokenizers.errors import UserError
from mom_train.config import RunConfig, Section


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config at `path` with dotted overrides applied (`optimizer.learning_rate=1e-3`, `model.decoupled=[]`).

    Raises ValueError naming the file, the key and what would be right.
    """
    values = _read(Path(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override {override!r}: expected key.subkey=value")
        _assign(values, key.split("."), _parse(text), override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}:" + "".join(f"\n  {_explain(e)}" for e in error.errors())) from None


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: its chain of 'base' files comes back to itself")
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no config file {path}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values")
    base = values.pop("base", None)
    if base is None:
        return values
    return _merge(_read(path.parent / base, (*seen, path.resolve())), values)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _parse(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override value {text!r}: {error}") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _assign(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        inner: Any = values.get(key)
        if inner is None:
            inner = values[key] = {}
        if isinstance(inner, list) and key != keys[-1]:
            raise UserError(f"override {override!r}: {key} is a list; replace it whole, as {key}=[...]")
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {key} is not a section")
        values = inner
    values[keys[-1]] = value


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(error["loc"])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing"
    message = error["msg"].removeprefix("Value error, ")
    given = f" (given: {error['input']!r})" if not isinstance(error["input"], dict | BaseModel) else ""
    return f"{where}: {message}{given}" if where else message


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """Field names of the section that holds the unknown key at `location`."""
    section: Any = RunConfig
    for part in location[:-1]:
        if isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            inner = [t for t in (annotation, *_arguments(annotation)) if isinstance(t, type) and issubclass(t, Section)]
            if inner:
                section = inner[0]
    return list(section.model_fields)


def _arguments(annotation: Any) -> list[Any]:
    """Every type inside an annotation such as dict[str, tuple[SourceConfig, ...]]."""
    found = []
    for argument in getattr(annotation, "__args__", ()):
        found += [argument, *_arguments(argument)]
    return found
