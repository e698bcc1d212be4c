"""Mixture-of-Mamba: a Mamba-1 language model whose projections choose their weights by modality.

    tokens -> embedding -> [ x + mixer(norm(x)) ] x blocks -> norm -> head -> loss

One code path: dense Mamba is the mixture with every projection shared. Every row-wise tensor is in the row order
of the batch's RowLayout (sorted by modality) from the embedding to the loss.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from mom_train.config import ModelConfig
from mom_train.kernels import causal_conv, modality_linear, selective_scan
from mom_train.layout import RowLayout
from mom_train.linear_cross_entropy import linear_cross_entropy


class Projection(nn.Module):
    """A linear map without bias, shared or with one matrix per modality.

    The weight is one 2-D parameter [modalities * out, in], so that FSDP2 shards it evenly and a rank without a
    modality still has its gradient.
    """

    def __init__(self, inputs: int, outputs: int, modalities: int):
        super().__init__()
        self.modalities = modalities
        self.weight = nn.Parameter(torch.empty(modalities * outputs, inputs))

    def forward(self, x_TK: Tensor, layout: RowLayout) -> Tensor:
        if self.modalities == 1:
            return F.linear(x_TK, self.weight)
        return modality_linear(x_TK, self.weight, layout.offsets)


class MambaMixer(nn.Module):
    """The Mamba-1 block of the paper's Algorithm 2, any subset of its four projections decoupled.

    conv1d, A and D are shared by all modalities. The time step's bias is added in fp32 on every path.
    """

    def __init__(self, config: ModelConfig, modalities: int):
        super().__init__()
        D, N, R = config.inner, config.state, config.rank
        count = {p: modalities if p in config.decoupled else 1 for p in ("in_proj", "x_proj", "dt_proj", "out_proj")}
        self.modalities, self.inner, self.state, self.rank = modalities, D, N, R
        self.in_proj = Projection(config.dim, 2 * D, count["in_proj"])
        self.conv_weight = nn.Parameter(torch.empty(D, config.conv))
        self.conv_bias = nn.Parameter(torch.empty(D))
        self.x_proj = Projection(D, R + 2 * N, count["x_proj"])
        self.dt_proj = Projection(R, D, count["dt_proj"])
        self.dt_bias = nn.Parameter(torch.empty(count["dt_proj"], D))
        self.A_log = nn.Parameter(torch.empty(D, N))
        self.D = nn.Parameter(torch.empty(D))
        self.out_proj = Projection(D, config.dim, count["out_proj"])

    def forward(self, x_Td: Tensor, layout: RowLayout) -> Tensor:
        x_TD, z_TD = self.in_proj(x_Td, layout).split(self.inner, dim=1)
        x_TD, _ = causal_conv(x_TD, self.conv_weight, self.conv_bias, layout)
        dt_TR, B_TN, C_TN = self.x_proj(x_TD, layout).split([self.rank, self.state, self.state], dim=1)
        dt_TD = self.dt_proj(dt_TR, layout)
        A_DN = -torch.exp(self.A_log.float())
        dt_bias_MD = self.dt_bias.float().expand(self.modalities, -1)
        y_TD, _ = selective_scan(x_TD, dt_TD, A_DN, B_TN, C_TN, self.D.float(), z_TD, dt_bias_MD, layout)
        return self.out_proj(y_TD, layout)


class Block(nn.Module):
    """Pre-norm residual block. The norm is shared across modalities, as published.

    With `recompute`, only its input is kept for the backward pass, and the rest computed again there.
    """

    def __init__(self, config: ModelConfig, modalities: int, recompute: bool = False):
        super().__init__()
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mixer = MambaMixer(config, modalities)
        self.recompute = recompute

    def forward(self, x_Td: Tensor, layout: RowLayout) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x_Td, layout, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_Td, layout)

    def _forward(self, x_Td: Tensor, layout: RowLayout) -> Tensor:
        return x_Td + self.mixer(self.norm(x_Td), layout)


class Head(nn.Module):
    """Untied output embedding [V, dim]."""

    def __init__(self, dim: int, vocabulary: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, dim))

    def forward(self, x_Td: Tensor, labels_T: Tensor | None) -> tuple[Tensor, Tensor] | Tensor:
        if labels_T is None:
            return F.linear(x_Td, self.weight)
        return linear_cross_entropy(x_Td, self.weight, labels_T)


class MixtureOfMamba(nn.Module):
    """The language model: `vocabulary` ids, `modalities` >= 1.

    Build it under torch.device("meta"), shard it, then call `to_empty` and `initialize`: no rank ever holds the
    whole model.
    """

    def __init__(self, config: ModelConfig, vocabulary: int, modalities: int, recompute: bool = False):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config, modalities, recompute) for _ in range(config.blocks))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = Head(config.dim, vocabulary)

    def forward(
        self, tokens_T: Tensor, layout: RowLayout, labels_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """tokens (T,) int64 and labels (T,) int64 (-100 for none) in row order.

        With labels: (sum of the losses, scalar fp32 that carries the gradient; the loss of each row (T,) fp32 in
        nats, 0 where there is no label). Without: logits (T, V).
        """
        x_Td = self.embedding(tokens_T)
        for block in self.blocks:
            x_Td = block(x_Td, layout)
        return self.head(self.norm(x_Td), labels_T)


@torch.no_grad()
def initialize(model: MixtureOfMamba, seed: int) -> None:
    """Fill every parameter, sharded or not, from (seed, name): the same model at any world size.

    Each rank draws one parameter at a time in full and keeps its shard; nothing is communicated.
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
    """What Mamba starts from, for each modality alike (fp32, CPU).

    Linear maps U(+-1/sqrt(fan_in)), dt_proj U(+-1/sqrt(rank)), dt bias with softplus(bias) log-uniform in
    [1e-3, 1e-1], A = -(1..N), D = 1, embedding N(0, 0.02). out_proj is divided by sqrt(blocks), for every modality
    (the published mixture misses its own out_proj there, whose name does not match).
    """

    def uniform(bound: float, size: tuple[int, ...] = shape) -> Tensor:
        return torch.empty(size).uniform_(-bound, bound, generator=generator)

    *_, module, leaf = ["", *name.split(".")]
    if leaf == "A_log":
        return torch.arange(1, shape[1] + 1, dtype=torch.float32).log().expand(shape)
    if leaf == "D" or module == "norm":
        return torch.ones(shape)
    if leaf == "dt_bias":
        rows = 1 if config.identical_modalities else shape[0]
        low, high = math.log(1e-3), math.log(1e-1)
        dt = torch.empty(rows, shape[1]).uniform_(low, high, generator=generator).exp().clamp_min(1e-4)
        return (dt + torch.log(-torch.expm1(-dt))).expand(shape)
    if module == "embedding":
        return torch.empty(shape).normal_(0, 0.02, generator=generator)
    if leaf.startswith("conv_"):
        return uniform(config.conv**-0.5)
    if module == "head":
        return uniform(shape[1] ** -0.5)
    outputs = {"in_proj": 2 * config.inner, "x_proj": config.rank + 2 * config.state, "dt_proj": config.inner}
    rows = outputs.get(module, config.dim) if config.identical_modalities else shape[0]
    value = uniform(shape[1] ** -0.5, (rows, shape[1])).repeat(shape[0] // rows, 1)
    return value / math.sqrt(config.blocks) if module == "out_proj" else value
