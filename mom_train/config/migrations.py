"""The schema number of saved configs and checkpoints, and how those of earlier schemas are read today.

Everything that a run saves carries the number `schema`: its config.yaml, the train_state.json of each checkpoint, and
what tools/export_model.py writes. A file without the number has schema 1. Code that reads one of these files calls
`migrated_config` or `migrated_state`, so that the rest of the code knows only the current schema.

A new key needs no entry here if its default does what the code did before. Raise SCHEMA and add an entry if a key is
renamed or removed, if its default differs from what was done before, or if a value that was accepted is now refused.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

from mom_tokenizers.errors import UserError

SCHEMA = 2
Values = dict[str, Any]


def migrated_config(values: Mapping[str, Any], where: object, unnumbered: int = 1) -> Values:
    """The config of `values` in the current schema, without its number. `values` is not changed.

    `unnumbered` is the schema of a config that has no number: a file that somebody wrote by hand has the current one.
    Any part of the config may be missing. Raises UserError, which names `where`, for a schema that this version does
    not know.
    """
    migrated = copy.deepcopy(dict(values))
    for step in range(_number(migrated, where, unnumbered), SCHEMA):
        migrated = _CONFIGS[step](migrated)
    return migrated


def migrated_state(values: Mapping[str, Any], where: object) -> Values:
    """The train state of a checkpoint, with its config, in the current schema. Raises UserError as `migrated_config`
    does."""
    migrated = dict(values)
    number = _number(migrated, where, 1)
    if isinstance(migrated.get("config"), Mapping):
        migrated["config"] = migrated_config(migrated["config"], where, number)
    return migrated


def _number(values: Values, where: object, unnumbered: int) -> int:
    number = values.pop("schema", unnumbered)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UserError(f"{where}: schema {number!r} is not the number of a schema")
    if number > SCHEMA:
        made_by = values.get("version")
        here = importlib.metadata.version("mixture-of-mamba")
        raise UserError(
            f"{where} has schema {number}; this version of mixture-of-mamba ({here}) reads schemas up to {SCHEMA}. "
            + (f"Install version {made_by}, which wrote it, or a newer one." if made_by else "Install a newer one.")
        )
    return number


def _without_effect_left_out(values: Values) -> Values:
    """Removes settings that schema 1 accepted although nothing ever read them, and that are refused now."""
    model, objective, data = (values.get(key) or {} for key in ("model", "objective", "data"))
    for key in ("rope_base",) if model.get("architecture", "mamba") == "mamba" else ("state", "conv", "expand"):
        model.pop(key, None)
    if model.get("architecture") == "transformer":
        model.pop("dt_rank", None)
    if "decoupled" in model:
        model["decoupled"] = list(dict.fromkeys(model["decoupled"]))
        if not {*model["decoupled"]} - {"norm"}:
            model.pop("router", None)
            model.pop("experts", None)
    diffusion, sampling = objective.get("diffusion"), values.get("sampling") or {}
    if not diffusion or not (diffusion.get("condition_dropout") or values.get("init_from")):
        sampling.pop("guidance", None)
    if not sampling.get("every"):
        for key in ("denoising_steps", "prompts"):
            sampling.pop(key, None)
    sets = data.get("validation") or {}
    if not sets and "validation" in values:
        values["validation"].pop("every", None)
    sources = [*(data.get("train") or ()), *(source for entries in sets.values() for source in entries)]
    for source in sources:
        if source.get("path") is not None:
            source.pop("split", None)
    return values


_CONFIGS: dict[int, Callable[[Values], Values]] = {1: _without_effect_left_out}
"""For each earlier schema, the function that turns a config of it into one of the next schema."""
