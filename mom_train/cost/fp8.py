"""Predicts what FP8 products save of the time of a step. It is calculated and not measured.

An FP8 product takes half the time of the same product in bf16, which reaches GEMM_EFFICIENCY of the peak. Before it,
its two operands are rounded: 2 bytes are read and 1 is written for each element, at COPY_EFFICIENCY of the memory's
speed.
Which products are in FP8 is as in `LanguageModel.use_fp8`: the output of every projection but x_proj and dt_proj, the
gradient of its input, and the logits if the number of ids is a multiple of 16.
"""

from __future__ import annotations

from dataclasses import dataclass

from mom_train.config.run import RunConfig

GEMM_EFFICIENCY = 0.77
"""Share of the bf16 peak that a large product reached on an H100: 750 to 786 of 989 TFLOP/s."""
COPY_EFFICIENCY = 0.9
"""Share of the memory's nominal speed that a copy reached there: 3.0 of 3.35 TB/s."""
_ROUNDING = 3  # bytes read and written for each element that is rounded


@dataclass(frozen=True)
class Saved:
    """Seconds that FP8 saves in one micro-batch: in the forward and backward pass of a block, and in the head. They are
    negative where rounding takes longer than is gained."""

    block_forward: float
    block_backward: float
    head_forward: float


def saved_by_fp8(config: RunConfig, bf16_flops: float, memory_speed: float) -> Saved:
    """What `training.precision: fp8` saves. `bf16_flops` is the peak of the GPU in FLOPs per second, and `memory_speed`
    the nominal speed of its memory in bytes per second. Recomputed blocks repeat their forward pass in the backward
    pass, and its products in FP8 too."""
    model, layout = config.model, config.layout
    tokens = config.training.micro_batch * config.data.sequence_length

    def seconds(inputs: int, outputs: int, matrices: int, rounded_rows: int) -> float:
        """Saved by one product, whose rows have `rounded_rows` elements each."""
        product = 2 * tokens * inputs * outputs / (GEMM_EFFICIENCY * bf16_flops)
        rounded = tokens * rounded_rows + matrices * inputs * outputs
        return product / 2 - _ROUNDING * rounded / (COPY_EFFICIENCY * memory_speed)

    forward = backward = 0.0
    for name, (inputs, stacked) in model.matrices.items():
        if name not in ("x_proj", "dt_proj"):
            copies = model.copies(name, len(layout.modalities))
            forward += seconds(inputs, sum(stacked), copies, inputs)
            backward += seconds(inputs, sum(stacked), copies, sum(stacked))
    if config.training.activation_checkpointing is True:
        backward += forward
    head = seconds(model.dim, layout.size, 1, model.dim) if layout.size % 16 == 0 else 0.0
    return Saved(forward, backward, head)
