"""The initial weights of a model: each value is a function of the seed, the parameter's name and the position in it."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mom_train.config.model import ModelConfig
from mom_train.config.width import growth
from mom_train.model.language_model import LanguageModel


@torch.no_grad()
def initialize(model: LanguageModel, seed: int) -> None:
    """Fills every parameter, sharded or not, from (seed, name), so that the model is the same at any world size.

    Each rank draws one whole parameter at a time and keeps its shard of it. Nothing is communicated.
    """
    for name, parameter in model.named_parameters():
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)
        value = initial_value(name, tuple(parameter.shape), model.config, generator)
        if isinstance(parameter, DTensor):
            shard = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(value)


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator) -> Tensor:
    """The initial value of a parameter as in Mamba, with the same distribution for each modality (fp32, on the CPU).

    Linear maps are U(+-1/sqrt(fan_in)) and dt_proj U(+-1/sqrt(rank)); dt_bias is such that softplus(dt_bias) is
    log-uniform in [1e-3, 1e-1]; A = -(1..N), D = 1, embedding N(0, 0.02), patch_out 0. Maps back into the residual
    stream are divided by sqrt(number of them) for every modality. (The published mixture does not do this to its own
    out_proj, whose name does not match.) The Transformer is treated in the same way. With `model.base_dim`, values are
    scaled as `mom_train.config.width` says.
    """

    def uniform(bound: float, size: tuple[int, ...] = shape) -> Tensor:
        return torch.empty(size).uniform_(-bound, bound, generator=generator)

    *_, module, leaf = ["", *name.split(".")]
    if leaf == "A_log":
        return torch.arange(1, shape[1] + 1, dtype=torch.float32).log().expand(shape)
    if leaf == "D" or module.endswith("norm"):
        return torch.ones(shape)
    if module == "patch_out" or leaf == "bias":
        return torch.zeros(shape)
    if leaf == "dt_bias":
        rows = 1 if config.identical_modalities else shape[0]
        low, high = math.log(1e-3), math.log(1e-1)
        dt = torch.empty(rows, shape[1]).uniform_(low, high, generator=generator).exp().clamp_min(1e-4)
        return (dt + torch.log(-torch.expm1(-dt))).expand(shape)
    if module == "embedding":
        return torch.empty(shape).normal_(0, 0.02, generator=generator)
    if leaf.startswith("conv_"):
        return uniform(config.conv**-0.5)
    scales = growth(name, config).scales
    if leaf == "router":
        return torch.empty(shape).normal_(0, 0.02 * scales[0], generator=generator)
    value = uniform(shape[1] ** -0.5)
    if module in config.matrices:
        if config.identical_modalities:
            rows = sum(config.matrices[module][1])  # those of one modality
            value = value[:rows].repeat(shape[0] // rows, 1)
        if module in ("out_proj", "down_proj"):
            value = value / math.sqrt(config.blocks * (2 if config.architecture == "transformer" else 1))
    if any(scale != 1 for scale in scales):
        stacked = config.matrices[module][1] if module in config.matrices else shape[:1]
        of_one = torch.tensor(scales).repeat_interleave(torch.tensor(stacked))  # of one modality
        value = value * of_one.repeat(shape[0] // len(of_one)).unsqueeze(1)
    return value
