"""Sharding with FSDP2: which parts of the model are gathered together, in which precision, and how their gradients are
summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mom_train.model.diffusion import PatchEmbedding, PatchHead
from mom_train.model.language_model import Head, LanguageModel
from mom_train.model.routed import Projection, RoutedProjection

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(
    model: LanguageModel, mesh: DeviceMesh, compiled: bool = False, cpu_offload: bool = False, bf16: bool = False
) -> LanguageModel:
    """Shards the model over `mesh` with FSDP2, in one unit per block and one for each embedding and head. Returns it.

    With `compiled`, each block is first compiled with torch.compile, to which our kernels are opaque operators.
    Gradients are summed over ranks, not averaged: the loss is divided by the global count of targets before the
    backward pass, so the sum is the gradient of the global mean, however the targets are distributed over ranks.

    With `bf16`, the operands of matrix products (`gathered_in_bf16`) are gathered in bf16, which rounds them as
    autocast would, and their gradients are summed in fp32. The shards, which the optimiser updates, remain fp32. A unit
    of FSDP2 has one precision, so what else is in the blocks belongs to the root's unit, which is gathered once for a
    forward and a backward pass.
    """
    # here, because it takes a second that a command which only counts units would wait for
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    compile_blocks(model, compiled)
    policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    parts = [model.embedding, model.patch_embedding, *model.blocks, model.patch_head, model.head]
    units = [part for part in parts if part is not None]
    if bf16:
        half = gathered_in_bf16(model)
        # The root comes first, because fully_shard passes over modules that are units already.
        fully_shard(model, mesh=mesh, offload_policy=policy, ignored_params={*half, *model.embedding.parameters()})
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for unit in units:
            if unit is model.embedding:
                fully_shard(unit, mesh=mesh, offload_policy=policy)
            else:
                rest = {p for p in unit.parameters() if p not in half}
                fully_shard(unit, mesh=mesh, offload_policy=policy, mp_policy=precision, ignored_params=rest)
    else:
        for unit in (*units, model):
            fully_shard(unit, mesh=mesh, offload_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def compile_blocks(model: LanguageModel, compiled: bool) -> None:
    """Lets torch.compile compile each block at its first use, if `compiled`."""
    for block in model.blocks if compiled else ():
        block.compile()


def gathered_in_bf16(model: LanguageModel) -> set[nn.Parameter]:
    """The operands of matrix products: the weights of projections, of the head and of the maps of latent patches.

    Everything else stays fp32: norms, convolution, A, D, the bias of the time step, routers, and the embedding, whose
    rows are looked up.
    """
    half: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, Projection | RoutedProjection | Head):
            half.add(module.weight)
        elif isinstance(module, PatchEmbedding | PatchHead):
            half.update(module.parameters())
    return half
