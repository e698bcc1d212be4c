"""Loads published models from folders on this machine. Nothing is downloaded, no code from the folders is run, and a
model is accepted only where its weights are complete."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from mom_tokenizers.errors import UserError


def load_published(folder: Path, library: str, name: str, **options: Any) -> Any:
    """A model of class `name` of "transformers" or "diffusers" with the weights of `folder`, in evaluation mode.

    Raises UserError where the library is too old for this class, where the folder does not hold such a model, where
    tensors are missing from the weights, and where the weights hold more tensors for a part of the model than its
    config.json describes. Weights of other parts, such as a head for a task, are ignored.
    """
    installed = import_module(library)
    if (kind := getattr(installed, name, None)) is None:
        raise UserError(
            f"{folder}: the installed {library} {installed.__version__} has no class {name}; install a newer one with "
            f"`pip install -U {library}`"
        )
    try:
        model, info = kind.from_pretrained(str(folder), local_files_only=True, output_loading_info=True, **options)
    except Exception as error:  # the libraries raise many kinds of exceptions
        weights = "safetensors (or tensors in a .bin)" if options.get("weights_only") else "safetensors"
        raise UserError(f"{folder}: not a {library} {name} folder with {weights}: {error}") from error
    # Both libraries leave missing weights random, with at most a warning. What is for training only may be missing: the
    # embedding of masks, and the number of batches that a batch norm has seen.
    needless = ("masked_spec_embed", "num_batches_tracked")
    if lacking := sorted(key for key in info["missing_keys"] if not key.endswith(needless)):
        raise UserError(f"{folder}: the weights lack {len(lacking)} tensors of {name}, e.g. {lacking[0]}")
    parts, prefix = {part for part, _ in model.named_children()}, getattr(model, "base_model_prefix", "") or ""
    names = {key: key.removeprefix(f"{prefix}.") for key in info["unexpected_keys"]}
    if more := sorted(key for key, inner in names.items() if inner.split(".")[0] in parts):
        raise UserError(
            f"{folder}: the weights hold {len(more)} tensors that {name} has no place for, e.g. {more[0]}: its "
            "config.json is that of another model"
        )
    return model.eval().requires_grad_(False)
