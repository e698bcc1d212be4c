"""How large the activations of each block are, by modality, and how far an update moves each kind of weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle


class BlockStatistics:
    """Statistics of single steps. Between these steps the model has no hooks, so that they cost nothing.

    stats/rms/B/MODALITY and stats/max/B/MODALITY are the root mean square and the largest magnitude of the residual
    stream behind block B, over the positions of the modality in the batches of all ranks; a modality that has none is
    left out. stats/update/KIND is ||w' - w|| / ||w|| of all weights w of one kind (in_proj, embedding, A_log, ...) that
    the update turned into w'; it is left out for weights that are all 0.

    All ranks must call every method alike. The weights are held twice while they are updated.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], modalities: Sequence[str]):
        self._model, self._blocks, self._modalities = model, blocks, modalities
        self._hooks: list[RemovableHandle] = []
        self._sums: list[list[Tensor]] = []  # by block: sums of squares, counts and maxima, (M,) float64 each
        self._update: dict[str, Tensor] | None = None

    @property
    def measuring(self) -> bool:
        """Whether `begin` was called for the present step."""
        return bool(self._hooks)

    def begin(self) -> None:
        """The step that begins now is measured."""
        self._remove()
        self._update = None
        device = next(self._model.parameters()).device
        zeros = partial(torch.zeros, len(self._modalities), dtype=torch.float64, device=device)
        self._sums = [[zeros(), zeros(), zeros()] for _ in self._blocks]
        self._hooks = [b.register_forward_hook(partial(self._look, i)) for i, b in enumerate(self._blocks)]

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _look(self, place: int, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Adds up what a block returns, in row order: a tensor (T, dim), or two whose sum it is."""
        x_Td, more_Td = output if isinstance(output, tuple) else (output, None)
        x_Td = x_Td.float() if more_Td is None else x_Td.float() + more_Td
        offsets = inputs[1].offsets.to(x_Td.device)
        modality_T = torch.searchsorted(offsets[1:], torch.arange(len(x_Td), device=x_Td.device), right=True)
        squares_M, counts_M, maxima_M = (sums.to(x_Td.device) for sums in self._sums[place])
        squares_M = squares_M.index_add(0, modality_T, x_Td.double().square().sum(1))
        counts_M = counts_M + offsets.diff() * x_Td.shape[1]
        maxima_M = maxima_M.scatter_reduce(0, modality_T, x_Td.abs().amax(1).double(), "amax")
        self._sums[place] = [squares_M, counts_M, maxima_M]

    @contextmanager
    def update(self) -> Iterator[None]:
        """A context for the update of the weights."""
        if not self.measuring:
            yield
            return
        before = {name: _local(p).detach().clone() for name, p in self._model.named_parameters()}
        yield
        sums: dict[str, Tensor] = {}
        for name, p in self._model.named_parameters():
            old, new = before.pop(name).double(), _local(p).detach().double()
            both = torch.stack([(new - old).square().sum(), old.square().sum()])
            kind = _kind(name)
            sums[kind] = sums[kind] + both if kind in sums else both
        self._update = sums

    def figures(self) -> dict[str, float]:
        """The statistics of the step, or nothing if it was not measured. Collective where it was."""
        if not self.measuring:
            return {}
        self._remove()
        stacked = torch.stack([torch.stack(sums) for sums in self._sums])  # (blocks, 3, M)
        totals, maxima = stacked[:, :2].contiguous(), stacked[:, 2].contiguous()
        dist.all_reduce(totals)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        values: dict[str, float] = {}
        for block, ((squares_M, counts_M), maxima_M) in enumerate(zip(totals.tolist(), maxima.tolist(), strict=True)):
            for modality, squares, count, most in zip(self._modalities, squares_M, counts_M, maxima_M, strict=True):
                if count:
                    values[f"stats/rms/{block}/{modality}"] = (squares / count) ** 0.5
                    values[f"stats/max/{block}/{modality}"] = most
        if self._update is not None:
            moved = torch.stack(list(self._update.values()))
            dist.all_reduce(moved)  # replicas count each weight several times, in both sums alike
            for kind, (change, weight) in zip(self._update, moved.tolist(), strict=True):
                if weight:
                    values[f"stats/update/{kind}"] = (change / weight) ** 0.5
        return values


def _local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


def _kind(name: str) -> str:
    """The kind of a weight: blocks.0.block.mixer.in_proj.weight -> in_proj, blocks.0.block.mixer.A_log -> A_log."""
    *_, module, leaf = ["", *name.split(".")]
    return module if leaf in ("weight", "bias") else leaf
