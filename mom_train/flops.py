"""FLOPs of a model, counted from its config: what is needed, not what is spent.

A routed projection counts once per token, whatever the number of modalities. Padding counts nothing: callers
multiply by real tokens. The scan counts 9 operations per channel and state (the convention of Mamba's authors,
state-spaces/mamba issue 110) and 2 per channel for the skip and the gate.
"""

from __future__ import annotations

from mom_train.config import ModelConfig

# A backward pass costs twice a forward one; recomputation is not counted.
TRAINING_FACTOR = 3


def forward_flops_per_token(config: ModelConfig, vocabulary: int) -> dict[str, int]:
    """Part of the model -> floating-point operations per token in the forward pass."""
    d, D, N, R, K = config.dim, config.inner, config.state, config.rank, config.conv
    per_block = {
        "in_proj": 2 * d * 2 * D,
        "conv": 2 * K * D,
        "x_proj": 2 * D * (R + 2 * N),
        "dt_proj": 2 * R * D,
        "scan": 9 * D * N + 2 * D,
        "out_proj": 2 * D * d,
    }
    return {part: config.blocks * count for part, count in per_block.items()} | {"head": 2 * d * vocabulary}


def training_flops_per_token(config: ModelConfig, vocabulary: int) -> int:
    return TRAINING_FACTOR * sum(forward_flops_per_token(config, vocabulary).values())
