"""The Transformer block, in which attention (q, k, v, o), feed-forward and norms can be decoupled by modality.

With all three decoupled, it is the Mixture-of-Transformers (arXiv 2411.04996); with none, the paper's Flex-Attention
baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mom_train.config.model import ModelConfig
from mom_train.config.width import attention_scale
from mom_train.model.routed import Norm, Projection, projection
from mom_train.ops.layout import RowLayout


@dataclass
class AttentionState:
    """Keys and values of the positions so far, (B, H, past, head). All belong to the document that the row is in."""

    k: Tensor
    v: Tensor


def attention_mask(layout: RowLayout, past: int = 0, dtype: torch.dtype | None = None) -> Any:
    """The mask that says which positions attend to which: to earlier ones of the same document, and the patches of a
    picture to each other.

    Returns bool (B, 1, L, past + L), True where attention is allowed, for scaled_dot_product_attention. With a `dtype`,
    returns the numbers that are added to the scores, 0 or -inf; otherwise that function would make and keep them in
    every block. On CUDA without a past, returns the same rule as a flex_attention BlockMask.
    """
    B, L = layout.batch, layout.length
    document = layout.document.view(B, L)
    picture = None if layout.picture is None else layout.picture.view(B, L)
    if document.device.type == "cuda" and past == 0:
        return block_mask(document, picture)
    time = torch.arange(L, device=document.device)
    mask = (time[None, :] <= time[:, None]).expand(B, L, L)
    if picture is not None:
        mask = mask | ((picture[:, :, None] == picture[:, None, :]) & (picture[:, :, None] >= 0))
    mask = mask & (document[:, :, None] == document[:, None, :])
    if past:
        # The past of a continued row belongs to its first document.
        mask = torch.cat([(document == document[:, :1])[:, :, None].expand(B, L, past), mask], 2)
    if dtype is not None:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask[:, None]


def block_mask(document_BL: Tensor, picture_BL: Tensor | None) -> Any:
    """The rule of `attention_mask` for whole rows as flex_attention's BlockMask, which names the blocks of 128 x 128
    positions that have to be computed.

    It is made once for each batch and shared by all layers. It is compiled, because otherwise the whole mask (B, L, L)
    and several tensors of its size would be in memory for a moment.
    """
    B, L = document_BL.shape

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ordered = k <= q
        if picture_BL is not None:
            ordered = ordered | ((picture_BL[b, q] >= 0) & (picture_BL[b, q] == picture_BL[b, k]))
        return ordered & (document_BL[b, q] == document_BL[b, k])

    return _create_block_mask()(visible, B, None, L, L, device=document_BL.device)


@cache
def _create_block_mask() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def rotate(x_BHLh: Tensor, base: float, start: int = 0) -> Tensor:
    """Rotary position embedding (RoPE): turns the pairs (i, i + h/2) by position * base^(-2i/h), in fp32.

    Only differences of positions matter, so positions may be counted from the start of the row for every document in
    it.
    """
    half = x_BHLh.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x_BHLh.device, dtype=torch.float32) / half)
    position = torch.arange(start, start + x_BHLh.shape[2], device=x_BHLh.device, dtype=torch.float32)
    angle = position[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x_BHLh.to(torch.promote_types(x_BHLh.dtype, torch.float32)).split(half, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x_BHLh.dtype)


class HeadNorm(nn.Module):
    """RMSNorm of each attention head, with a scale that all heads share and that is shared by the modalities or
    separate for each (weight [modalities * head])."""

    def __init__(self, head: int, modalities: int, eps: float):
        super().__init__()
        self.modalities, self.eps = modalities, eps
        self.weight = nn.Parameter(torch.empty(modalities * head))

    def forward(self, x_BHLh: Tensor, layout: RowLayout) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight[modality] over the last dimension of x (B, H, L, head), which is in time
        order. It is computed in fp32 (float64 for float64 rows), and returned in the dtype of x."""
        wide_BHLh = x_BHLh.to(torch.promote_types(x_BHLh.dtype, torch.float32))
        normed_BHLh = F.rms_norm(wide_BHLh, wide_BHLh.shape[-1:], None, self.eps)
        scales_Mh = self.weight.view(self.modalities, -1)
        scale = scales_Mh[0]
        modality_BL1 = layout.modality.view(layout.batch, 1, -1, 1)
        for m in range(1, self.modalities):  # unlike an index, this has the same gradient on every run on any device
            scale = torch.where(modality_BL1 == m, scales_Mh[m], scale)
        return (normed_BHLh * scale).to(x_BHLh.dtype)


class Attention(nn.Module):
    """Multi-head attention with rotary positions. q, k and v come from one projection.

    With `model.qk_norm`, q and k pass an RMSNorm in each head before they are rotated (arXiv 2302.05442, there with
    LayerNorm).
    """

    def __init__(self, config: ModelConfig, modalities: int):
        super().__init__()
        assert config.heads is not None
        self.dim, self.heads, self.base = config.dim, config.heads, config.rope_base
        self.scale = attention_scale(config)
        self.qkv_proj = projection(config, "attention", config.dim, 3 * config.dim, modalities)
        self.out_proj = projection(config, "attention", config.dim, config.dim, modalities)
        self.q_norm: HeadNorm | None = None
        self.k_norm: HeadNorm | None = None
        if config.qk_norm:
            norms = modalities if "norm" in config.decoupled else 1
            self.q_norm = HeadNorm(config.head, norms, config.norm_eps)
            self.k_norm = HeadNorm(config.head, norms, config.norm_eps)

    def forward(self, x_Td: Tensor, layout: RowLayout, mask: Any, state: AttentionState | None = None) -> Tensor:
        B, L, d = layout.batch, layout.length, x_Td.shape[1]
        qkv_T3d = self.qkv_proj(x_Td, layout).index_select(0, layout.order)
        q, k, v = qkv_T3d.view(B, L, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        past = 0 if state is None else state.k.shape[2]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, layout), self.k_norm(k, layout)
        q, k = rotate(q, self.base, past), rotate(k, self.base, past)
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
            state.k, state.v = k, v
        if isinstance(mask, Tensor):
            y_BHLh = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        else:
            y_BHLh = _flex()(q, k, v, block_mask=mask, scale=self.scale)
        y_Td = y_BHLh.transpose(1, 2).reshape(B * L, d).index_select(0, layout.rows)
        return self.out_proj(y_Td, layout)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig, modalities: int):
        super().__init__()
        self.gate_up_proj = projection(config, "feed_forward", config.dim, 2 * config.feed_forward, modalities)
        self.down_proj = projection(config, "feed_forward", config.feed_forward, config.dim, modalities)

    def forward(self, x_Td: Tensor, layout: RowLayout) -> Tensor:
        gate, up = self.gate_up_proj(x_Td, layout).chunk(2, dim=1)
        return self.down_proj(F.silu(gate) * up, layout)


class TransformerBlock(nn.Module):
    """x = x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, modalities: int):
        super().__init__()
        norms = modalities if "norm" in config.decoupled else 1
        self.attention_norm = Norm(config.dim, norms, config.norm_eps)
        self.attention = Attention(config, modalities)
        self.feed_forward_norm = Norm(config.dim, norms, config.norm_eps)
        self.feed_forward = FeedForward(config, modalities)
        self.attention_norm.before_product = isinstance(self.attention.qkv_proj, Projection)
        self.feed_forward_norm.before_product = isinstance(self.feed_forward.gate_up_proj, Projection)

    def forward(self, x_Td: Tensor, layout: RowLayout, state: AttentionState | None = None, mask: Any = None) -> Tensor:
        x_Td, branch_Td = self.terms(x_Td, None, layout, state, mask)
        return x_Td + branch_Td

    def terms(
        self,
        x_Td: Tensor,
        branch_Td: Tensor | None,
        layout: RowLayout,
        state: AttentionState | None = None,
        mask: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """The two terms whose sum is the output, for rows that are themselves the sum x + branch."""
        x_Td, normed_Td = self.attention_norm.of_sum(x_Td, branch_Td, layout)
        x_Td, normed_Td = self.feed_forward_norm.of_sum(x_Td, self.attention(normed_Td, layout, mask, state), layout)
        return x_Td, self.feed_forward(normed_Td, layout)

    def empty_state(self, batch: int) -> AttentionState:
        """The state at the beginning of `batch` sequences."""
        attention, device = self.attention, self.attention_norm.weight.device
        shape = (batch, attention.heads, 0, attention.dim // attention.heads)
        return AttentionState(torch.zeros(shape, device=device), torch.zeros(shape, device=device))
