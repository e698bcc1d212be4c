"""Ranks: the process group, sharding, and decisions that all ranks make alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mom_tokenizers.errors import AgreedError, UserError

T = TypeVar("T")


CHECKPOINT_GROUP = "checkpoint"


_FIRST_FAILURE = "mom_first_failure"  # key in the ranks' store


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(timeout: float = 1800) -> Iterator[Ranks]:
    """Join the group that torchrun describes, or be a group of one. NCCL for CUDA tensors, gloo for the rest. A
    collective may take `timeout` seconds.

    A block that fails on one rank of several leaves the group as it is: to take it down can wait for the other ranks.
    The process is then to end (`exit_clearly` does that), which is how the others learn of it.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    world_size = dist.get_world_size()
    try:
        yield Ranks(dist.get_rank(), world_size, device, init_device_mesh(device.type, (world_size,)))
    except BaseException as error:
        if world_size == 1:
            dist.destroy_process_group()
        else:
            first_failure(error)
        raise
    dist.destroy_process_group()


def first_failure(error: BaseException) -> str:
    """`error`, or what failed on another rank before: then this rank's `error` is most likely no more than a connection
    that closed. The store that the ranks met at keeps the first one."""
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if isinstance(error, AgreedError):
        return said
    try:
        rank, store = dist.get_rank(), c10d._get_default_store()
        return store.compare_set(_FIRST_FAILURE, "", f"[rank {rank}] {said}" if rank else said).decode()
    except Exception:  # the store may be gone with its rank
        return said


def model_mesh(ranks: Ranks, shard_ranks: int | None) -> DeviceMesh:
    """All ranks share one copy of the model; or every `shard_ranks` of them do, and the copies are replicas (HSDP)."""
    if shard_ranks is None or shard_ranks == ranks.world_size:
        return ranks.mesh
    if ranks.world_size % shard_ranks:
        raise UserError(f"parallel.shard_ranks={shard_ranks} does not divide the {ranks.world_size} ranks")
    shape = (ranks.world_size // shard_ranks, shard_ranks)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))


def set_timeout(seconds: float) -> None:
    """How long a collective may take from now on before its rank fails; those that write a checkpoint take longer."""
    for group in list(c10d._world.pg_map):
        if group.group_desc != CHECKPOINT_GROUP:
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def agreed(work: Callable[[], T]) -> T:
    """Do `work`, which must hold no collective, on every rank; where it fails on any, fail on all.

    A UserError of any rank is raised on all as an AgreedError with the first such rank's message. Where anything else
    went wrong, the ranks on which it did raise that, and the others a RuntimeError that names the first of them. No
    rank is left waiting in a collective.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    mine = None if error is None else (isinstance(error, UserError), str(error), type(error).__name__)
    everyone: list[tuple[bool, str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    failed = [(rank, failure) for rank, failure in enumerate(everyone) if failure is not None]
    if error is not None and not isinstance(error, UserError):
        raise error
    for rank, (mendable, message, kind) in failed:
        if not mendable:
            raise RuntimeError(f"rank {rank} failed: {kind}: {message}")
    if failed:
        rank, (_, message, _) = failed[0]
        raise AgreedError(message if len(failed) == len(everyone) else f"[rank {rank}] {message}") from error
    return result  # type: ignore[return-value]
