"""Measures the speed of a large matrix product, which no training step can exceed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def wall_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes by the wall clock, on a GPU until it has computed everything."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def gemm_flops_per_second(
    device: torch.device,
    dtype: torch.dtype,
    seconds: Callable[[Callable[[], Any]], float],
    repetitions: int = 3,
    n: int | None = None,
) -> float:
    """FLOPs per second of the product of two (n, n) matrices, at the best of `repetitions` after one to warm up.

    n is 8192 on a GPU and 1024 on a CPU unless it is given. `seconds` times the product: by the clock that measured
    what the speed is to be compared with. The matrices are random, since a GPU multiplies zeros faster, but drawn
    without touching the state of torch's random numbers.
    """
    n = n or (1024 if device.type == "cpu" else 8192)
    drawn = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, n, n, device=device, generator=drawn).to(dtype)
    seconds(lambda: a @ b)
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(repetitions))
