"""Published Mamba-1 models: what their tensors are called, and what their config.json says.

Two libraries write them. Transformers' MambaForCausalLM (and FalconMambaForCausalLM, whose tensors have the same names,
but which normalises dt, B and C) and mamba_ssm's MambaLMHeadModel name the tensors alike but for
one (`backbone.embeddings.weight` and `backbone.embedding.weight`); their config.json have other keys for the same
things, and some published folders hold both kinds. Every key has a meaning here, is known not to change what the model
computes, or is a problem that is reported by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mom_tokenizers.errors import UserError
from mom_train.config.model import ModelConfig

# ours -> theirs
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
_WHOLE = {
    "embedding.weight": "backbone.embeddings.weight",
    "norm.weight": "backbone.norm_f.weight",
    "head.weight": "lm_head.weight",
}
_OURS_MIXER = {theirs: ours for ours, theirs in _MIXER.items()}
_OURS_WHOLE = {theirs: ours for ours, theirs in _WHOLE.items()} | {"backbone.embedding.weight": "embedding.weight"}


def mamba_name(name: str) -> str:
    """Turns our name of a dense model's parameter into the name that Transformers has for it."""
    if name in _WHOLE:
        return _WHOLE[name]
    found = re.fullmatch(r"blocks\.(\d+)\.block\.(norm\.weight|mixer\.(.+))", name)
    if found is None or (found[3] is not None and found[3] not in _MIXER):
        raise UserError(f"{name} has no counterpart in a published Mamba-1 model")
    layer = f"backbone.layers.{found[1]}."
    return layer + ("norm.weight" if found[3] is None else "mixer." + _MIXER[found[3]])


def our_name(name: str) -> str | None:
    """Turns a published tensor's name into our parameter's, or None where our Mamba-1 has no such parameter."""
    found = re.fullmatch(r"backbone\.layers\.(\d+)\.(norm\.weight|mixer\.(.+))", name)
    if found is None:
        return _OURS_WHOLE.get(name)
    if found[3] is None:
        return f"blocks.{found[1]}.block.norm.weight"
    ours = _OURS_MIXER.get(found[3])
    return None if ours is None else f"blocks.{found[1]}.block.mixer.{ours}"


def to_mamba(name: str, value: Tensor) -> Tensor:
    """Gives one of our parameters the shape that it has in Transformers."""
    if name.endswith("conv_weight"):
        return value.unsqueeze(1)
    return value.squeeze(0) if name.endswith("dt_bias") else value


def our_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of our parameter `name`, from the shape in which it is published: the inverse of `to_mamba`."""
    if name.endswith("conv_weight") and len(shape) == 3 and shape[1] == 1:
        return shape[0], shape[2]
    return (1, *shape) if name.endswith("dt_bias") else shape


# Key of config.json -> what it states: a field of ModelConfig, or `blocks`, `rank` and `inner`, its derived sizes.
_STATED = {
    "hidden_size": "dim",
    "d_model": "dim",
    "intermediate_size": "inner",
    "d_inner": "inner",
    "num_hidden_layers": "blocks",
    "n_layer": "blocks",
    "layer_norm_epsilon": "norm_eps",
    "norm_epsilon": "norm_eps",
    "state_size": "state",
    "ssm_cfg.d_state": "state",
    "conv_kernel": "conv",
    "ssm_cfg.d_conv": "conv",
    "expand": "expand",
    "ssm_cfg.expand": "expand",
    "time_step_rank": "rank",
    "ssm_cfg.dt_rank": "rank",
    "mixer_rms_eps": "normalise_eps",
}
_DEFAULTS = {"norm_eps": 1e-5, "state": 16, "conv": 4, "expand": 2}
"""The values that both libraries assume where config.json does not state them."""
# Key -> the values with which the model computes what ours does.
_NEEDED: dict[str, tuple[Any, ...]] = {
    "model_type": ("mamba", "falcon_mamba", None),
    "use_bias": (False,),
    "ssm_cfg.bias": (False,),
    "use_conv_bias": (True,),
    "ssm_cfg.conv_bias": (True,),
    "ssm_cfg.layer": ("Mamba1",),
    "hidden_act": ("silu", "swish"),
    "rms_norm": (True,),
    "d_intermediate": (0,),
    "attn_layer_idx": ([],),
}
# Keys that say how the model was first filled, how it is run (we hold weights and residuals in fp32), or who wrote it.
_WITHOUT_EFFECT = frozenset(
    ("initializer_range", "rescale_prenorm_residual", "time_step_scale", "time_step_min", "time_step_max",
     "time_step_init_scheme", "time_step_floor", "ssm_cfg.dt_min", "ssm_cfg.dt_max", "ssm_cfg.dt_init",
     "ssm_cfg.dt_scale", "ssm_cfg.dt_init_floor", "residual_in_fp32", "fused_add_norm", "ssm_cfg.use_fast_path",
     "use_cache", "use_mambapy", "use_falcon_mambapy", "use_associative_scan", "torch_dtype", "dtype", "architectures",
     "transformers_version", "mamba_ssm_version", "_name_or_path", "name_or_path", "return_dict", "id2label",
     "label2id", "layer_types", "attn_cfg", "bos_token_id", "eos_token_id", "pad_token_id")
)  # fmt: skip
_FALCON = "falcon_mamba"
"""The model_type that says that dt, B and C are normalised. No tensor says so, because these norms have no weights."""
_OF_VOCABULARY = ("vocab_size", "pad_vocab_size_multiple", "tie_word_embeddings", "tie_embeddings")


def other_kind(config: Mapping[str, Any]) -> str | None:
    """The kind of model that a config.json describes where it is not a Mamba-1; None for a Mamba-1."""
    kind = config.get("model_type")
    if kind in ("mamba", _FALCON) or (kind is None and {"d_model", "n_layer"} <= set(config)):
        return None
    if kind is not None:
        return f"model_type {kind!r}, and only Mamba-1 ('mamba', '{_FALCON}') is read"
    return "no model_type, as Transformers' have, and no d_model and n_layer, as mamba_ssm's have"


def differences(config: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """One line for each key of a published Mamba-1's config.json in which `model` differs, or that this package does
    not have. The line names the key, and the setting that would be right where there is one."""
    values = {key: value for key, value in config.items() if key != "ssm_cfg"}
    values |= {f"ssm_cfg.{key}": value for key, value in (config.get("ssm_cfg") or {}).items()}
    ours = model.model_dump() | {"blocks": model.blocks, "inner": model.inner, "rank": model.rank}
    problems = []
    if model.architecture != "mamba":
        problems.append(f"it is a Mamba, this model's architecture is {model.architecture!r}")
    if (falcon := values.get("model_type") == _FALCON) != model.normalise:
        does = "normalises" if falcon else "does not normalise"
        problems.append(f"it {does} dt, B and C: set model.normalise={str(falcon).lower()}")
    if not falcon:
        values.pop("mixer_rms_eps", None)  # without norms it means nothing
    stated: set[str] = set()
    width = values.get("hidden_size", values.get("d_model", model.dim))
    if values.get("intermediate_size") is not None:
        # Transformers takes it instead of expand * hidden_size: falcon-mamba-7b says expand 16, and is built with 2.
        values.pop("expand", None)
        stated.add("expand")
    for key, value in values.items():
        if key in _STATED:
            field = _STATED[key]
            stated.add(field)
            if value == "auto" and field == "rank":
                value = -(-int(values.get("hidden_size", values.get("d_model", model.dim))) // 16)
            if value != ours[field]:
                problems.append(f"{key} is {value}, here {field} is {ours[field]}{_advice(field, value, width)}")
        elif key in _NEEDED:
            if value not in _NEEDED[key] and not (value is None and key == "attn_layer_idx"):
                problems.append(f"{key} is {json.dumps(value)}, this package has only {json.dumps(_NEEDED[key][0])}")
        elif key not in _WITHOUT_EFFECT and key not in _OF_VOCABULARY and value not in (None, False, "", [], {}):
            problems.append(f"{key} is {json.dumps(value)}, a key that is not known here")
    defaults = _DEFAULTS | ({"normalise_eps": 1e-6} if falcon else {})
    for field in sorted(defaults.keys() - stated):
        if ours[field] != defaults[field]:
            problems.append(
                f"config.json does not say {field}, which then is {defaults[field]}, here it is {ours[field]}"
                + _advice(field, defaults[field], width)
            )
    return problems


def _advice(field: str, value: Any, width: Any) -> str:
    """What to set so that `field` becomes `value` in a model that is as wide as the published one."""
    if field == "inner":
        whole = isinstance(value, int) and isinstance(width, int) and width > 0 and value % width == 0
        if not whole:
            return f": model.expand times model.dim, and no whole number of times {width} is that"
        return f": set model.expand={value // width}, as it is model.expand times model.dim"
    if field == "blocks":
        if not isinstance(value, int) or value % 2:
            return ": a layer of this model is two blocks, so an odd number of them cannot be had"
        return f": set model.layers={value // 2}, as a layer of this model is two blocks"
    return f": set model.{'dt_rank' if field == 'rank' else field}={value}"


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is tied to the embedding. Both libraries assume so where config.json says nothing."""
    return bool(config.get("tie_word_embeddings", config.get("tie_embeddings", True)))


def transformers_config(
    model: ModelConfig, vocabulary: int, bos_token_id: int, eos_token_id: int, pad_token_id: int
) -> str:
    """The config.json of a dense Mamba of ours, with this many ids, for Transformers' MambaForCausalLM, or for its
    FalconMambaForCausalLM if `model.normalise` is set."""
    if model.architecture != "mamba" or model.decoupled:
        raise UserError("only a dense Mamba has a counterpart in Transformers; export the mixture as safetensors")
    values: dict[str, Any] = {
        "architectures": ["FalconMambaForCausalLM" if model.normalise else "MambaForCausalLM"],
        "model_type": _FALCON if model.normalise else "mamba",
        "vocab_size": vocabulary,
        "hidden_size": model.dim,
        "state_size": model.state,
        "num_hidden_layers": model.blocks,
        "layer_norm_epsilon": model.norm_eps,
        "expand": model.expand,
        "conv_kernel": model.conv,
        "time_step_rank": model.rank,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "residual_in_fp32": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    if model.normalise:
        values |= {"mixer_rms_eps": model.normalise_eps, "intermediate_size": model.inner}
    return json.dumps(values, indent=1) + "\n"
