"""Sharding with FSDP2: which parts of the model are gathered together, and how their gradients are summed."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from mom_train.model.language_model import LanguageModel


def shard(model: LanguageModel, mesh: DeviceMesh, compiled: bool = False, cpu_offload: bool = False) -> LanguageModel:
    """Shards the model over `mesh` with FSDP2, in one unit per block and one for each embedding and head. Returns it.

    With `compiled`, each block is first compiled with torch.compile, to which our kernels are opaque operators.
    Gradients are summed over ranks, not averaged: the loss is divided by the global count of targets before the
    backward pass, so the sum is the gradient of the global mean, however the targets are distributed over ranks.
    """
    if compiled:
        for block in model.blocks:
            block.compile()
    policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    for module in (model.embedding, model.patch_embedding, *model.blocks, model.patch_head, model.head, model):
        if module is not None:
            fully_shard(module, mesh=mesh, offload_policy=policy)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    return model
