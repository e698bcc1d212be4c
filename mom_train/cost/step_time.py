"""Time of a training step on a cluster, predicted from the config: computation, and what ranks send each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mom_tokenizers.errors import UserError
from mom_train.config.run import RunConfig
from mom_train.cost.flops import TRAINING_FACTOR, forward_flops_per_token
from mom_train.cost.memory import memory


@dataclass(frozen=True)
class Gpu:
    bf16_flops: float
    """Dense, per second (NVIDIA's data sheets)."""
    memory: float
    """Bytes."""
    nvlink: float
    """Bytes per second and direction to the other GPUs of a node."""


GPUS = {
    "a100": Gpu(312e12, 80e9, 300e9),
    "h100": Gpu(989e12, 80e9, 450e9),
    "h200": Gpu(989e12, 141e9, 450e9),
    "b200": Gpu(2250e12, 180e9, 900e9),
}


# Between nodes: nominal bytes per second and direction of one node, all its adapters together.
INTERCONNECTS = {
    "infiniband-ndr": 8 * 400e9 / 8,  # eight adapters of 400 Gb/s, one for each GPU
    "infiniband-hdr": 8 * 200e9 / 8,
    "ethernet-400g": 400e9 / 8,
    "ethernet-100g": 100e9 / 8,
}


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers and sums at a time."""

    name: str
    padded: int
    """Parameters, each padded to a multiple of the ranks that share it in its first dimension."""
    tensors: int


def shared_by(config: RunConfig, ranks: int) -> int:
    """S, the ranks that share one copy of the model. Raises ValueError where they cannot."""
    S = config.parallel.shard_ranks or ranks
    if ranks % S:
        raise UserError(f"parallel.shard_ranks={S} does not divide the {ranks} ranks")
    if config.parallel.context_ranks > 1:
        raise UserError("parallel.context_ranks: what goes from slice to slice of a row is not predicted here")
    return S


def units(config: RunConfig, shard_ranks: int) -> list[Unit]:
    """The units of `shard` in the order of the forward pass; the last is what is left to the root."""
    import torch

    from mom_train.model.language_model import build_model

    model = build_model(config)
    parts: dict[str, torch.nn.Module | None]
    parts = {"embedding": model.embedding, "patch_embedding": model.patch_embedding}
    parts |= {f"blocks.{i}": block for i, block in enumerate(model.blocks)}
    parts |= {"patch_head": model.patch_head, "head": model.head}
    taken: set[int] = set()
    found = []
    for name, module in {**parts, "root": model}.items():
        if module is not None:
            mine = [p for p in module.parameters() if id(p) not in taken]
            taken.update(map(id, mine))
            rows = [-(-p.shape[0] // shard_ranks) * shard_ranks if p.dim() else 1 for p in mine]
            padded = sum(r * math.prod(p.shape[1:]) for r, p in zip(rows, mine, strict=True))
            found.append(Unit(name, padded, len(mine)))
    return found


def communication(config: RunConfig, ranks: int, every: Sequence[Unit]) -> dict[str, Any]:
    """Bytes of a step's collectives on one rank; checkpoints, logging and validation are left out. `every` is `units`'.

    payload   by collective, the size of the whole tensor: an all-gather's output, a reduce-scatter's input
    sent      what a ring sends for it: (S - 1) / S of the payload, twice that for all-reduces
    calls     how many collectives

    Per micro-batch every unit is gathered for the forward and again for the backward pass, but the root's, which stay.
    Gradients are summed with the last micro-batch: among the ranks that share a copy, and with parallel.shard_ranks
    then among the copies. All in fp32. `small` is what the ranks agree on before and after a step: counts, loss sums,
    one norm per parameter. Raises ValueError where the ranks cannot share the work as the config says.
    """
    accumulation = config.accumulation(ranks)
    S = shared_by(config, ranks)
    copies, M = ranks // S, len(config.layout.modalities)
    *inner, root = [4 * unit.padded for unit in every]
    whole = sum(inner) + root
    payload = {
        "all_gather": accumulation * (2 * sum(inner) + root) if S > 1 else 0,
        "reduce_scatter": whole if S > 1 else 0,
        "all_reduce": whole // S if copies > 1 else 0,
        "small": 8 * (2 * M + 8) + 8 * (M + 1) + 4 * sum(unit.tensors for unit in every) if ranks > 1 else 0,
    }
    factors = ((S - 1) / S, (S - 1) / S, 2 * (copies - 1) / copies, 2 * (ranks - 1) / ranks)
    return {
        "payload": payload,
        "sent": {name: round(payload[name] * factor) for name, factor in zip(payload, factors, strict=True)},
        "calls": {
            "all_gather": accumulation * (2 * len(inner) + 1) if S > 1 else 0,
            "reduce_scatter": len(every) if S > 1 else 0,
            "all_reduce": len(every) if copies > 1 else 0,
            "small": 3 if ranks > 1 else 0,
        },
    }


@dataclass(frozen=True)
class Assumptions:
    mfu: float
    """Of the GPU's dense bf16 peak, while it computes; what waiting for the network costs comes on top."""
    efficiency: float
    """Of the nominal bandwidths that a collective reaches."""
    latency: float
    """Seconds per doubling of a collective's ranks, between nodes; a quarter of it inside one."""
    patch_share: float
    """Of tokens that are latent patches, where there are any."""
    price: float | None
    """Of a GPU's hour."""


class Cluster:
    """`nodes` of `gpus` GPUs: seconds of collectives among its ranks. Bandwidths in bytes per second."""

    def __init__(self, gpu: Gpu, nodes: int, gpus: int, network: float, assumed: Assumptions):
        self.gpu, self.nodes, self.gpus, self.network, self.assumed = gpu, nodes, gpus, network, assumed

    def collective(self, payload: float, ranks: int, apart: bool, share: float = 1.0) -> float:
        """A ring's all-gather or reduce-scatter among `ranks`, of which some are `apart` on other nodes, where each
        ring has `share` of a node's network; an all-reduce takes both, one after the other."""
        if ranks == 1:
            return 0.0
        bandwidth = min(self.gpu.nvlink, self.network * share) if apart else self.gpu.nvlink
        latency = self.assumed.latency * math.ceil(math.log2(ranks)) * (1.0 if apart else 0.25)
        return payload * (ranks - 1) / ranks / (bandwidth * self.assumed.efficiency) + latency


def step_time(config: RunConfig, cluster: Cluster, every: Sequence[Unit]) -> dict[str, float]:
    """Seconds of a step: computing, communicating, how much of the latter is exposed (the module says how); at_peak are
    those that the model's FLOPs would take at the GPU's peak."""
    ranks = cluster.nodes * cluster.gpus
    S, accumulation = shared_by(config, ranks), config.accumulation(ranks)
    copies, assumed = ranks // S, cluster.assumed
    model, length, diffusion = config.model, config.data.sequence_length, config.objective.diffusion
    tokens = config.training.micro_batch * length
    flops = forward_flops_per_token(model, config.layout.size, length)
    head = flops.pop("head")
    if diffusion is not None:
        patch = forward_flops_per_token(model, config.layout.size, length, diffusion.patch_width)
        ends = patch["patch_in"] + patch["patch_out"]
        head = round((1 - assumed.patch_share) * head + assumed.patch_share * ends)
    speed = assumed.mfu * cluster.gpu.bf16_flops
    block = tokens * sum(flops.values()) / model.blocks / speed
    forward = {unit.name: block if unit.name.startswith("blocks.") else 0.0 for unit in every}
    forward["head"] = tokens * head / speed
    again = 1 if config.training.activation_checkpointing is True else 0  # selective computes only what is cheap again
    backward = {name: seconds * (2 + (again if name != "head" else 0)) for name, seconds in forward.items()}

    apart = cluster.gpus % S != 0
    gather = {unit.name: cluster.collective(4 * unit.padded, S, apart) for unit in every}
    # every rank of a node is in another ring, and all of them use the node's network
    between = {
        unit.name: 2 * cluster.collective(4 * unit.padded / S, copies, cluster.nodes > 1, 1 / min(S, cluster.gpus))
        for unit in every
    }
    sums = {name: gather[name] + between[name] for name in gather}
    order = [unit.name for unit in every[:-1]]
    back = order[::-1]

    def exposed_forward() -> float:
        fetched = [gather[name] for name in order]
        return fetched[0] + sum(max(0.0, g - forward[n]) for g, n in zip(fetched[1:], order, strict=False))

    def exposed_backward(last: bool) -> float:
        """While a unit's gradients are computed the next one is gathered and, in the last micro-batch, those of the one
        before are summed."""
        exposed = gather[back[0]]
        for i, name in enumerate(back):
            beside = gather[back[i + 1]] if i + 1 < len(back) else 0.0
            beside += sums[back[i - 1]] if last and i else 0.0
            exposed += max(0.0, beside - backward[name])
        return exposed + (sums[back[-1]] if last else 0.0)

    small = 3 * 2 * cluster.collective(0, ranks, cluster.nodes > 1) + accumulation * gather["root"] + sums["root"]
    exposed = accumulation * exposed_forward() + (accumulation - 1) * exposed_backward(False) + exposed_backward(True)
    return {
        "computing": accumulation * sum(forward[n] + backward[n] for n in order),
        "communicating": sum(2 * accumulation * gather[n] + sums[n] for n in order) + small,
        "exposed": exposed + small,
        "at_peak": accumulation * TRAINING_FACTOR * sum(forward.values()) * assumed.mfu,
    }


def plan(config: RunConfig, nodes: int, gpus: int, gpu: str, interconnect: str, assumed: Assumptions) -> dict[str, Any]:
    """All predictions for one cluster. Raises ValueError where the config and the ranks do not fit each other."""
    ranks = nodes * gpus
    config.accumulation(ranks)  # before anything is built: whether the batch can be dealt to them
    every = units(config, shared_by(config, ranks))
    counted = communication(config, ranks, every)
    seconds = step_time(config, Cluster(GPUS[gpu], nodes, gpus, INTERCONNECTS[interconnect], assumed), every)
    total, at_peak = seconds["computing"] + seconds["exposed"], seconds.pop("at_peak")
    tokens = config.training.batch * config.data.sequence_length
    needed = memory(config, ranks)
    bytes_per_rank = needed[needed["chosen"]]["total"]
    hours = total * config.training.steps / 3600
    return {
        "predicted": True,
        "nodes": nodes,
        "gpus_per_node": gpus,
        "gpu": gpu,
        "interconnect": interconnect if nodes > 1 else "nvlink",
        "accumulation": config.accumulation(ranks),
        "memory_bytes_per_rank": bytes_per_rank,
        "memory_fits": bytes_per_rank < 0.92 * GPUS[gpu].memory,
        "communication_bytes": counted,
        "seconds_per_step": {**seconds, "total": total},
        "mfu": at_peak / total,
        "tokens_per_s": tokens / total,
        "tokens_per_gpu_hour": tokens / total * 3600 / ranks,
        "tokens": tokens * config.training.steps,
        "hours": hours,
        "gpu_hours": hours * ranks,
        "cost": None if assumed.price is None else hours * ranks * assumed.price,
        "assumed": vars(assumed) | {"network_bytes_per_s": INTERCONNECTS[interconnect]},
    }
