"""The norms of a step's gradient, and its clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_EPS = 1e-6  # added to the norm before the division, as torch.nn.utils.clip_grad_norm_ does


class Clipping:
    """Clips the gradient of a sharded model to the norm `clip`, and tells its norms.

    On a GPU (`one_pass`), the gradient is read once: one multi-tensor kernel gives the norm of each piece, and the
    total, the kinds of projections and the modalities are sums over pieces. The gradient is not scaled here. Instead,
    the optimiser divides it by `grad_scale` in the kernel that reads it anyway. Nothing makes the host wait.

    On a CPU, clip_grad_norm_ scales the gradient, and norms of kinds and modalities are sums in float64.
    """

    def __init__(self, model: nn.Module, modalities: Sequence[str], clip: float, copies: int, one_pass: bool):
        """`copies` is the number of groups of ranks that hold the whole model each."""
        self._model, self._modalities, self._clip, self._copies = model, modalities, clip, copies
        self._pieces = _Pieces(model, modalities) if one_pass else None

    @torch.no_grad()
    def __call__(
        self, sums: Tensor, optimizer: torch.optim.Optimizer, detailed: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Prepares a step of the optimiser. Collective.

        `sums` are the float64 loss sums of this rank, of any length. Returns those of all ranks, and norms of the
        gradient before clipping as scalars: "total", and if `detailed` by kind of projection and by modality.
        """
        if self._pieces is None:
            return self._as_on_a_cpu(sums, detailed)
        names, squares_K = self._pieces.squares()
        both = torch.cat([sums, squares_K])
        dist.all_reduce(both)
        all_sums, squares_K = both[: len(sums)], both[len(sums) :] / self._copies
        norms = dict(zip(names, squares_K.sqrt().unbind(), strict=True))
        total = norms["total"].float()
        optimizer.grad_scale = ((total + _EPS) / self._clip).clamp(min=1)  # type: ignore[attr-defined]
        return all_sums, {**(norms if detailed else {}), "total": total}

    def _as_on_a_cpu(self, sums: Tensor, detailed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        all_sums = sums.clone()
        dist.all_reduce(all_sums)
        norms: dict[str, Tensor] = {}
        if detailed:
            squares = gradient_squares(self._model, self._modalities)
            stacked = torch.stack(list(squares.values())).to(sums.device)
            dist.all_reduce(stacked)
            norms = dict(zip(squares, (stacked / self._copies).sqrt(), strict=True))
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        norms["total"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return all_sums, norms


class _Pieces:
    """The gradient of this rank in pieces: one for each parameter, or one for each modality of a decoupled one."""

    def __init__(self, model: nn.Module, modalities: Sequence[str]):
        self._ranges: list[tuple[nn.Parameter, slice]] = []
        parts_of_piece: list[tuple[str, ...]] = []
        for name, module in model.named_modules():
            part = part_of_module(name)
            for leaf, parameter in module.named_parameters(recurse=False):
                rows, first = _local_rows(parameter)
                if leaf != "weight" or part is None:
                    self._ranges.append((parameter, slice(0, rows)))
                    parts_of_piece.append(())
                elif getattr(module, "modalities", 1) == 1:
                    self._ranges.append((parameter, slice(0, rows)))
                    parts_of_piece.append((part,))
                else:
                    each = len(parameter) // len(modalities)
                    for m, modality in enumerate(modalities):
                        own = slice(max(0, m * each - first), max(0, (m + 1) * each - first))
                        self._ranges.append((parameter, own))
                        parts_of_piece.append((part, modality))
        self._names = ["total", *dict.fromkeys(part for parts in parts_of_piece for part in parts)]
        member = [[n == "total" or n in parts for parts in parts_of_piece] for n in self._names]
        self._member_KP = torch.tensor(member)

    def squares(self) -> tuple[list[str], Tensor]:
        """Names, "total" first, and for each the sum of squares on this rank, (K,) float64 on the device."""
        pieces: list[Tensor] = []
        local: dict[int, Tensor | None] = {}
        place: list[int | None] = []  # of each piece in `pieces`; None if it is empty or has no gradient
        for parameter, rows in self._ranges:
            if id(parameter) not in local:
                gradient = parameter.grad
                local[id(parameter)] = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            whole = local[id(parameter)]
            piece = None if whole is None else whole[rows]
            if piece is None or not piece.numel():
                place.append(None)
                continue
            place.append(len(pieces))
            pieces.append(piece)
        device = pieces[0].device
        self._member_KP = self._member_KP.to(device)  # copied in the first step only
        zero = torch.zeros((), device=device)
        norms = torch._foreach_norm(pieces)
        squares_P = torch.stack([zero if i is None else norms[i] for i in place]).double().square()
        # where and not a product, because 0 times infinity is NaN
        return self._names, torch.where(self._member_KP, squares_P, 0.0).sum(1)


def _local_rows(parameter: Tensor) -> tuple[int, int]:
    """(number of rows of this rank's shard, its first row in the whole parameter)."""
    if not isinstance(parameter, DTensor):
        return len(parameter), 0
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return shape[0], offset[0]


def part_of_module(name: str) -> str | None:
    """The name under which the norm of a module's weight is told, or None if it is not told by itself."""
    part = name.rsplit(".", 1)[-1]
    return part if part.endswith("_proj") or part in ("embedding", "head") else None


@torch.no_grad()
def gradient_squares(model: nn.Module, modalities: Sequence[str]) -> dict[str, Tensor]:
    """Sums of squared gradients on this rank, as float64 scalars by name.

    There is one for the embedding, the head and each kind of projection, and one for each modality, over its rows of
    the decoupled projections. If they are summed over the ranks that shard the model, their square roots are norms.
    """
    sums: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        part, weight = part_of_module(name), getattr(module, "weight", None)
        if part is None or weight is None or weight.grad is None:
            continue
        gradient, (_, first) = weight.grad, _local_rows(weight)
        gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        squares_O = gradient.double().square().sum(1)
        zero = squares_O.new_zeros(())
        sums[part] = sums.get(part, zero) + squares_O.sum()
        if getattr(module, "modalities", 1) == 1:
            continue
        rows = len(weight) // len(modalities)
        for m, modality in enumerate(modalities):
            own = squares_O[max(0, m * rows - first) : max(0, (m + 1) * rows - first)]
            sums[modality] = sums.get(modality, zero) + own.sum()
    return sums
