"""The section `observe` of the config: instruments that look at a run while it trains."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator

from mom_tokenizers.errors import UserError
from mom_train.config.section import Section


class ObserveConfig(Section):
    """Instruments that look at a run while it trains. No key here changes the result."""

    gemm: bool = True
    """Whether to measure the speed of a large matrix product when the run starts, which takes a fraction of a second.
    The logged figure perf/gemm_share is the speed of training as a share of it."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """The first and the last step that are recorded with PyTorch's profiler, for example [10, 12]. The traces are
    written to RUN/profile and open in ui.perfetto.dev. null records nothing, unless a file RUN/profile.request asks."""
    profile_ranks: Literal["first", "all"] = "first"
    """Which ranks are profiled: the first one only, or all of them."""
    profile_request_steps: PositiveInt = 3
    """Number of steps that are recorded when a file RUN/profile.request appears."""
    memory_history: PositiveInt | None = None
    """Number of allocations and releases of GPU memory, with their stacks, that are kept for the snapshot of the memory
    which is written to RUN/memory when memory does not suffice, or when a file RUN/memory.request appears. Such as
    100000; each takes several kB of host memory. null keeps none, so that snapshots show only what is allocated."""
    gc_every: PositiveInt | None = None
    """Number of steps between garbage collections of Python, so that all ranks pause at the same step instead of one
    after another. null leaves the collections to Python."""

    statistics_every: PositiveInt | None = None
    """Number of steps between statistics: root mean square and largest magnitude of the residual stream behind each
    block, by modality, and the size of the update over that of the weights. It must be a multiple of `log_every`.
    null takes none."""

    @model_validator(mode="after")
    def _in_order(self) -> ObserveConfig:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise UserError("observe.profile_steps: the first step comes after the last one")
        return self
