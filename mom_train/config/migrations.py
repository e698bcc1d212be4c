"""The number of the form that configs and checkpoints are saved in, and how earlier forms become today's.

What a run saves of itself carries `schema`: its config.yaml, each checkpoint's train_state.json, and what
tools/export_model.py writes. Without it, it is of schema 1. Whoever reads one of these goes through `migrated_config`
or `migrated_state`, so the rest of the code knows today's form only.

A new key needs no entry here where its default does what the code did before: it takes the default. Raise SCHEMA and
add an entry where a key is renamed or removed, where its default differs from what was done before, or where a value
that was accepted is now refused.
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
    """A saved config in today's form, without its number; `values` stay as they are. `unnumbered` is the schema of one
    that has none: a file that somebody wrote by hand is of today's. Any part of the config may be missing.

    Raises UserError, which names `where`, for a schema that this version does not know.
    """
    migrated = copy.deepcopy(dict(values))
    for step in range(_number(migrated, where, unnumbered), SCHEMA):
        migrated = _CONFIGS[step](migrated)
    return migrated


def migrated_state(values: Mapping[str, Any], where: object) -> Values:
    """A checkpoint's train state in today's form, its config included. Raises UserError as `migrated_config`."""
    migrated = dict(values)
    number = _number(migrated, where, 1)
    if isinstance(migrated.get("config"), Mapping):
        migrated["config"] = migrated_config(migrated["config"], where, number)
    return migrated


def _number(values: Values, where: object, unnumbered: int) -> int:
    number = values.pop("schema", unnumbered)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UserError(f"{where}: schema {number!r} is no number of a schema")
    if number > SCHEMA:
        made_by = values.get("version")
        here = importlib.metadata.version("mixture-of-mamba")
        raise UserError(
            f"{where} has schema {number}; this version of mixture-of-mamba ({here}) reads schemas up to {SCHEMA}. "
            + (f"Install version {made_by}, which wrote it, or a newer one." if made_by else "Install a newer one.")
        )
    return number


def _without_effect_left_out(values: Values) -> Values:
    """Schema 1 accepted settings that nothing ever read. They are refused now, and mean what their absence means."""
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
"""Schema -> what makes a config of it one of the next schema."""
