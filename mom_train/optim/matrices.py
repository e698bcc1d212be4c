"""The matrices that Muon orthogonalises one by one: where their rows lie, which rank owns them, and how they get there.

A projection holds one matrix per modality, and the linear maps to x and z of one modality are stacked in it. Each of
these is a matrix of its own. FSDP2 cuts a parameter into shards without regard to their boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from mom_train.config.model import ModelConfig
from mom_train.config.muon import MuonConfig


@dataclass(frozen=True)
class Matrix:
    """Rows of a parameter that are a matrix of their own."""

    parameter: int
    """Index of the parameter."""
    first: int
    """Index of the first row in the whole parameter."""
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns


def matrix_rows(model: nn.Module, config: MuonConfig) -> dict[str, list[int]]:
    """For each parameter of `model` that Muon trains, by name, the rows of the matrices that it holds, in order."""
    described = cast(ModelConfig, model.config)
    chosen = config.names(described)
    found = {}
    for name, parameter in model.named_parameters():
        *_, projection, leaf = ["", *name.split(".")]
        if leaf == "weight" and projection in chosen:
            stacked = described.matrices[projection][1]
            found[name] = [*stacked] * (len(parameter) // sum(stacked))
    return found


def local(t: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor itself if it is not sharded."""
    return t.to_local() if isinstance(t, DTensor) else t


class Owners:
    """Brings the rows of each matrix to the one rank that owns it, and back.

    Matrices are dealt to the ranks that share a copy of the model from the largest to the smallest, so that all have
    about as much work. Replicas (HSDP) do the same work each for itself. Everything here follows from shapes and the
    number of ranks alone. On a single rank nothing is sent.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rows: Sequence[Sequence[int]]):
        self._group, self._ranks, self._rank = _shard_group(parameters)
        self.matrices: list[Matrix] = []
        """All matrices, in the order of the parameters and their rows."""
        for index, (parameter, of_parameter) in enumerate(zip(parameters, rows, strict=True)):
            first = 0
            for n in of_parameter:
                self.matrices.append(Matrix(index, first, n, parameter.shape[1]))
                first += n
            assert first == len(parameter), "the matrices must cover the parameter"
        largest_first = sorted(range(len(self.matrices)), key=lambda i: -self.matrices[i].elements)
        self.owner = {matrix: place % self._ranks for place, matrix in enumerate(largest_first)}
        """Rank that owns a matrix, by its index."""
        self.owned = [i for i in range(len(self.matrices)) if self.owner[i] == self._rank]
        """Indices of the matrices that this rank owns."""
        self._whole_rows = [len(parameter) for parameter in parameters]
        for index, parameter in enumerate(parameters):
            start, stop = self._shard(index, self._rank)
            assert len(local(parameter)) == stop - start, "FSDP2 shards rows as torch.chunk does"
        # This rank sends its rows of every matrix, ordered by owner, and receives those of its own matrices, by rank.
        self._outgoing = sorted(range(len(self.matrices)), key=lambda i: (self.owner[i], i))
        self._ranges = [self._range(i, self._rank) for i in self._outgoing]
        self._incoming = [[self._part(i, rank) for i in self.owned] for rank in range(self._ranks)]
        self._received = [sum(parts) for parts in self._incoming]
        self._sent = [0] * self._ranks
        for i in self._outgoing:
            self._sent[self.owner[i]] += self._part(i, self._rank)

    def _shard(self, parameter: int, rank: int) -> tuple[int, int]:
        """First row and row after the last of a rank's shard: chunks of equal size, but for the last ones."""
        rows = self._whole_rows[parameter]
        chunk = -(-rows // self._ranks)
        return min(rank * chunk, rows), min((rank + 1) * chunk, rows)

    def _range(self, matrix: int, rank: int) -> tuple[int, int]:
        """Rows of a rank's shard that belong to a matrix, counted within the shard."""
        of = self.matrices[matrix]
        start, stop = self._shard(of.parameter, rank)
        low, high = max(start, of.first), min(stop, of.first + of.rows)
        return (low - start, high - start) if low < high else (0, 0)

    def _part(self, matrix: int, rank: int) -> int:
        """Number of elements of a matrix that lie in a rank's shard."""
        low, high = self._range(matrix, rank)
        return (high - low) * self.matrices[matrix].columns

    def matrix_of_row(self, parameter: int) -> Tensor:
        """For each row of this rank's shard of a parameter, the index of its matrix, (rows,) int64 on the CPU."""
        start, stop = self._shard(parameter, self._rank)
        index = [(i, m.rows) for i, m in enumerate(self.matrices) if m.parameter == parameter]
        whole = torch.tensor([i for i, _ in index]).repeat_interleave(torch.tensor([n for _, n in index]))
        return whole[start:stop]

    def any_of(self, flags: Tensor) -> Tensor:
        """The largest value on any of the ranks that share a copy, in place. Collective."""
        if self._ranks > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        return flags

    def gather(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The whole matrices that this rank owns, from every rank's `shards` of all parameters. Collective.

        Each is in memory of its own, so that a product of it does not depend on how many ranks there are.
        """
        pieces = [
            shards[self.matrices[i].parameter][low:high].reshape(-1)
            for i, (low, high) in zip(self._outgoing, self._ranges, strict=True)
        ]
        received = self._exchange(torch.cat(pieces), self._sent, self._received).split(self._received)
        by_rank = [part.split(sizes) for part, sizes in zip(received, self._incoming, strict=True)]
        return [
            torch.cat([parts[k] for parts in by_rank]).view(self.matrices[i].rows, self.matrices[i].columns)
            for k, i in enumerate(self.owned)
        ]

    def scatter(self, whole: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `gather`: this rank's shards of all parameters, as large as `like`. Collective."""
        by_matrix = [
            matrix.reshape(-1).split(sizes)
            for matrix, sizes in zip(whole, zip(*self._incoming, strict=True), strict=True)
        ]
        pieces = [parts[rank] for rank in range(self._ranks) for parts in by_matrix]
        outgoing = torch.cat(pieces) if pieces else like[0].new_empty(0)
        received = self._exchange(outgoing, self._received, self._sent)
        shards = [torch.empty_like(t) for t in like]
        columns = [self.matrices[i].columns for i in self._outgoing]
        sizes = [(high - low) * n for (low, high), n in zip(self._ranges, columns, strict=True)]
        for i, (low, high), part in zip(self._outgoing, self._ranges, received.split(sizes), strict=True):
            shards[self.matrices[i].parameter][low:high] = part.view(high - low, self.matrices[i].columns)
        return shards

    def _exchange(self, outgoing: Tensor, sent: list[int], received: list[int]) -> Tensor:
        if self._ranks == 1:
            return outgoing
        incoming = outgoing.new_empty(sum(received))
        dist.all_to_all_single(incoming, outgoing, received, sent, group=self._group)
        return incoming


def _shard_group(parameters: Sequence[nn.Parameter]) -> tuple[Any, int, int]:
    """The process group of the ranks that share one copy of the parameters, their number, and this rank's place."""
    first = parameters[0]
    if not isinstance(first, DTensor):
        return None, 1, 0
    mesh = first.device_mesh
    assert first.placements[-1] == Shard(0), "FSDP2 shards the first dimension over the last dimension of its mesh"
    group = mesh.get_group(mesh.ndim - 1)
    return group, dist.get_world_size(group), dist.get_rank(group)
