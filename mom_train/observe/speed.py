"""What a run reaches of what its machine could: FLOPs against the card and a matrix product, memory against its
prediction."""

from __future__ import annotations

import logging
from functools import partial

import torch

from mom_train.config.run import RunConfig
from mom_train.cost.gemm import gemm_flops_per_second, wall_seconds
from mom_train.cost.memory import memory
from mom_train.cost.peaks import bf16_peak
from mom_train.distributed.ranks import Ranks

log = logging.getLogger(__name__)
_CPU_SIZE = 512  # of the matrices at the start of a run on a CPU, where 1024 would take a noticeable part of a second


class Speed:
    """The figures perf/mfu, perf/gemm_share, perf/memory_peak_gib and perf/memory_predicted_gib of a run."""

    def __init__(self, config: RunConfig, ranks: Ranks):
        """Multiplies matrices for a moment, on all ranks at the same time, because ranks on CPUs share their machine.
        Call `restart` before the first figures."""
        self._ranks, self._flops = ranks, 0
        self._cuda = ranks.device.type == "cuda"
        self.gemm: float | None = None
        """Measured FLOPs per second of a matrix product on this rank, or None."""
        if config.observe.gemm:
            dtype = torch.bfloat16 if config.training.precision != "fp32" else torch.float32
            timed = partial(wall_seconds, device=ranks.device)
            self.gemm = gemm_flops_per_second(ranks.device, dtype, timed, n=None if self._cuda else _CPU_SIZE)
        self.peak = bf16_peak(torch.cuda.get_device_name(ranks.device)) if self._cuda else None
        """Dense bf16 FLOPs per second by the data sheet, or None."""
        needed = memory(config, ranks.world_size, "cuda" if self._cuda else "cpu")
        self._predicted = needed[needed["chosen"]]["total"] / 2**30
        self._said = False
        if self._cuda:  # what the matrices took is not the run's
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(ranks.device)
        if ranks.main:
            peak = "null: unknown card" if self.peak is None else f"{self.peak / 1e12:.0f} TFLOP/s"
            gemm = "not measured" if self.gemm is None else f"{self.gemm / 1e12:.3g} TFLOP/s measured"
            log.info("matrix products: %s (dense bf16 peak of the card), %s", peak, gemm)

    def restart(self, flops: int) -> None:
        """Training begins, or goes on from a checkpoint, at `flops` training FLOPs."""
        self._flops = flops

    def figures(self, flops: int, seconds: float) -> dict[str, float]:
        """The figures at `flops` training FLOPs, `seconds` of training after the last call.

        perf/mfu is the share of the card's dense bf16 peak, whatever the precision of the run; it is left out where the
        peak is unknown. perf/gemm_share is the share of the matrix product's speed in the precision of the run. FLOPs
        are those of the model (mom_train/cost/flops.py), without what activation checkpointing computes again.
        """
        rate = (flops - self._flops) / max(seconds, 1e-9) / self._ranks.world_size
        self._flops = flops
        values = {}
        if self.peak is not None:
            values["perf/mfu"] = rate / self.peak
        if self.gemm is not None:
            values["perf/gemm_share"] = rate / self.gemm
        used = torch.cuda.max_memory_allocated(self._ranks.device) / 2**30 if self._cuda else None
        if used is not None:
            values |= {"perf/memory_peak_gib": used, "perf/memory_predicted_gib": self._predicted}
        if self._ranks.main and not self._said:
            said = "null (only CUDA tells)" if used is None else f"{used:.2f} GiB"
            log.info("memory of a rank at its peak: %s, predicted: %.2f GiB", said, self._predicted)
            self._said = True
        return values
