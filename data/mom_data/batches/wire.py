"""A batch between processes: one flat buffer, because every tensor sent costs its own shared memory and file
descriptor."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mom_data.batches.batch import PackedBatch

_ALIGNMENT = 64  # bytes, of every tensor in the buffer


@dataclass(frozen=True)
class Header:
    """What the buffer holds. Not a tuple or a dict, which a DataLoader that pins would take apart and rebuild."""

    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    rest: dict[str, Any]


def to_wire(batch: PackedBatch) -> tuple[Tensor, Header]:
    """A batch as one uint8 tensor and a small header, for a DataLoader worker to yield."""
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    tensors = {name: x for name, x in values.items() if isinstance(x, Tensor)}
    rest = {name: x for name, x in values.items() if name not in tensors}
    layout = tuple((name, x.dtype, tuple(x.shape)) for name, x in tensors.items())
    places, size = _places(layout)
    flat = torch.empty(size, dtype=torch.uint8)
    for x, (at, end) in zip(tensors.values(), places, strict=True):
        flat[at:end].view(x.dtype).copy_(x.reshape(-1))
    return flat, Header(layout, rest)


def from_wire(flat: Tensor, header: Header) -> PackedBatch:
    """The batch again, its tensors views of `flat`: nothing is copied, and what is pinned stays so."""
    places, size = _places(header.tensors)
    assert flat.dtype == torch.uint8
    assert flat.shape == (size,)
    tensors: dict[str, Any] = {
        name: flat[at:end].view(dtype).view(shape)
        for (name, dtype, shape), (at, end) in zip(header.tensors, places, strict=True)
    }
    return PackedBatch(**tensors, **header.rest)


def _places(layout: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> tuple[list[tuple[int, int]], int]:
    """[first, end) byte of each tensor, and the bytes of all."""
    places, at = [], 0
    for _, dtype, shape in layout:
        end = at + math.prod(shape) * dtype.itemsize
        places.append((at, end))
        at = -(-end // _ALIGNMENT) * _ALIGNMENT
    return places, at
