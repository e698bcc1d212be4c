"""An exponential moving average of the weights, sharded in the same way as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Ema:
    """The moving average of the weights of a model.

    `average` has a tensor for each parameter, with its type, shape and placement. Each rank averages its own shard, and
    nothing is communicated.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._parameters = dict(model.named_parameters())
        self._model, self.decay = model, decay
        self.average: dict[str, Tensor] = {n: p.detach().clone() for n, p in self._parameters.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the average to the current weights."""
        torch._foreach_copy_(_local(self.average), _local(self._parameters))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the average after optimiser step `step`, counted from 1: average += (1 - d)(weights - average).

        d is min(decay, (1 + step) / (10 + step)), so that the initial weights are soon forgotten.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(_local(self.average), _local(self._parameters), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model computes with the averages. After it, the model has its own weights again."""
        own = [p.detach().clone() for p in _local(self._parameters)]
        self._fill(_local(self.average))
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for unit in self._model.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()  # a unit that is still gathered after a forward pass would compute with the old values
        torch._foreach_copy_(_local(self._parameters), values)


def _local(tensors: dict[str, Tensor] | dict[str, nn.Parameter]) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
