"""Predicts the memory of a training step on each rank from the config, without building a model or importing torch.

There are few moments in a step at which memory can be highest: the forward pass of the head, when the activations of
all blocks are kept and the logits are made; the backward pass of the last block, when these are still kept; that of the
first block, when nearly all gradients are there; that of the embedding, whose gradient is dense; and the update by the
optimiser. The prediction is the largest of the sums at these moments. Each sum follows from what FSDP2 and autograd
hold then, counted in bytes.

Letters are as in flops.py. In addition, n = parameters, u = parameters of a block, T = rows of a micro-batch (B x L),
S = ranks that share one copy of the model, e = bytes of an operand of a matrix product (4, or 2 in bf16), C = logits in
memory at a time.
"""

from __future__ import annotations

from typing import Any, Literal

from mom_tokenizers.errors import UserError
from mom_train.config.model import ModelConfig
from mom_train.config.run import Recompute, RunConfig
from mom_train.cost.flops import muon_matrices, muon_parameters, parameters
from mom_train.ops import chunks

_FP32 = 4
Device = Literal["cuda", "cpu"]


def block_activation_bytes(config: ModelConfig, element: int, device: Device = "cpu") -> int:
    """Bytes per token that one block keeps for its backward pass. `element` is e, the bytes of an operand.

    Mamba: 8d for the norm (the fp32 residual and its normalised form; on CUDA, where the norm is one kernel, 4d),
    e (d + 5D + R + 2N) for the input and output of in_proj, conv, x_proj, dt_proj and the output of the scan, and
    4DN / chunk for the states of the scan. With `normalise`, dt, B and C in fp32 and the root of each, 4 (R + 2N) + 12.

    Transformer: 16d for two norms (on CUDA 8d); e (9d + 4h) for q, k and v before and after RoPE, the output of
    attention in both orders, the inputs, and the four tensors of SwiGLU; and 4 bytes per head for the softmax. With
    `qk_norm`, q and k normalised in fp32 and a root per head, 8d + 8 per head, and in bf16 8d for both in fp32.
    """
    d, D, N, R = config.dim, config.inner, config.state, config.rank
    norm = 4 * d if device == "cuda" else 8 * d
    if config.architecture == "transformer":
        assert config.heads is not None
        of_qk = 2 * _FP32 * (d + config.heads) + (0 if element == _FP32 else 2 * _FP32 * d) if config.qk_norm else 0
        return 2 * norm + element * (9 * d + 4 * config.feed_forward) + _FP32 * config.heads + of_qk
    of_inputs = _FP32 * (R + 2 * N + 3) if config.normalise else 0
    return norm + element * (d + 5 * D + R + 2 * N) + _scan_states(config, device) + of_inputs


def _scan_states(config: ModelConfig, device: Device) -> int:
    """Bytes per token of the states that a scan keeps, 4DN / chunk. The scan in CUDA C++ has 16 states only."""
    cuda = device == "cuda" and config.state == 16
    return _FP32 * config.inner * config.state // (chunks.CUDA_SCAN_STEPS if cuda else chunks.SCAN_STEPS)


def selective_activation_bytes(config: ModelConfig, element: int, device: Device = "cpu") -> int:
    """The same with selective checkpointing: 4d for the fp32 residual, and results that are expensive to recompute.

    Mamba: the outputs of in_proj, x_proj and scan, e (3D + R + 2N), and the states of the scan. Transformer: the
    outputs of all products and of attention, e (6d + 2h), and those of the softmax.
    """
    d, D, N, R = config.dim, config.inner, config.state, config.rank
    if config.architecture == "transformer":
        assert config.heads is not None
        return _FP32 * d + element * (6 * d + 2 * config.feed_forward) + _FP32 * config.heads
    return _FP32 * d + element * (3 * D + R + 2 * N) + _scan_states(config, device)


def block_backward_bytes(config: ModelConfig, element: int) -> int:
    """Largest number of bytes per token that the backward pass of a block needs in addition to what was kept.

    Mamba needs most in the scan: 4d for the gradient of the residual, eD for that of the output, 12D for fp32 gradients
    of x, dt and z, those of B and C for each range of channels, and in bf16 the inputs again in fp32 (16D + 8N).
    Transformer needs most in SwiGLU: 8d for the gradients of the residual and of the branch, 2eh for gate and up.
    """
    d, D, N = config.dim, config.inner, config.state
    if config.architecture == "transformer":
        return 8 * d + 2 * element * config.feed_forward
    widened = 0 if element == _FP32 else 16 * D + 8 * N
    return 4 * d + element * D + 12 * D + 8 * N * -(-D // chunks.SCAN_CHANNELS) + widened


def _head_forward(tokens: int, dim: int, vocabulary: int, element: int, device: Device) -> int:
    """Bytes of workspace in the forward pass of the head, which also computes its gradients.

    These are the gradient of the weight, 4Vd, the part of it from one chunk, 4Vd, and the logits of the chunk, 4C. In
    bf16 there are also bf16 copies of the part, 2Vd, and of the logits, 2C; on CUDA, where the gradient is written over
    the bf16 logits, there are no fp32 logits.
    """
    weight = vocabulary * dim
    logits = min(tokens, max(1, chunks.LOGITS // vocabulary, dim)) * vocabulary
    if element == _FP32:
        return 8 * weight + 4 * logits
    return 10 * weight + (2 if device == "cuda" else 6) * logits


def _muon_workspace(config: RunConfig, S: int) -> int:
    """Bytes of workspace in Muon's update: of each of its parameters the update before and after it was sent and its
    orthogonal form, and of one matrix, with sides m <= n, three of its size and two products of m^2."""
    muon, matrices = config.optimizer.as_muon, muon_matrices(config)
    if muon is None:
        return 0
    element = 2 if muon.precision == "bf16" else _FP32
    one = max(3 * rows * columns + 2 * min(rows, columns) ** 2 for rows, columns, _ in matrices)
    return element * (3 * muon_parameters(config) // S + one)


def memory(config: RunConfig, ranks: int, device: Device = "cuda") -> dict[str, Any]:
    """Predicted bytes on each of `ranks` ranks at the moment of a step when memory is highest.

    There are predictions without, with, and with selective activation checkpointing; `chosen` names the one that the
    config chooses. Each is divided by use:

    * parameters, gradients, optimizer, ema: 4, 4, 8 and 4 bytes x n / S. The optimiser has 4 instead of 8 for what
      Muon trains. With accumulation, gradients are whole, 4n, from the first micro-batch until the backward pass of the
      last one reaches their unit. With parallel.cpu_offload all of these are counted in `host` instead, except whole
      gradients.
    * units: whole units that FSDP2 holds: weights, the buffer they were gathered in (S > 1), a prefetched unit,
      gradients being computed (all of e bytes each), and those waiting to be summed (4 bytes). The embedding takes 4
      bytes, and so does, in bf16, what a block has beside its matrices, which is then whole during both passes.
    * activations: T x the bytes kept per token: `block_activation_bytes` of every block. With checkpointing, the fp32
      input of every block or `selective_activation_bytes`, and the activations of one block. Final norm and head keep
      8d + 2ed together (in bf16 4d more). A dense attention mask (CPU) is there once.
    * workspace: `block_backward_bytes`, or what the loss of the head needs, or the norms of the update.

    With training.cuda_graph nothing is gathered. `units` are then the bf16 copies of the weights of products, which
    stay between steps. On a GPU the graphs keep the memory of their passes, so that the update comes on top of it.

    Not included are fragmentation of the allocator, buffers of NCCL, copies by routers, and the batch itself.
    Raises UserError if the ranks cannot share the work as the config says.
    """
    shard_ranks = config.parallel.shard_ranks or ranks
    if ranks % shard_ranks:
        raise UserError(f"parallel.shard_ranks={shard_ranks} does not divide the {ranks} ranks")
    return {
        **{name: _variant(config, ranks, shard_ranks, device, recompute) for recompute, name in _VARIANTS.items()},
        "activation_checkpointing": config.training.activation_checkpointing,
        "chosen": _VARIANTS[config.training.activation_checkpointing],
    }


_VARIANTS: dict[Recompute, str] = {
    False: "without_checkpointing",
    True: "with_checkpointing",
    "selective": "with_selective_checkpointing",
}


def _variant(config: RunConfig, ranks: int, S: int, device: Device, recompute: Recompute) -> dict[str, Any]:
    model, diffusion = config.model, config.objective.diffusion
    d, blocks, vocabulary, L = model.dim, model.blocks, config.layout.size, config.data.sequence_length
    counts = parameters(model, vocabulary, len(config.layout.modalities), diffusion.patch_width if diffusion else None)
    n, ends = sum(counts.values()), counts["embedding"]  # the head has as many
    inside, root = n - 2 * ends - counts.get("adapters", 0), 0  # parameters of the blocks, and of them the root's
    element = _FP32 if config.training.precision == "fp32" else 2
    weight = element  # of a product, as it is gathered
    if element == 2:
        root = inside - sum(counts.get(part, 0) for part in ("projections", "attention", "feed_forward"))
    block = (inside - root) // blocks
    muon = muon_parameters(config)
    T = config.training.micro_batch * L // config.parallel.context_ranks
    accumulates, offload = config.accumulation(ranks) > 1, config.parallel.cpu_offload
    gathered = weight * (2 if S > 1 else 1)  # bytes per weight of a whole unit, with the buffer it was gathered in
    graph = config.training.cuda_graph  # without FSDP2, on one rank
    copied = 2 * (inside - root + ends) if element == 2 else 0  # in bf16 for graphs: all projections and the head

    whole_block = block_activation_bytes(model, element, device)
    if config.parallel.context_ranks > 1:  # the states of the first scan, and the time steps that it sums
        whole_block += _FP32 * model.inner + _scan_states(model, device)
    kept = {
        False: whole_block,
        True: _FP32 * d,
        "selective": selective_activation_bytes(model, element, device),
    }[recompute]
    mask = element * L if device == "cpu" and model.architecture == "transformer" else 0
    tail = 8 * d + 2 * element * d + (4 * d if element == 2 else 0)
    every = blocks * kept + mask
    work = T * block_backward_bytes(model, element)

    def copies(part: str) -> int:
        return len(config.layout.modalities) * model.experts if part in model.decoupled else 1

    def at(done: int, units: int, per_token: int, workspace: int) -> dict[str, int]:
        """Bytes by use at a moment when the gradients of `done` parameters have been summed over the ranks."""
        whole = _FP32 * (n - done) if accumulates else 0
        states = {
            "parameters": _FP32 * n // S,
            "gradients": _FP32 * done // S,
            "optimizer": (2 * _FP32 * n - _FP32 * muon) // S,
            "ema": 0 if config.training.ema_decay is None else _FP32 * n // S,
        }
        if offload:
            states = dict.fromkeys(states, 0)
        states["gradients"] += whole
        rest = {"units": copied if graph else units, "activations": per_token * T, "workspace": workspace}
        return states | rest

    # activations of the block that the backward pass is at, and its input if they are recomputed from it
    recomputed, recomputed_input = {
        False: (0, 0),
        True: (whole_block, _FP32 * d),
        "selective": (whole_block - kept + _FP32 * d, _FP32 * d),
    }[recompute]
    # weights and gradients of a block and of the root; units being summed or prefetched are added below
    unit = 2 * weight * block + 2 * _FP32 * root
    ahead = weight * block if S > 1 else 0
    if model.architecture == "transformer":
        largest = max(3 * d * d * copies("attention"), 2 * d * model.feed_forward * copies("feed_forward"))
    else:
        largest = 2 * d * model.inner * copies("in_proj")
    update = 0 if offload else max(16 * max(ends, largest) // S, _muon_workspace(config, S))
    moments = {
        "head_forward": at(
            0, gathered * ends + _FP32 * root, every + tail, _head_forward(T, d, vocabulary, element, device)
        ),
        "last_block_backward": at(ends, unit + _FP32 * ends + ahead, every + recomputed, work),
        "first_block_backward": at(
            n - ends - block,
            unit + _FP32 * block + (max(_FP32 * ends, ahead) if S > 1 else 0),
            whole_block + recomputed_input + mask,
            work,
        ),
        "embedding_backward": at(n if graph else n - ends, 2 * _FP32 * (ends + root) + _FP32 * block, 8 * d, 0),
        "update": at(n, 0, 0, update),
    }
    if graph and device == "cuda":
        passes = max(moments.values(), key=lambda parts: sum(parts.values()))
        moments["update"] = passes | {"workspace": passes["workspace"] + update}
    sums = {moment: sum(parts.values()) for moment, parts in moments.items()}
    peak = max(sums, key=lambda moment: sums[moment])
    states_bytes = (16 if config.training.ema_decay is None else 20) * n // S  # Muon cannot be offloaded
    return {
        "total": sums[peak],
        "peak_at": peak,
        "by_use": moments[peak],
        "moments": sums,
        "host": states_bytes if offload else 0,
        "activations_per_token": every + tail + recomputed,
    }
