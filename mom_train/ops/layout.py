"""The place of each token: the rows of a batch sorted by modality, and how to read them in time order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mom_data.batches.batch import sort_by_modality
from mom_train.distributed.context import Context


@dataclass(frozen=True)
class RowLayout:
    """The layout of one batch of B rows x L positions (T = B*L tokens). It is made once and read by every layer.

    Every row-wise tensor of the network (residual, norms, projections, losses) is stored in *row order*:
    stably sorted by modality, so that each modality is one contiguous segment. Only the convolution and the
    scan need *time order* (b*L + t); they read through `order`.

    order     (T,) int32   for each token in time order, its index in row order
    rows      (T,) int64   for each token in row order, its index in time order
    offsets   (M+1,) int32: modality m has the rows offsets[m]:offsets[m+1], possibly none. Nothing reads them on the
              host, unless the rows are on the CPU
    modality  (T,) uint8   in time order
    position  (T,) uint8   in time order: number of tokens since the document began, at most 255; 0 resets the state
    document  (T,) int32   in time order
    picture   (T,) int32   in time order: number of the picture that the latent patch here belongs to, or -1; None if
                           there are no latents
    context                the ranks that share the rows, if each of them has a slice of the positions. All fields above
                           are then those of this rank's slice, but `position` also counts tokens before the slice.
    """

    batch: int
    length: int
    order: Tensor
    rows: Tensor
    offsets: Tensor
    modality: Tensor
    position: Tensor
    document: Tensor
    picture: Tensor | None = None
    context: Context | None = None

    @classmethod
    def build(
        cls,
        modality_BL: Tensor,
        document_BL: Tensor,
        order: Tensor,
        rows: Tensor,
        offsets: Tensor,
        *,
        past_B: Tensor | None = None,
        picture_BL: Tensor | None = None,
        context: Context | None = None,
    ) -> RowLayout:
        """Makes the layout from fields of a PackedBatch.

        `past_B` (B,) int says how many tokens of the first document of each row came in earlier chunks, whose state is
        carried in. By default, every row starts a document.
        """
        B, L = modality_BL.shape
        time = torch.arange(L, device=document_BL.device).expand(B, L)
        starts = torch.ones_like(document_BL, dtype=torch.bool)
        starts[:, 1:] = document_BL[:, 1:] != document_BL[:, :-1]
        begin = torch.where(starts, time, -255)
        if past_B is not None:
            begin[:, 0] = -past_B.clamp(max=255)
        position = (time - begin.cummax(1).values).clamp(max=255).to(torch.uint8)
        modality = modality_BL.reshape(-1).contiguous()  # the C kernels read raw memory
        picture = None if picture_BL is None else picture_BL.reshape(-1)
        offsets = offsets.to(torch.int32)
        fields = (order, rows, offsets, modality, position.reshape(-1), document_BL.reshape(-1), picture)
        return cls(B, L, *fields, context)

    @classmethod
    def sort(cls, modality_BL: Tensor, document_BL: Tensor, modalities: int, **kwargs: Any) -> RowLayout:
        """Makes the layout from modality (B, L) and document (B, L) alone. `kwargs` are those of `build`."""
        return cls.build(modality_BL, document_BL, *sort_by_modality(modality_BL, modalities), **kwargs)

    @property
    def tokens(self) -> int:
        """T, the number of positions in the batch, including padding."""
        return self.batch * self.length
