"""Weights from elsewhere: our checkpoints, safetensors in our names, or published Mamba-1 (mamba_ssm, Transformers).

A dense model's weights fill every modality of a mixture, so that the mixture starts with exactly the dense model's
loss (upcycling).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mom_tokenizers.errors import UserError
from mom_train.checkpoint_files import Files
from mom_train.checkpoint_store import Checkpoint, Checkpoints
from mom_train.model import LanguageModel

Weights = Mapping[str, Callable[[], Tensor]]
"""Parameter name -> how to read it; nothing is held until it is read."""

# ours -> Transformers' MambaForCausalLM; mamba_ssm differs in one name, `backbone.embedding.weight`
_MIXER = {
    "in_proj.weight": "in_proj.weight",
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "x_proj.weight": "x_proj.weight",
    "dt_proj.weight": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "A_log": "A_log",
    "D": "D",
    "out_proj.weight": "out_proj.weight",
}


def mamba_name(name: str) -> str:
    """Our name of a dense model's parameter -> Transformers'."""
    whole = {
        "embedding.weight": "backbone.embeddings.weight",
        "norm.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
    }
    if name in whole:
        return whole[name]
    found = re.fullmatch(r"blocks\.(\d+)\.block\.(norm\.weight|mixer\.(.+))", name)
    if found is None or (found[3] is not None and found[3] not in _MIXER):
        raise UserError(f"{name} has no counterpart in a published Mamba-1 model")
    layer = f"backbone.layers.{found[1]}."
    return layer + ("norm.weight" if found[3] is None else "mixer." + _MIXER[found[3]])


def to_mamba(name: str, value: Tensor) -> Tensor:
    """A parameter in the shape that Transformers keeps it in."""
    if name.endswith("conv_weight"):
        return value.unsqueeze(1)
    return value.squeeze(0) if name.endswith("dt_bias") else value


def open_weights(path: Path) -> Weights:
    """Weights of a run (its newest checkpoint), of a checkpoint folder, of a .safetensors file, or of a folder of them.

    Published Mamba-1 names and shapes are turned into ours. Raises ValueError where there is nothing to read.
    """
    if (path / ".metadata").is_file():
        return _open_checkpoint(Checkpoint(Files(str(path)), str(path)))
    if path.is_dir() and not any(path.glob("*.safetensors")) and (latest := Checkpoints.of(path).latest()):
        return _open_checkpoint(latest)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(f.is_file() and f.suffix == ".safetensors" for f in files):
        raise UserError(f"{path}: no checkpoint and no .safetensors weights there (pickled weights are not loaded)")
    readers: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        with safe_open(str(file), "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # not a mapping
                readers[name] = _safetensors_reader(file, name)
    if not any(name.startswith("backbone.") for name in readers):
        return readers
    names = {n.replace("backbone.embedding.", "backbone.embeddings."): read for n, read in readers.items()}
    names.setdefault("lm_head.weight", names["backbone.embeddings.weight"])  # tied
    blocks = 1 + max(int(n.split(".")[2]) for n in names if n.startswith("backbone.layers."))
    ours = ["embedding.weight", "norm.weight", "head.weight"]
    ours += [
        f"blocks.{i}.block.{leaf}" for i in range(blocks) for leaf in ("norm.weight", *map("mixer.".__add__, _MIXER))
    ]
    return {name: _from_mamba(name, names[mamba_name(name)]) for name in ours}


def _safetensors_reader(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(str(file), "pt") as stored:
            return stored.get_tensor(name)

    return read


def _from_mamba(name: str, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def shaped() -> Tensor:
        value = read()
        if name.endswith("conv_weight"):
            return value.squeeze(1)
        return value.unsqueeze(0) if name.endswith("dt_bias") else value

    return shaped


def _open_checkpoint(checkpoint: Checkpoint) -> Weights:
    checkpoint.check()
    stored = checkpoint.metadata().state_dict_metadata

    def reader(key: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            entry = stored[key]
            value = torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
            checkpoint.load({key: value}, no_dist=True)
            return value

        return read

    return {key.removeprefix("model."): reader(key) for key in stored if key.startswith("model.")}


@torch.no_grad()
def load_weights(model: LanguageModel, weights: Weights, source: Path) -> None:
    """Fill `model`, sharded or not, one parameter at a time. A parameter with a multiple of the source's rows is
    filled with copies, one per modality; a vocabulary that has grown keeps its own initial rows behind the source's.

    Raises ValueError naming the first parameter that is missing or has another shape.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".router") and name not in weights:
            continue  # a dense model has none; ours keeps its initial one
        if name not in weights:
            raise UserError(f"{source} has no '{name}': it holds another architecture, or a smaller model")
        value, shape = weights[name]().float(), tuple(parameter.shape)
        grown = name in ("embedding.weight", "head.weight") and value.shape[0] < shape[0]
        if grown and value.shape[1:] == shape[1:]:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            value = torch.cat([value, whole[value.shape[0] :].cpu()])
        elif value.shape[1:] == shape[1:] and shape[0] % value.shape[0] == 0:
            value = value.repeat(shape[0] // value.shape[0], *[1] * (value.dim() - 1))
        if tuple(value.shape) != shape:
            raise UserError(f"{source}: '{name}' has shape {tuple(value.shape)}, this model's is {shape}")
        if isinstance(parameter, DTensor):
            shard = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(value)


def transformers_config(model: LanguageModel) -> str:
    """config.json of a dense Mamba for Transformers' MambaForCausalLM."""
    c = model.config
    if c.architecture != "mamba" or c.decoupled:
        raise UserError("only a dense Mamba has a counterpart in Transformers; export the mixture as safetensors")
    values = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": model.head.weight.shape[0],
        "hidden_size": c.dim,
        "state_size": c.state,
        "num_hidden_layers": c.blocks,
        "layer_norm_epsilon": c.norm_eps,
        "expand": c.expand,
        "conv_kernel": c.conv,
        "time_step_rank": c.rank,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": False,
        "residual_in_fp32": True,
    }
    return json.dumps(values, indent=1) + "\n"
