"""Memory of a training step on each rank, predicted from the config: nothing is built and torch is not imported.

A step's memory has few moments where it can be highest: the head's forward pass, when every block's activations are
kept and the logits are made; the backward pass of the last block, when they are still kept, and of the first, when
nearly all gradients are there; the embedding's, whose gradient is dense; and the optimiser's update. The peak is the
largest of their sums. Each follows from what FSDP2 and autograd hold there, counted in bytes.

Letters as in flops.py, and n = parameters, u = those of a block, T = rows of a micro-batch (B x L), S = ranks that
share one copy of the model, e = bytes of a matmul's operands (4, or 2 in bf16), C = logits alive at a time.
"""

from __future__ import annotations

from typing import Any, Literal

from mom_tokenizers.errors import UserError
from mom_train.config.model import ModelConfig
from mom_train.config.run import Recompute, RunConfig
from mom_train.cost.flops import parameters

_FP32 = 4
_SCAN_CHUNK = 32  # the scan keeps one state per so many positions (the C backend's; longer chunks keep less)
_SCAN_CHANNELS = 256  # gradients of B and C are summed over channels in ranges of so many
_CHUNK_LOGITS = 1 << 24  # at least, as mom_train/model/cross_entropy.py
Device = Literal["cuda", "cpu"]


def block_activation_bytes(config: ModelConfig, element: int) -> int:
    """Bytes per token that one block keeps for its backward pass; `element` is the bytes of a matmul's operands.

    Mamba: 8d for the norm (the fp32 residual and its normalised form; a fused CUDA norm keeps the first alone),
    e (d + 5D + R + 2N) for in_proj's input and output, conv, x_proj, dt_proj and the scan's output, and 4DN / chunk for
    the scan's states. Transformer: 16d for two norms, e (9d + 4h) for q, k and v before and after RoPE, attention's
    output in both orders, the inputs, and SwiGLU's four; 4 bytes a head for the softmax.
    """
    d, D, N, R = config.dim, config.inner, config.state, config.rank
    if config.architecture == "transformer":
        assert config.heads is not None
        return 16 * d + element * (9 * d + 4 * config.feed_forward) + _FP32 * config.heads
    return 8 * d + element * (d + 5 * D + R + 2 * N) + _FP32 * D * N // _SCAN_CHUNK


def selective_activation_bytes(config: ModelConfig, element: int) -> int:
    """The same with selective checkpointing: 4d for the fp32 residual, and what is dear to compute again.

    Mamba: outputs of in_proj, x_proj and scan, e (3D + R + 2N), and the scan's states. Transformer: outputs of all
    products and of attention, e (6d + 2h), and the softmax's.
    """
    d, D, N, R = config.dim, config.inner, config.state, config.rank
    if config.architecture == "transformer":
        assert config.heads is not None
        return _FP32 * d + element * (6 * d + 2 * config.feed_forward) + _FP32 * config.heads
    return _FP32 * d + element * (3 * D + R + 2 * N) + _FP32 * D * N // _SCAN_CHUNK


def block_backward_bytes(config: ModelConfig, element: int) -> int:
    """Bytes per token that one block's backward pass needs at most beside what was kept.

    Mamba, in the scan: 4d for the residual's gradient, eD for the output's, 12D fp32 gradients of x, dt and z, those of
    B and C for each range of channels; in bf16 the inputs again in fp32 (16D). Transformer, in SwiGLU: 8d for the
    residual's gradient and the branch's, 2eh for gate and up.
    """
    d, D, N = config.dim, config.inner, config.state
    if config.architecture == "transformer":
        return 8 * d + 2 * element * config.feed_forward
    widened = 0 if element == _FP32 else 16 * D + 8 * N
    return 4 * d + element * D + 12 * D + 8 * N * -(-D // _SCAN_CHANNELS) + widened


def _head_forward(tokens: int, dim: int, vocabulary: int, element: int) -> int:
    """Workspace of the head's forward pass, which makes its gradients too: the weight's gradient 4Vd and one chunk's
    part of it, 4Vd, beside the chunk's logits, 4C. In bf16 also the weight's copy 2Vd, the part's 2Vd, and the
    logits' 2C."""
    weight = vocabulary * dim
    logits = min(tokens, max(1, _CHUNK_LOGITS // vocabulary, dim)) * vocabulary
    return 8 * weight + 4 * logits if element == _FP32 else 12 * weight + 6 * logits


def memory(config: RunConfig, ranks: int, device: Device = "cuda") -> dict[str, Any]:
    """Predicted bytes on each of `ranks` ranks at the highest moment of a step, without, with, and with selective
    activation checkpointing; `chosen` is the config's.

    parameters, gradients, optimizer, ema   4, 4, 8 and 4 bytes x n / S; with accumulation gradients are whole, 4n, from
                    the first micro-batch until the last one's backward pass reaches their unit. With
                    parallel.cpu_offload they are `host` instead, but for whole gradients
    units           what FSDP2 has of whole units: fp32 weights, the buffer they were gathered in (S > 1), a prefetched
                    unit, gradients being made, and those on their way to be summed
    weight_casts    bf16 copies of the linear maps, which autograd keeps from forward to backward, unsharded; with
                    checkpointing those of one block (selective: and Mamba's out_proj of every block)
    activations     T x what is kept for each: `block_activation_bytes` of every block; with checkpointing every block's
                    fp32 input, or `selective_activation_bytes`, and one block's. Final norm and head keep 8d + 2ed (in
                    bf16 4d more) in all; a dense attention mask (CPU) is there once
    workspace       `block_backward_bytes`, or what the head's loss needs, or the update's norms

    Not included: the allocator's fragmentation, NCCL's buffers, routers' copies, the batch itself.
    Raises ValueError where the ranks cannot share the work as the config says.
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
    n, ends = sum(counts.values()), counts["embedding"]  # as many in the head
    block = (n - 2 * ends - counts.get("adapters", 0)) // blocks
    element = 2 if config.training.precision == "bf16" else _FP32
    linear = sum(counts.get(part, 0) for part in ("projections", "attention", "feed_forward"))
    casts = 2 * linear if element == 2 else 0
    T = config.training.micro_batch * L // config.parallel.context_ranks
    accumulates, offload = config.accumulation(ranks) > 1, config.parallel.cpu_offload
    gathered = _FP32 * (2 if S > 1 else 1)  # a whole unit's bytes per weight, with the buffer it came in

    whole_block = block_activation_bytes(model, element)
    if config.parallel.context_ranks > 1:  # the first scan's states, and the time steps that it sums
        whole_block += _FP32 * model.inner + _FP32 * model.inner * model.state // _SCAN_CHUNK
    kept = {
        False: whole_block,
        True: _FP32 * d,
        "selective": selective_activation_bytes(model, element),
    }[recompute]
    mask = element * L if device == "cpu" and model.architecture == "transformer" else 0
    tail = 8 * d + 2 * element * d + (4 * d if element == 2 else 0)
    every = blocks * kept + mask
    work = T * block_backward_bytes(model, element)

    def copies(part: str) -> int:
        return len(config.layout.modalities) * model.experts if part in model.decoupled else 1

    def at(done: int, units: int, weight_casts: int, per_token: int, workspace: int) -> dict[str, int]:
        """Of a moment when the gradients of `done` parameters have been summed over the ranks."""
        whole = _FP32 * (n - done) if accumulates else 0
        states = {
            "parameters": _FP32 * n // S,
            "gradients": _FP32 * done // S,
            "optimizer": 2 * _FP32 * n // S,
            "ema": 0 if config.training.ema_decay is None else _FP32 * n // S,
        }
        if offload:
            states = dict.fromkeys(states, 0)
        states["gradients"] += whole
        rest = {"units": units, "weight_casts": weight_casts, "activations": per_token * T, "workspace": workspace}
        return states | rest

    one, all_of_them = casts // blocks, casts
    if recompute:
        outside = model.architecture == "mamba" and recompute == "selective"
        all_of_them = 2 * blocks * copies("out_proj") * model.inner * d if outside and casts else 0
    # of the block that the backward pass is at: all of it, beside its input where it is computed again
    recomputed, recomputed_input = {
        False: (0, 0),
        True: (whole_block, _FP32 * d),
        "selective": (whole_block - kept + _FP32 * d, _FP32 * d),
    }[recompute]
    unit = 2 * _FP32 * block  # its weights and its gradients; then come the one on its way and the one fetched ahead
    ahead = _FP32 if S > 1 else 0
    if model.architecture == "transformer":
        largest = max(3 * d * d * copies("attention"), 2 * d * model.feed_forward * copies("feed_forward"))
    else:
        largest = 2 * d * model.inner * copies("in_proj")
    moments = {
        "head_forward": at(0, gathered * ends, all_of_them, every + tail, _head_forward(T, d, vocabulary, element)),
        "last_block_backward": at(
            ends, unit + _FP32 * ends + ahead * block, max(one, all_of_them), every + recomputed, work
        ),
        "first_block_backward": at(
            n - ends - block,
            unit + _FP32 * block + ahead * max(ends, block),
            one,
            whole_block + recomputed_input + mask,
            work,
        ),
        "embedding_backward": at(n - ends, 2 * _FP32 * ends + _FP32 * block, 0, 8 * d, 0),
        "update": at(n, 0, 0, 0, 0 if offload else 16 * max(ends, largest) // S),
    }
    sums = {moment: sum(parts.values()) for moment, parts in moments.items()}
    peak = max(sums, key=lambda moment: sums[moment])
    states_bytes = (16 if config.training.ema_decay is None else 20) * n // S
    return {
        "total": sums[peak],
        "peak_at": peak,
        "by_use": moments[peak],
        "moments": sums,
        "host": states_bytes if offload else 0,
        "activations_per_token": every + tail + recomputed,
    }
