"""The language model: Mamba or Transformer blocks whose weights are chosen by each token's modality.

    tokens -> embedding (latent patches: patch embedding) -> blocks -> norm -> head: cross-entropy (patches: denoising)

One code path for every system of the paper. Dense Mamba is the mixture with nothing decoupled. Every row-wise tensor
is in the row order of the batch's RowLayout (sorted by modality) from the embedding to the losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mom_tokenizers.errors import UserError
from mom_train.config.model import DiffusionConfig, ModelConfig
from mom_train.config.run import Recompute, RunConfig
from mom_train.model.attention import AttentionState, TransformerBlock, attention_mask
from mom_train.model.cross_entropy import linear_cross_entropy
from mom_train.model.diffusion import NoisedPatches, PatchEmbedding, PatchHead
from mom_train.model.mamba import MambaBlock, MambaState
from mom_train.model.routed import Norm, Projection, RoutedProjection, on_cuda
from mom_train.ops.layout import RowLayout
from mom_train.ops.routing import fp8
from mom_train.ops.routing.fp8 import Fp8

LayerStates = list[MambaState | AttentionState]
"""What each block carries from one chunk of a sequence to the next."""


Rows = Tensor | tuple[Tensor, Tensor | None]
"""Rows between two blocks, (T, dim): a tensor, or two whose sum they are and which the next norm adds."""


@dataclass(frozen=True)
class Losses:
    """The losses of this batch as sums, which are to be divided by the counts of the whole step."""

    tokens: Tensor
    """The cross-entropy (and z-loss) of all targets: a scalar that carries the gradient."""
    tokens_T: Tensor
    """(T,) the cross-entropy of each row in nats, fp32 without gradient; 0 where there is no label."""
    patches: Tensor
    """The squared error over all patches and channels: a scalar that carries the gradient."""
    balance: Tensor
    """The mean load-balance loss of the routers times the rows: a scalar that carries the gradient; 0 without
    routers."""
    patches_P: Tensor
    """(P,) the squared error of each patch over its channels, fp32 without gradient."""
    z: Tensor
    """The z-loss within `tokens`: a scalar without gradient, 0 where objective.z_loss is."""


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

    def forward(self, x: Rows, layout: RowLayout, *more: Any) -> Rows:
        """The output (T, dim) for rows x (T, dim). Rows given as two terms of a sum come back as such."""
        block = self.block
        if isinstance(x, tuple):
            return block.terms(*x, layout, *more)
        if not self.recompute or not torch.is_grad_enabled():
            return block(x, layout, *more)
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        if self.recompute is True:
            return again(block, x, layout, *more)
        if isinstance(block, MambaBlock):  # the product at the end needs its input kept in any case
            y_TD = again(block.gated, x, layout, *more, context_fn=self._keep)
            return x + block.mixer.out_proj(y_TD, layout)
        return again(block, x, layout, *more, context_fn=self._keep)


_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.mom.modality_linear.default,
    torch.ops.mom.fp8_linear.default,
)


_SEQUENCE_OPERATORS = (
    torch.ops.mom.selective_scan.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
)


def _dear(rank: int, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Decides what selective checkpointing keeps: scan, attention, and products of which each element takes more than
    `rank` multiply-adds, which are all products but dt_proj.

    It sees flex-attention in blocks that are compiled. In others flex-attention is a compiled region of its own, of
    which selective checkpointing knows nothing, so that its forward pass is repeated there.
    """
    keep = operator in _SEQUENCE_OPERATORS or (operator in _PRODUCTS and args[0].shape[1] > rank)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class Head(nn.Module):
    """The output embedding [V, dim]; it is not tied to the input embedding."""

    def __init__(self, dim: int, vocabulary: int, z_loss: float):
        super().__init__()
        self.z_loss = z_loss
        self.fp8: Fp8 | None = None
        self.weight = nn.Parameter(torch.empty(vocabulary, dim))

    def forward(self, x_Td: Tensor, labels_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        if labels_T is None:
            return nn.functional.linear(x_Td, self.weight)
        return linear_cross_entropy(x_Td, self.weight, labels_T, self.z_loss, self.fp8)


class LanguageModel(nn.Module):
    """A language model over `vocabulary` ids and `modalities` >= 1. With `diffusion`, pictures are latent patches.

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
        self.config, self.diffusion, self.recompute = config, diffusion, recompute
        # from_pretrained draws no first weights, which `initialize` would replace
        self.embedding = nn.Embedding.from_pretrained(torch.empty(vocabulary, config.dim), freeze=False)
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
        state: LayerStates | None = None,
    ) -> Losses | tuple[Tensor, Tensor | None]:
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
        # Blocks that are recomputed keep only their input, and that should be one tensor.
        rows: Rows = (x_Td, None) if on_cuda(x_Td) and not self.recompute else x_Td
        for i, block in enumerate(self.blocks):
            rows = block(rows, layout, None if state is None else state[i], *more)
        x_Td = self.norm.of_sum(*rows, layout)[1] if isinstance(rows, tuple) else self.norm(rows, layout)
        predicted = None
        if patches is not None:
            assert self.patch_head is not None
            predicted = self.patch_head(x_Td.index_select(0, patches.row))
        if labels_T is None:
            return self.head(x_Td, None), predicted
        tokens, tokens_T, z = self.head(x_Td, labels_T)
        squares_P = x_Td.new_zeros(0, dtype=torch.float32)
        if patches is not None and predicted is not None:
            squares_P = (predicted - patches.target).square().sum(1)
        squares = squares_P.sum()
        balance = squares.new_zeros(())
        if self._routers:
            balance = torch.stack([router.balance for router in self._routers]).mean()
        return Losses(tokens, tokens_T, squares, balance, squares_P.detach(), z)

    def use_fp8(self, mode: Fp8) -> None:
        """Lets the large products be in FP8: those of the projections except x_proj and dt_proj, whose few FLOPs make
        time steps, B and C, and the logits where the number of ids is a multiple of 16."""
        for name, module in self.blocks.named_modules():
            if isinstance(module, Projection | RoutedProjection) and not name.endswith(("x_proj", "dt_proj")):
                module.fp8 = mode
        if self.head.weight.shape[0] % fp8.ALIGNMENT == 0:
            self.head.fp8 = mode

    def empty_state(self, batch: int) -> LayerStates:
        """The state before the first token of `batch` rows, with which `forward` reads chunk by chunk or token by
        token."""
        return [block.block.empty_state(batch) for block in self.blocks]  # type: ignore[union-attr, operator]


def build_model(config: RunConfig) -> LanguageModel:
    """The model that a run's config describes, without memory for its weights (on the device "meta").

    Shard it where several ranks are to hold it, then call `to_empty`, and fill it by `initialize` or from a checkpoint.
    """
    with torch.device("meta"):
        return LanguageModel(
            config.model,
            config.layout.size,
            len(config.layout.modalities),
            diffusion=config.objective.diffusion,
            z_loss=config.objective.z_loss,
            recompute=config.training.activation_checkpointing,
        )


def set_precision(model: LanguageModel, config: RunConfig, device: torch.device, required: bool = True) -> None:
    """Lets the products of the model be in FP8 if `training.precision` says so. Autocast does the rest.

    If the device has no FP8 products, they are emulated where the config or `required` = False allows it, and otherwise
    UserError is raised.
    """
    training = config.training
    if training.precision != "fp8":
        return
    grouped = any(part in config.model.decoupled for part in ("in_proj", "out_proj", "attention", "feed_forward"))
    obstacle = "training.fp8_emulation" if training.fp8_emulation else fp8.why_not(device, grouped)
    if obstacle is not None and required and not training.fp8_emulation:
        raise UserError(
            f"training.precision: fp8 does not run here: {obstacle}. Set it to bf16, or set training.fp8_emulation: "
            "true, which gives the same losses slowly"
        )
    model.use_fp8("device" if obstacle is None else "emulated")
