"""The process group, the device mesh for sharding, and decisions that all ranks share."""

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


_FIRST_FAILURE = "mom_first_failure"  # key in the store that all ranks can read


@dataclass(frozen=True)
class Ranks:
    """The place of this process among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes the files of the run."""
        return self.rank == 0


@contextmanager
def process_group(timeout: float = 1800) -> Iterator[Ranks]:
    """A context in which this process belongs to the group that torchrun describes, or else to a group of one.

    NCCL carries CUDA tensors and gloo all others. A collective operation may take `timeout` seconds. Raises UserError
    if there are more processes than GPUs on this machine. docs/explanation/multi-gpu.md says what depends on NCCL.

    If the context is left by an error on one of several ranks, the group is not destroyed, because that could wait for
    the other ranks. The process must then end (`exit_clearly` does that), which is how the others learn of it.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise UserError(
                f"process {local_rank} of this machine (LOCAL_RANK, from 0) has no GPU of its own, because "
                f"{gpus} can be seen here: start at most {gpus} processes per machine (--nproc-per-node), and let each "
                "see all GPUs of its machine (CUDA_VISIBLE_DEVICES, Slurm's --gpu-bind=none)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    # Without device_id: with it, meshes of several dimensions split NCCL's group, and in versions of torch that split
    # one backend only, the parts lack gloo, which parallel.cpu_offload needs.
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
    """The message of the first error on any rank, which the store shared by the ranks keeps.

    If another rank failed earlier, `error` is most likely only the consequence: a connection that closed.
    """
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if isinstance(error, AgreedError):
        return said
    try:
        rank, store = dist.get_rank(), c10d._get_default_store()
        return store.compare_set(_FIRST_FAILURE, "", f"[rank {rank}] {said}" if rank else said).decode()
    except Exception:  # the store is gone if the rank that holds it has ended
        return said


def model_mesh(ranks: Ranks, shard_ranks: int | None) -> DeviceMesh:
    """The device mesh over which the model is sharded.

    All ranks share one copy of the model, or each group of `shard_ranks` ranks does, and the copies are replicas
    (HSDP).
    """
    if shard_ranks is None or shard_ranks == ranks.world_size:
        return ranks.mesh
    if ranks.world_size % shard_ranks:
        raise UserError(f"parallel.shard_ranks={shard_ranks} does not divide the {ranks.world_size} ranks")
    shape = (ranks.world_size // shard_ranks, shard_ranks)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard"))


def set_timeout(seconds: float) -> None:
    """Sets how long a collective operation may take from now on before its rank fails.

    The group that writes checkpoints keeps its own, longer timeout.
    """
    for group in list(c10d._world.pg_map):
        if group.group_desc != CHECKPOINT_GROUP:
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def agreed(work: Callable[[], T]) -> T:
    """Does `work` on every rank and returns its result. If it fails on any rank, it fails on all.

    `work` must contain no collective operation. If it raises a UserError on any rank, all ranks raise an AgreedError
    with the message of the first such rank. If it raises another error, the ranks concerned raise that error, and the
    others raise a RuntimeError that names the first of them. So no rank is left waiting in a collective operation.
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
