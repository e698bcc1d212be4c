"""Which ranks share the positions of a row, and the exchange between them.

If parallel.context_ranks is above 1, consecutive ranks form a context group, and each of them holds one slice of the
positions of every row. mom_train/model/context_scan.py explains how the scan runs across slices.
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
    """Says which slice of which rows a rank holds. The ranks that share rows are consecutive, so they are near each
    other."""

    rank: int = 0
    """Number of this rank's slice."""
    size: int = 1
    """Number of slices of a row. With 1, rows are whole, and nothing is exchanged."""
    data_rank: int = 0
    """Number of this rank's context group, which decides which rows it has."""
    data_ranks: int = 1
    """Number of context groups."""
    group: Any = None
    """Process group of the ranks that share rows, or None if `size` is 1."""

    @classmethod
    def of(cls, ranks: Ranks, size: int) -> Context:
        """The context of this rank, with `size` slices of a row. `size` must divide the number of ranks.

        Collective: every rank must call it, with the same `size`.
        """
        assert ranks.world_size % size == 0
        group = None
        if size > 1:
            shape = (ranks.world_size // size, size)
            mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("data", "context"))
            group = mesh.get_group("context")
        return cls(ranks.rank % size, size, ranks.rank // size, ranks.world_size // size, group)

    def share(self, batch: int, micro_batch: int, ramp: tuple[tuple[int, int], ...] = ()) -> Share:
        """The share of each batch that this rank's context group processes. `ramp` is as in `Share`."""
        return Share(self.data_rank, self.data_ranks, batch, micro_batch, ramp)


# PyTorch 2.13 renamed these functions; the second name is the one before
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


# as torch.compiler.disable, which would import the compiler at once: every command that reads a run would wait for it
@torch._disable_dynamo
def gather(mine: Tensor, group: Any) -> Tensor:
    """Stacks the tensors `mine` of all ranks of `group`: (...) -> (ranks, ...). Each rank gets the gradient of its
    own."""
    return _Gather.apply(mine, group)
