"""Computes rows that are too long for one rank: each rank of a context group holds one slice of every row's positions.

A rank computes its slice as if it were a short row. Two things cross a boundary between slices, and their size does not
depend on the length: the last K-1 inputs of the convolution, and the state of the scan. The scan is linear in the state
that it begins from: h_end = end + decay * h_begin, where `end` is the last state if the slice begins from zero, and
`decay` is the product of its decays. So every rank scans its slice once from zero, all ranks gather (end, decay), of
size O(ranks x B D N), and each rank combines those of the slices before its own into the state that its slice begins
from, and scans again from there. All of this consists of differentiable operations, so the gradients are exact.

The scan is done twice and the rest of the model once. The ranks of a context group shard the model and sum gradients
like all ranks, since each has the losses of its own positions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mom_data.batches.batch import PackedBatch, sort_by_modality
from mom_train.distributed.context import Context, gather
from mom_train.model.diffusion import NoisedPatches
from mom_train.ops.layout import RowLayout
from mom_train.ops.scan.selective_scan import selective_scan


def slice_of_rows(
    context: Context, batch: PackedBatch, patches: NoisedPatches | None
) -> tuple[PackedBatch, NoisedPatches | None, Tensor | None]:
    """This rank's slice of a batch of whole rows, on the CPU.

    Returns (the slice, sorted by modality again; its patches; the number of tokens of its first document that lie in
    slices before it, (B,) int64, or None if rows are not divided). Counts in the batch remain those of the whole rows.
    """
    if context.size == 1:
        return batch, patches, None
    L = batch.tokens.shape[1]
    S = L // context.size
    assert S * context.size == L
    start = context.rank * S
    past_B = (batch.document[:, :start] == batch.document[:, start : start + 1]).sum(1)
    tokens, modality, document, labels = (
        t[:, start : start + S].contiguous() for t in (batch.tokens, batch.modality, batch.document, batch.labels)
    )
    order, rows, offsets = sort_by_modality(modality, len(batch.offsets) - 1)
    row, at = batch.latent_position // L, batch.latent_position % L - start
    kept = (at >= 0) & (at < S)
    mine = replace(
        batch,
        tokens=tokens,
        modality=modality,
        document=document,
        labels=labels,
        latents=batch.latents[kept] if len(batch.latents) else batch.latents,
        latent_position=(row * S + at)[kept],
        image_of_patch=batch.image_of_patch[kept],
        order=order,
        rows=rows,
        offsets=offsets,
    )
    if patches is not None:
        patches = replace(
            patches,
            x=patches.x[kept],
            target=patches.target[kept],
            picture=patches.picture[kept],
            row=order.long()[mine.latent_position],
        )
    return mine, patches, past_B


def inputs_before(context: Context, x_TD: Tensor, layout: RowLayout, count: int) -> Tensor:
    """The last `count` inputs before this rank's slice (B, count, D), zero before the first slice. Carries
    gradients."""
    assert layout.length >= count
    if count == 0:  # a convolution with one tap needs no earlier inputs
        return x_TD.new_zeros(layout.batch, 0, x_TD.shape[1])
    last_BKD = x_TD[layout.order.view(layout.batch, -1)[:, -count:].long()]
    of_all = gather(last_BKD, context.group)
    first = torch.full((), context.rank == 0, device=x_TD.device)
    # The first rank gets zeros by masking, because it too must take part in the collective of the backward pass.
    return of_all[max(0, context.rank - 1)].masked_fill(first, 0)


def state_before(
    context: Context,
    x_TD: Tensor,
    dt_TD: Tensor,
    A_DN: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    D_D: Tensor,
    z_TD: Tensor,
    dt_bias_MD: Tensor,
    layout: RowLayout,
) -> Tensor:
    """The state of the scan before this rank's slice (B, D, N), from the arguments of its `selective_scan`.

    Gradients flow back to the slices that the state comes from.
    """
    _, end_BDN = selective_scan(x_TD, dt_TD, A_DN, B_TN, C_TN, D_D, z_TD, dt_bias_MD, layout)
    of_all = gather(torch.stack([end_BDN, _decay(dt_TD, A_DN, dt_bias_MD, layout)]), context.group)
    h_BDN = torch.zeros_like(end_BDN)
    for r in range(context.size - 1):
        end, decay = of_all[r].unbind()
        before = torch.full((), r < context.rank, device=h_BDN.device)
        h_BDN = torch.where(before, end + decay * h_BDN, h_BDN)
    return h_BDN


def _decay(dt_TD: Tensor, A_DN: Tensor, dt_bias_MD: Tensor, layout: RowLayout) -> Tensor:
    """The factor by which a state decays over the whole slice (B, D, N): exp(A * sum of Delta), or 0 if a document
    begins in it."""
    B, L = layout.batch, layout.length
    # The gradient of a product, unlike that of indexing, is the same on every run, on any device.
    bias_TD = F.one_hot(layout.modality.long(), len(dt_bias_MD)).to(A_DN.dtype) @ dt_bias_MD
    delta_TD = F.softplus(dt_TD.index_select(0, layout.order).to(A_DN.dtype) + bias_TD)
    decay_BDN = torch.exp(delta_TD.view(B, L, -1).sum(1).unsqueeze(2) * A_DN)
    begins_B = (layout.position.view(B, L) == 0).any(1)
    return decay_BDN.masked_fill(begins_B[:, None, None], 0)
