"""Reads the YAML file of a run: inheritance, dotted overrides, and errors that say where and what would be right.

base: ../chameleon/common.yaml      # optional, relative to this file: mappings are merged, other values replaced
model: {dim: 256, layers: 4}
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from mom_tokenizers.errors import UserError
from mom_tokenizers.files import UniqueKeys
from mom_train.config.migrations import SCHEMA, migrated_config
from mom_train.config.run import RunConfig
from mom_train.config.section import Section

S = TypeVar("S", bound=Section)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads the config at `path` and applies dotted overrides (`optimizer.learning_rate=1e-3`, `model.decoupled=[]`).

    Raises UserError, which names the file, the key and what would be right.
    """
    return validated(overridden(_read(Path(path)), overrides), path)


def overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Changes `values` by dotted overrides, and returns them. Raises UserError if one cannot be read."""
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override {override!r}: expected key.subkey=value")
        _assign(values, key.split("."), _parse(text), override)
    return values


def validated(values: Mapping[str, Any], where: object) -> RunConfig:
    """The config of a run from its values in the current schema. Raises UserError, which names `where`, the key and
    what would be right."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}:" + "".join(f"\n  {_explain(e)}" for e in error.errors())) from None


def checked(section: type[S], values: Mapping[str, Any]) -> S:
    """A section of a config from values that a tool was given. Raises UserError, which names each impossible value."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(e) for e in error.errors())) from None


def read_saved(run: str | Path) -> dict[str, Any]:
    """The values of RUN/config.yaml in the current schema, or {} if there is no such file. Raises UserError if the file
    cannot be read."""
    path = Path(run) / "config.yaml"
    return migrated_config(_mapping(path), path) if path.is_file() else {}


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config, completed with the defaults of keys that are newer than it. An incomplete or invalid config is
    returned unchanged."""
    try:
        return RunConfig.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return dict(values)


def differences(was: Any, now: Any, key: str = "") -> list[str]:
    """The differences between two values of a config, one line for each key: `model.dim: 32 -> 64`.

    If two mappings have the same entries in another order, that is a difference too, because the order of a vocabulary
    numbers the modalities.
    """
    if not (isinstance(was, Mapping) and isinstance(now, Mapping)):
        return [] if was == now else [f"{key}: {_shown(was)} -> {_shown(now)}"]
    lines = []
    for name in dict.fromkeys((*was, *now)):
        inner = f"{key}.{name}" if key else str(name)
        lines += differences(was.get(name, _ABSENT), now.get(name, _ABSENT), inner)
    if not lines and list(was) != list(now):
        lines = [f"{key}: the order of {', '.join(map(str, was))} -> {', '.join(map(str, now))}"]
    return lines


_ABSENT = object()


def _shown(value: Any) -> str:
    return "not there" if value is _ABSENT else json.dumps(value, default=str)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: its chain of 'base' files comes back to itself")
    values = _mapping(path)
    base = values.pop("base", None)
    values = migrated_config(values, path, unnumbered=SCHEMA)  # written by hand, so in the current schema
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: base: {base!r} is not the path of a file")
    return _merge(_read(path.parent / base, (*seen, path.resolve())), values)


def _mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except FileNotFoundError:
        raise UserError(f"no config file {path}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values")
    return values


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _parse(text: str) -> Any:
    try:
        value = yaml.load(text, UniqueKeys)
    except (yaml.YAMLError, RecursionError) as error:
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
    """Names of the keys of the section that holds the unknown key at `location`."""
    section: Any = RunConfig
    for part in location[:-1]:
        if isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            inner = [t for t in (annotation, *_arguments(annotation)) if isinstance(t, type) and issubclass(t, Section)]
            if inner:
                section = inner[0]
    return list(section.model_fields)


def _arguments(annotation: Any) -> list[Any]:
    """All types inside an annotation such as dict[str, tuple[SourceConfig, ...]]."""
    found = []
    for argument in getattr(annotation, "__args__", ()):
        found += [argument, *_arguments(argument)]
    return found
