"""Predicts the time of a training step on a cluster from the config: computation and communication between ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mom_tokenizers.errors import UserError
from mom_train.config.run import RunConfig
from mom_train.cost.flops import (
    TRAINING_FACTOR,
    forward_flops_per_token,
    muon_matrices,
    muon_parameters,
    newton_schulz_flops,
    optimizer_flops,
)
from mom_train.cost.fp8 import saved_by_fp8
from mom_train.cost.memory import memory
from mom_train.cost.peaks import BF16_PEAK


@dataclass(frozen=True)
class Gpu:
    """Peak figures of one GPU."""

    bf16_flops: float
    """Dense bf16 FLOPs per second (NVIDIA's data sheets)."""
    memory: float
    """Bytes of memory."""
    nvlink: float
    """Bytes per second and direction to the other GPUs of a node."""
    memory_speed: float
    """Bytes per second of the memory, read and written together."""


GPUS = {
    "a100": Gpu(BF16_PEAK["A100"], 80e9, 300e9, 2.04e12),
    "h100": Gpu(BF16_PEAK["H100 SXM"], 80e9, 450e9, 3.35e12),
    "h200": Gpu(BF16_PEAK["H200"], 141e9, 450e9, 4.8e12),
    "b200": Gpu(BF16_PEAK["B200"], 180e9, 900e9, 8e12),
}


# Nominal bytes per second and direction between one node and the others, over all its adapters together.
INTERCONNECTS = {
    "infiniband-ndr": 8 * 400e9 / 8,  # eight adapters of 400 Gb/s, one for each GPU
    "infiniband-hdr": 8 * 200e9 / 8,
    "ethernet-400g": 400e9 / 8,
    "ethernet-100g": 100e9 / 8,
}


@dataclass(frozen=True)
class Unit:
    """A part of the model that FSDP2 gathers and sums at a time."""

    name: str
    padded: int
    """Number of parameters, each padded in its first dimension to a multiple of the ranks that share it."""
    tensors: int
    """Number of parameter tensors."""
    element: int = 4
    """Bytes of a parameter as it is gathered. Gradients are always summed in fp32."""


def shared_by(config: RunConfig, ranks: int) -> int:
    """S, the number of ranks that share one copy of the model. Raises UserError if the ranks cannot be divided so."""
    S = config.parallel.shard_ranks or ranks
    if ranks % S:
        raise UserError(f"parallel.shard_ranks={S} does not divide the {ranks} ranks")
    if config.parallel.context_ranks > 1:
        raise UserError("parallel.context_ranks: communication between slices of a row is not predicted here")
    return S


def units(config: RunConfig, shard_ranks: int) -> list[Unit]:
    """The units that `shard` makes, in the order of the forward pass. The last one has the remaining parameters."""
    import torch

    from mom_train.model.language_model import build_model
    from mom_train.model.sharding import gathered_in_bf16

    model = build_model(config)
    parts: dict[str, torch.nn.Module | None]
    parts = {"embedding": model.embedding, "patch_embedding": model.patch_embedding}
    parts |= {f"blocks.{i}": block for i, block in enumerate(model.blocks)}
    parts |= {"patch_head": model.patch_head, "head": model.head}
    half = gathered_in_bf16(model) if config.training.precision != "fp32" else set()
    taken: set[int] = set()
    found = []
    for name, module in {**parts, "root": model}.items():
        if module is not None:
            in_bf16 = bool(half) and name not in ("embedding", "root")
            mine = [p for p in module.parameters() if id(p) not in taken and (p in half or not in_bf16)]
            taken.update(map(id, mine))
            rows = [-(-p.shape[0] // shard_ranks) * shard_ranks if p.dim() else 1 for p in mine]
            padded = sum(r * math.prod(p.shape[1:]) for r, p in zip(rows, mine, strict=True))
            found.append(Unit(name, padded, len(mine), 2 if in_bf16 else 4))
    return found


def muon_bytes(config: RunConfig) -> int:
    """Bytes of the matrices that Muon trains, in the precision in which ranks send them. 0 with AdamW."""
    muon = config.optimizer.as_muon
    return 0 if muon is None else muon_parameters(config) * (2 if muon.precision == "bf16" else 4)


def muon_seconds(config: RunConfig, shard_ranks: int, speed: float) -> float:
    """Seconds in which the owner with most work orthogonalises its matrices, at `speed` FLOPs a second: its share of
    all of them, or the largest of them if there are more ranks than matrices."""
    muon = config.optimizer.as_muon
    if muon is None:
        return 0.0
    largest = max(newton_schulz_flops(rows, columns, muon.iterations) for rows, columns, _ in muon_matrices(config))
    return max(largest, optimizer_flops(config) / shard_ranks) / speed


def communication(config: RunConfig, ranks: int, every: Sequence[Unit]) -> dict[str, Any]:
    """Bytes that one rank exchanges in a step, by kind of collective operation. `every` are the units of the model.

    payload   size of the whole tensor: the output of an all-gather, the input of a reduce-scatter
    sent      what a ring sends for it: (S - 1) / S of the payload, and twice that for an all-reduce
    calls     number of collective operations

    In each micro-batch, every unit is gathered for the forward pass and again for the backward pass, except the root,
    which stays gathered. Gradients are summed in the last micro-batch: among the ranks that share a copy and then, with
    parallel.shard_ranks, among the copies. Sums are in fp32, and so is what is gathered, except the operands of matrix
    products with training.precision=bf16. `small` is what the ranks agree on before and after a step: counts, loss
    sums, one norm per parameter. `all_to_all` brings the matrices of Muon to their owners and back; its payload is the
    share of one rank. Which matrices have a gradient is in `small`. Checkpoints, logging and validation are left out.

    Raises UserError if the ranks cannot share the work as the config says.
    """
    accumulation = config.accumulation(ranks)
    S = shared_by(config, ranks)
    copies, M = ranks // S, len(config.layout.modalities)
    *inner, root = [unit.element * unit.padded for unit in every]
    whole = 4 * sum(unit.padded for unit in every)
    sums = M + 1 + (config.objective.z_loss > 0)
    flags = 4 * sum(count for _, _, count in muon_matrices(config)) if S > 1 else 0
    payload = {
        "all_gather": accumulation * (2 * sum(inner) + root) if S > 1 else 0,
        "reduce_scatter": whole if S > 1 else 0,
        "all_reduce": whole // S if copies > 1 else 0,
        "all_to_all": 2 * muon_bytes(config) // S if S > 1 else 0,
        "small": 8 * (2 * M + 10) + 8 * sums + 4 * sum(unit.tensors for unit in every) + flags if ranks > 1 else 0,
    }
    factors = ((S - 1) / S, (S - 1) / S, 2 * (copies - 1) / copies, (S - 1) / S, 2 * (ranks - 1) / ranks)
    return {
        "payload": payload,
        "sent": {name: round(payload[name] * factor) for name, factor in zip(payload, factors, strict=True)},
        "calls": {
            "all_gather": accumulation * (2 * len(inner) + 1) if S > 1 else 0,
            "reduce_scatter": len(every) if S > 1 else 0,
            "all_reduce": len(every) if copies > 1 else 0,
            "all_to_all": 2 if payload["all_to_all"] else 0,
            "small": (4 if flags else 3) if ranks > 1 else 0,
        },
    }


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of a prediction that do not follow from the config or from data sheets."""

    mfu: float
    """Share of the GPU's dense bf16 peak that is reached while it computes, without waiting for the network."""
    efficiency: float
    """Share of the nominal bandwidths that collective operations reach."""
    latency: float
    """Seconds per doubling of the ranks of a collective operation between nodes; inside a node, a quarter of it."""
    patch_share: float
    """Share of tokens that are latent patches, if the model has any."""
    price: float | None
    """Price of one hour of one GPU, or None."""


class Cluster:
    """A cluster of `nodes` nodes with `gpus` GPUs each. `network` is in bytes per second and node."""

    def __init__(self, gpu: Gpu, nodes: int, gpus: int, network: float, assumed: Assumptions):
        self.gpu, self.nodes, self.gpus, self.network, self.assumed = gpu, nodes, gpus, network, assumed

    def collective(self, payload: float, ranks: int, apart: bool, share: float = 1.0) -> float:
        """Seconds of an all-gather or a reduce-scatter of `payload` bytes in a ring of `ranks` ranks.

        An all-reduce takes both, one after the other. `apart` says whether some of the ranks are on different nodes;
        the ring then has `share` of the network of a node.
        """
        if ranks == 1:
            return 0.0
        bandwidth = min(self.gpu.nvlink, self.network * share) if apart else self.gpu.nvlink
        latency = self.assumed.latency * math.ceil(math.log2(ranks)) * (1.0 if apart else 0.25)
        return payload * (ranks - 1) / ranks / (bandwidth * self.assumed.efficiency) + latency


def step_time(config: RunConfig, cluster: Cluster, every: Sequence[Unit]) -> dict[str, float]:
    """Predicted seconds of a step.

    They are `computing`, `communicating`, `exposed` (communication during which the GPU cannot compute) and `at_peak`
    (the time for the FLOPs of the model at the bf16 peak of the GPU). `fp8_gain` is how many times as fast the passes
    are as in bf16 (`mom_train.cost.fp8`), 1 without `training.precision: fp8`.
    """
    ranks = cluster.nodes * cluster.gpus
    S, accumulation = shared_by(config, ranks), config.accumulation(ranks)
    copies, assumed = ranks // S, cluster.assumed
    model, length, diffusion = config.model, config.data.sequence_length, config.objective.diffusion
    tokens = config.training.micro_batch * length
    flops = forward_flops_per_token(model, config.layout.size, length)
    head, patches = flops.pop("head"), 0.0
    if diffusion is not None:
        patch = forward_flops_per_token(model, config.layout.size, length, diffusion.patch_width)
        ends = patch["patch_in"] + patch["patch_out"]
        patches = assumed.patch_share
        head = round((1 - assumed.patch_share) * head + assumed.patch_share * ends)
    speed = assumed.mfu * cluster.gpu.bf16_flops
    block = tokens * sum(flops.values()) / model.blocks / speed
    forward = {unit.name: block if unit.name.startswith("blocks.") else 0.0 for unit in every}
    forward["head"] = tokens * head / speed
    again = 1 if config.training.activation_checkpointing is True else 0  # selective recomputes only what is cheap
    backward = {name: seconds * (2 + (again if name != "head" else 0)) for name, seconds in forward.items()}
    at_peak = accumulation * TRAINING_FACTOR * sum(forward.values()) * assumed.mfu
    in_bf16 = sum(forward.values()) + sum(backward.values())
    if config.training.precision == "fp8":
        saved = saved_by_fp8(config, cluster.gpu.bf16_flops, cluster.gpu.memory_speed)
        for name in forward:
            if name.startswith("blocks."):
                forward[name] = max(0.0, forward[name] - saved.block_forward)
                backward[name] = max(0.0, backward[name] - saved.block_backward)
        forward["head"] = max(0.0, forward["head"] - (1 - patches) * saved.head_forward)

    apart = cluster.gpus % S != 0
    gather = {unit.name: cluster.collective(unit.element * unit.padded, S, apart) for unit in every}
    summed = {unit.name: cluster.collective(4 * unit.padded, S, apart) for unit in every}
    # Each rank of a node is in a different ring, and all of them share the network of the node.
    between = {
        unit.name: 2 * cluster.collective(4 * unit.padded / S, copies, cluster.nodes > 1, 1 / min(S, cluster.gpus))
        for unit in every
    }
    sums = {name: summed[name] + between[name] for name in summed}
    order = [unit.name for unit in every[:-1]]
    back = order[::-1]

    def exposed_forward() -> float:
        """Seconds of waiting in a forward pass. While a unit computes, the next one is gathered."""
        fetched = [gather[name] for name in order]
        return fetched[0] + sum(max(0.0, g - forward[n]) for g, n in zip(fetched[1:], order, strict=False))

    def exposed_backward(last: bool) -> float:
        """Seconds of waiting in a backward pass. While the gradients of a unit are computed, the next unit is gathered,
        and in the last micro-batch the gradients of the unit before are summed."""
        exposed = gather[back[0]]
        for i, name in enumerate(back):
            beside = gather[back[i + 1]] if i + 1 < len(back) else 0.0
            beside += sums[back[i - 1]] if last and i else 0.0
            exposed += max(0.0, beside - backward[name])
        return exposed + (sums[back[-1]] if last else 0.0)

    small = 3 * 2 * cluster.collective(0, ranks, cluster.nodes > 1) + accumulation * gather["root"] + sums["root"]
    if config.optimizer.as_muon is not None:  # to the owners and back, after all gradients are there
        small += 2 * cluster.collective(muon_bytes(config) / S, S, apart)
    exposed = accumulation * exposed_forward() + (accumulation - 1) * exposed_backward(False) + exposed_backward(True)
    return {
        "computing": accumulation * sum(forward[n] + backward[n] for n in order) + muon_seconds(config, S, speed),
        "communicating": sum(2 * accumulation * gather[n] + sums[n] for n in order) + small,
        "exposed": exposed + small,
        "at_peak": at_peak,
        "fp8_gain": in_bf16 / (sum(forward.values()) + sum(backward.values())),
    }


def _seconds_per_step(config: RunConfig, batch: int, cluster: Cluster, every: Sequence[Unit]) -> float:
    """Predicted seconds of a step of this batch."""
    training = config.training.model_copy(update={"batch": batch, "batch_ramp": ()})
    seconds = step_time(config.model_copy(update={"training": training}), cluster, every)
    return seconds["computing"] + seconds["exposed"]


def plan(config: RunConfig, nodes: int, gpus: int, gpu: str, interconnect: str, assumed: Assumptions) -> dict[str, Any]:
    """All predictions for one cluster. Raises UserError if the config does not fit the number of ranks."""
    ranks = nodes * gpus
    config.accumulation(ranks)  # called early, to raise if the ranks cannot share the batch
    if config.training.precision == "fp8" and gpu == "a100":
        raise UserError(
            "training.precision: fp8 needs a GPU with FP8, and the A100 has none; set bf16, or plan for h100"
        )
    every = units(config, shared_by(config, ranks))
    counted = communication(config, ranks, every)
    cluster = Cluster(GPUS[gpu], nodes, gpus, INTERCONNECTS[interconnect], assumed)
    seconds = step_time(config, cluster, every)
    total, at_peak = seconds["computing"] + seconds["exposed"], seconds.pop("at_peak")
    fp8_gain = seconds.pop("fp8_gain")
    tokens = config.training.batch * config.data.sequence_length
    training = config.training
    trained = training.sequences_before(training.steps) * config.data.sequence_length
    needed = memory(config, ranks)
    bytes_per_rank = needed[needed["chosen"]]["total"]
    hours = sum(steps * _seconds_per_step(config, batch, cluster, every) for steps, batch in training.parts) / 3600
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
        "fp8_gain": fp8_gain,
        "tokens_per_s": tokens / total,
        "tokens_per_gpu_hour": tokens / total * 3600 / ranks,
        "tokens": trained,
        "hours": hours,
        "gpu_hours": hours * ranks,
        "cost": None if assumed.price is None else hours * ranks * assumed.price,
        "assumed": vars(assumed) | {"network_bytes_per_s": INTERCONNECTS[interconnect]},
    }
