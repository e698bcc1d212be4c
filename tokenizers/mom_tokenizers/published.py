"""Published models, whole, from folders on this machine: nothing is fetched, and no code there runs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from mom_tokenizers.errors import UserError


def load_published(folder: Path, library: str, name: str, **options: Any) -> Any:
    """Class `name` of "transformers" or "diffusers" with the weights of `folder`, only to be evaluated.

    Raises UserError for a folder that is no such model, for weights that lack tensors, and for weights that hold more
    of one of the model's parts than config.json says there is. Other parts, such as a head for a task, are left out.
    """
    try:
        model, info = getattr(import_module(library), name).from_pretrained(
            str(folder), local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:  # whatever the libraries below raise
        weights = "safetensors (or tensors in a .bin)" if options.get("weights_only") else "safetensors"
        raise UserError(f"{folder}: not a {library} {name} folder with {weights}: {error}") from error
    # both libraries leave such weights random, with a warning at most; the mask's embedding is for training
    if lacking := sorted(key for key in info["missing_keys"] if not key.endswith("masked_spec_embed")):
        raise UserError(f"{folder}: the weights lack {len(lacking)} tensors of {name}, e.g. {lacking[0]}")
    parts, prefix = {part for part, _ in model.named_children()}, getattr(model, "base_model_prefix", "") or ""
    names = {key: key.removeprefix(f"{prefix}.") for key in info["unexpected_keys"]}
    if more := sorted(key for key, inner in names.items() if inner.split(".")[0] in parts):
        raise UserError(
            f"{folder}: the weights hold {len(more)} tensors that {name} has no place for, e.g. {more[0]}: its "
            "config.json is that of another model"
        )
    return model.eval().requires_grad_(False)
