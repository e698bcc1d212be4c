"""The language model: Mamba or Transformer blocks whose weights are chosen by each token's modality.

    tokens -> embedding (latent patches: patch embedding) -> blocks -> norm -> head: cross-entropy (patches: denoising)

One code path for every system of the paper. Dense Mamba is the mixture with nothing decoupled. Every row-wise tensor
is in the row order of the batch's RowLayout (sorted by modality) from the embedding to the losses.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mom_train.attention import AttentionState, TransformerBlock, attention_mask
from mom_train.config import DiffusionConfig, ModelConfig, Recompute
from mom_train.diffusion import NoisedPatches, PatchEmbedding, PatchHead
from mom_train.layout import RowLayout
from mom_train.linear_cross_entropy import linear_cross_entropy
from mom_train.mamba import MambaBlock, MambaState
from mom_train.routed import Norm, RoutedProjection

State = list[MambaState | AttentionState]


@dataclass(frozen=True)
class Losses:
    """Sums over this batch: divide by the counts of the whole step."""

    tokens: Tensor
    """Cross-entropy (and z-loss) of all targets, scalar, carries the gradient."""
    tokens_T: Tensor
    """Cross-entropy of each row, fp32 nats, 0 where there is no label; no gradient."""
    patches: Tensor
    """Squared error over all patches and channels, scalar, carries the gradient."""
    balance: Tensor
    """Mean load-balance loss of the routers, times rows, scalar, carries the gradient; 0 without routers."""
    patches_P: Tensor
    """Squared error of each patch over its channels, fp32; no gradient."""


class Block(nn.Module):
    """One unit of sharding, compilation and activation checkpointing.

    With `recompute`, only its input is kept for the backward pass, and the rest computed again there; with "selective"
    also what is dear to compute: the large products, and the scan with its states.
    """

    def __init__(self, config: ModelConfig, modalities: int, recompute: Recompute):
        super().__init__()
        kind = MambaBlock if config.architecture == "mamba" else TransformerBlock
        self.block: MambaBlock | TransformerBlock = kind(config, modalities)
        self.recompute = recompute
        self._keep = partial(create_selective_checkpoint_contexts, partial(_dear, config.rank))

    def forward(self, x_Td: Tensor, layout: RowLayout, *more: Any) -> Tensor:
        block = self.block
        if not self.recompute or not torch.is_grad_enabled():
            return block(x_Td, layout, *more)
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        if self.recompute is True:
            return again(block, x_Td, layout, *more)
        if isinstance(block, MambaBlock):  # the product at the end needs its input kept in any case
            y_TD = again(block.gated, x_Td, layout, *more, context_fn=self._keep)
            return x_Td + block.mixer.out_proj(y_TD, layout)
        return again(block, x_Td, layout, *more, context_fn=self._keep)


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.mom.modality_linear.default)
_SEQUENCE_OPERATORS = (
    torch.ops.mom.selective_scan.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def _dear(rank: int, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep scan, attention, and products whose every element takes more than `rank` multiply-adds: all but dt_proj."""
    keep = operator in _SEQUENCE_OPERATORS or (operator in _PRODUCTS and args[0].shape[1] > rank)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class Head(nn.Module):
    """Untied output embedding [V, dim]."""

    def __init__(self, dim: int, vocabulary: int, z_loss: float):
        super().__init__()
        self.z_loss = z_loss
        self.weight = nn.Parameter(torch.empty(vocabulary, dim))

    def forward(self, x_Td: Tensor, labels_T: Tensor | None) -> tuple[Tensor, Tensor] | Tensor:
        if labels_T is None:
            return nn.functional.linear(x_Td, self.weight)
        return linear_cross_entropy(x_Td, self.weight, labels_T, self.z_loss)


class LanguageModel(nn.Module):
    """`vocabulary` ids, `modalities` >= 1; with `diffusion`, pictures are latent patches.

    Build it under torch.device("meta"), shard it, then call `to_empty` and `initialize`: no rank ever holds the
    whole model.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: int,
        modalities: int,
        *,
        diffusion: DiffusionConfig | None = None,
        z_loss: float = 0.0,
        recompute: Recompute = False,
    ):
        super().__init__()
        self.config, self.diffusion = config, diffusion
        self.embedding = nn.Embedding(vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config, modalities, recompute) for _ in range(config.blocks))
        self.norm = Norm(config.dim, modalities if "norm" in config.decoupled else 1, config.norm_eps)
        self.head = Head(config.dim, vocabulary, z_loss)
        self.patch_embedding = None if diffusion is None else PatchEmbedding(diffusion, config.dim)
        self.patch_head = None if diffusion is None else PatchHead(diffusion, config.dim)
        self._routers = [m for m in self.modules() if isinstance(m, RoutedProjection)]

    def forward(
        self,
        tokens_T: Tensor,
        layout: RowLayout,
        labels_T: Tensor | None = None,
        patches: NoisedPatches | None = None,
        state: State | None = None,
    ) -> Any:
        """tokens (T,) int64 and labels (T,) int64 (-100 for none) in row order.

        With labels: Losses. Without: (logits (T, V), predictions for the patches (P, W) fp32 or None). A `state`
        (see `empty_state`) is read, and replaced by the one after these tokens.
        """
        x_Td = self.embedding(tokens_T)
        if patches is not None:
            assert self.patch_embedding is not None, "this model has no latents"
            x_Td = x_Td.index_copy(0, patches.row, self.patch_embedding(patches).to(x_Td.dtype))
        more: tuple[Any, ...] = ()
        if self.config.architecture == "transformer":
            past = state[0].k.shape[2] if state and isinstance(state[0], AttentionState) else 0
            device = x_Td.device.type
            of_scores = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_Td.dtype
            more = (attention_mask(layout, past, of_scores),)
        for i, block in enumerate(self.blocks):
            x_Td = block(x_Td, layout, None if state is None else state[i], *more)
        x_Td = self.norm(x_Td, layout)
        predicted = None
        if patches is not None:
            assert self.patch_head is not None
            predicted = self.patch_head(x_Td.index_select(0, patches.row))
        if labels_T is None:
            return self.head(x_Td, None), predicted
        tokens, tokens_T = self.head(x_Td, labels_T)
        squares_P = x_Td.new_zeros(0, dtype=torch.float32)
        if patches is not None and predicted is not None:
            squares_P = (predicted - patches.target).square().sum(1)
        squares = squares_P.sum()
        balance = squares.new_zeros(())
        if self._routers:
            balance = torch.stack([router.balance for router in self._routers]).mean()
        return Losses(tokens, tokens_T, squares, balance, squares_P.detach())

    def empty_state(self, batch: int) -> State:
        """The state before the first token of `batch` rows, for `forward` chunk by chunk or token by token."""
        return [block.block.empty_state(batch) for block in self.blocks]  # type: ignore[union-attr, operator]


@torch.no_grad()
def initialize(model: LanguageModel, seed: int) -> None:
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
    [1e-3, 1e-1], A = -(1..N), D = 1, embedding N(0, 0.02), patch_out 0. Maps back into the residual stream are divided
    by sqrt(number of them), for every modality (the published mixture misses its own out_proj there, whose name does
    not match). The Transformer is treated alike.
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
    if leaf == "router":
        return torch.empty(shape).normal_(0, 0.02, generator=generator)
    value = uniform(shape[1] ** -0.5)
    if module in _OUTPUTS:
        if config.identical_modalities:
            rows = _OUTPUTS[module](config)
            value = value[:rows].repeat(shape[0] // rows, 1)
        if module in ("out_proj", "down_proj"):
            value = value / math.sqrt(config.blocks * (2 if config.architecture == "transformer" else 1))
    return value


# rows of one modality's matrix in each routed projection
_OUTPUTS = {
    "in_proj": lambda c: 2 * c.inner,
    "x_proj": lambda c: c.rank + 2 * c.state,
    "dt_proj": lambda c: c.inner,
    "out_proj": lambda c: c.dim,
    "qkv_proj": lambda c: 3 * c.dim,
    "gate_up_proj": lambda c: 2 * c.feed_forward,
    "down_proj": lambda c: c.dim,
}
