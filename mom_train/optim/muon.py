"""The optimiser Muon for the matrices of the blocks, with AdamW for everything else.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) averages gradients and makes the update of each matrix
nearly orthogonal by a Newton-Schulz iteration, so that all its directions are updated at about the same rate. How large
a gradient is does not matter to it, only its direction does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mom_train.config.muon import MuonConfig
from mom_train.optim.matrices import Owners, local

_EPS = 1e-7


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], iterations: int) -> Tensor:
    """The matrix with all its singular values moved near 1, in the matrix's own precision.

    X <- aX + b(XX^T)X + c(XX^T)^2X, starting from X = matrix / |matrix| (Frobenius norm). With the published
    coefficients and five iterations, singular values end between about 0.6 and 1.2. A matrix with more rows than
    columns is transposed meanwhile. A matrix of zeros stays zero.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T.contiguous() if tall else matrix
    x = x / x.norm().clamp(min=_EPS)
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def adjusted(config: MuonConfig, rows: int, columns: int) -> float:
    """The factor on the learning rate for a matrix of this shape (`optimizer.muon.adjust`)."""
    if config.adjust == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


class Muon(torch.optim.Optimizer):
    """Muon for the matrices in `muon`, AdamW for `adamw`. The shards of FSDP2 need no gathering.

    A step does the following for the matrices, of which each modality has its own:

    1. Each rank averages the gradients in its own shard: m <- momentum m + (1 - momentum) g. This is elementwise, so
       it does not depend on the number of ranks, and a checkpoint can be loaded on another number of them.
    2. The owner of each matrix receives its rows, orthogonalises it as a whole, and sends the rows back.
    3. Each rank updates its shard: w <- (1 - rate * decay) w - rate * factor * O.

    So the result is the same to the last bit on any number of ranks, if the gradients are.

    A matrix whose gradient is zero in the whole batch is left as it is, in weight and momentum: that of a modality
    without a token, or of an expert that no token chose. Otherwise the momentum of earlier steps would go on moving it
    as fast as ever, because its size does not matter. The ranks agree on it in one message. AdamW's parameters are
    treated as in `build_optimizer`.

    If `found_inf` is set to a tensor other than 0, nothing is updated. The host does not wait for its value.
    """

    found_inf: Tensor | None = None
    """Whether the step is bad, as a float scalar on the device, or None."""
    grad_scale: Tensor | None = None
    """What gradients are divided by, as a float scalar on the device, or None."""

    def __init__(
        self,
        adamw: torch.optim.AdamW,
        groups: Sequence[dict[str, Any]],
        rows: Sequence[Sequence[int]],
        config: MuonConfig,
        factors: Sequence[float] | None = None,
    ):
        """`adamw` is the optimiser of everything else, which becomes a part of this one. `groups` are parameter groups
        for Muon with `params`, `lr` and `weight_decay`, and `rows` the rows of the matrices of each of their
        parameters, in order. `factors` has the factor on the rate for each matrix; by default, it follows from its
        shape (`adjusted`)."""
        self._adamw, self._config = adamw, config
        self._others = len(adamw.param_groups)
        super().__init__([*adamw.param_groups, *groups], {"lr": 0.0, "weight_decay": 0.0})
        parameters = [p for p, _ in self._matrices()]
        self._owners = Owners(parameters, rows)
        self._index = [self._owners.matrix_of_row(i).to(p.device) for i, p in enumerate(parameters)]
        if factors is None:
            factors = [adjusted(config, m.rows, m.columns) for m in self._owners.matrices]
        self._factor = torch.tensor([*factors], device=parameters[0].device)

    def _matrices(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        """The parameters that Muon trains, each with its group."""
        return [(p, group) for group in self.param_groups[self._others :] for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step. Collective: every rank is to call it."""
        assert closure is None, "a step cannot compute the loss again"
        # loading a state replaces groups and state, so AdamW is given them anew
        self._adamw.param_groups, self._adamw.state = self.param_groups[: self._others], self.state
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.grad_scale = self.grad_scale  # type: ignore[attr-defined]
        self._adamw.step()
        self._step_matrices()

    def _step_matrices(self) -> None:
        config, owners = self._config, self._owners
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        entries = self._matrices()
        gradients = [local(p.grad) if p.grad is not None else torch.zeros_like(local(p)) for p, _ in entries]
        if self.grad_scale is not None:
            torch._foreach_div_(gradients, self.grad_scale)
        moves = self._moves(gradients)
        updates = []
        for (p, _), g, index in zip(entries, gradients, self._index, strict=True):
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            momentum = local(state["momentum_buffer"])
            averaged = momentum.lerp(g, 1 - config.momentum)
            updates.append((g.lerp(averaged, config.momentum) if config.nesterov else averaged).to(dtype))
            momentum.copy_(torch.where(moves[index, None], averaged, momentum))
        whole = [newton_schulz(m, config.coefficients, config.iterations) for m in owners.gather(updates)]
        for (p, group), o, index in zip(entries, owners.scatter(whole, updates), self._index, strict=True):
            weight, rate = local(p), group["lr"]
            step = o * (rate * self._factor[index, None])
            moved = weight * (1 - rate * group["weight_decay"]) - step
            weight.copy_(torch.where(moves[index, None], moved, weight))

    def _moves(self, gradients: Sequence[Tensor]) -> Tensor:
        """Which matrices are updated, (matrices,) bool on the device: those with a gradient, unless the step is bad."""
        flags = torch.zeros_like(self._factor)
        for g, index in zip(gradients, self._index, strict=True):
            flags.scatter_reduce_(0, index, (g != 0).any(1).to(flags.dtype), "amax")
        moves = self._owners.any_of(flags) != 0
        return moves if self.found_inf is None else moves & (self.found_inf.to(moves.device) == 0)
