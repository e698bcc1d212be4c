"""Sends a batch between processes as one flat buffer, because every tensor that is sent takes shared memory and a file
descriptor of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mom_data.batches.batch import PackedBatch

_ALIGNMENT = 64  # every tensor in the buffer begins at a multiple of this many bytes


@dataclass(frozen=True)
class Header:
    """What the buffer holds. It is not a tuple or a dict, because a DataLoader that pins takes those apart."""

    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    rest: dict[str, Any]


def to_wire(batch: PackedBatch) -> tuple[Tensor, Header]:
    """The batch as one uint8 tensor and a small header, which a DataLoader worker yields."""
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
    """The batch again. Its tensors are views of `flat`, so nothing is copied and pinned memory stays pinned."""
    places, size = _places(header.tensors)
    assert flat.dtype == torch.uint8
    assert flat.shape == (size,)
    tensors: dict[str, Any] = {
        name: flat[at:end].view(dtype).view(shape)
        for (name, dtype, shape), (at, end) in zip(header.tensors, places, strict=True)
    }
    return PackedBatch(**tensors, **header.rest)


def _places(layout: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> tuple[list[tuple[int, int]], int]:
    """([first, end) byte of each tensor, the number of bytes of all tensors)."""
    places, at = [], 0
    for _, dtype, shape in layout:
        end = at + math.prod(shape) * dtype.itemsize
        places.append((at, end))
        at = -(-end // _ALIGNMENT) * _ALIGNMENT
    return places, at
