"""Which ranks share the positions of a row, and the exchange between them.

Where parallel.context_ranks is above 1, consecutive ranks form a context group: each of them holds one slice of every
row's positions. mom_train/model/context_scan.py has the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from mom_data.batches.loader import Share
from mom_train.distributed.ranks import Ranks


@dataclass(frozen=True)
class Context:
    """Which slice of which rows a rank holds. Consecutive ranks share rows, so that they are near each other."""

    rank: int = 0
    """Number of this rank's slice."""
    size: int = 1
    """Slices of a row; 1: rows are whole, and nothing is exchanged."""
    data_rank: int = 0
    """Which rows: the number of this rank's context group."""
    data_ranks: int = 1
    """Number of context groups."""
    group: Any = None
    """The ranks that share rows."""

    @classmethod
    def of(cls, ranks: Ranks, size: int) -> Context:
        """Collective: every rank is to call it alike, with a `size` that divides their number."""
        assert ranks.world_size % size == 0
        group = None
        if size > 1:
            shape = (ranks.world_size // size, size)
            mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("data", "context"))
            group = mesh.get_group("context")
        return cls(ranks.rank % size, size, ranks.rank // size, ranks.world_size // size, group)

    def share(self, batch: int, micro_batch: int) -> Share:
        """The sequences of this rank's context group."""
        return Share(self.data_rank, self.data_ranks, batch, micro_batch)


# their names from PyTorch 2.13 on, and before
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: Any) -> Tensor:
        ctx.group = group
        ranks = dist.get_world_size(group)
        of_all = mine.new_empty(ranks * mine.shape[0], *mine.shape[1:])
        _ALL_GATHER(of_all, mine.contiguous(), group)
        return of_all.view(ranks, *mine.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mine = grad.new_empty(grad.shape[1:])
        _REDUCE_SCATTER(mine, grad.contiguous().flatten(0, 1), group=ctx.group)
        return mine, None


@torch.compiler.disable
def gather(mine: Tensor, group: Any) -> Tensor:
    """What every rank of `group` holds, stacked (ranks, ...). The gradient goes back to the rank that it belongs to."""
    return _Gather.apply(mine, group)
