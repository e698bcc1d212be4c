"""Snapshots of the GPU's memory, when it does not suffice and on request, for pytorch.org/memory_viz."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch

from mom_train.distributed.ranks import Ranks
from mom_train.observe.metrics import FailedWrites

log = logging.getLogger(__name__)


class MemorySnapshots:
    """A context manager that writes a snapshot when it is left by an out-of-memory error. CUDA only."""

    def __init__(self, run_dir: Path, ranks: Ranks, history: int | None, memory: ModuleType | Any | None = None):
        """`history` is the number of allocations and releases that are remembered, with their stacks; None remembers
        none. `memory` stands in for torch.cuda.memory."""
        self._folder, self._ranks, self._history = run_dir / "memory", ranks, history
        self._memory = torch.cuda.memory if memory is None and ranks.device.type == "cuda" else memory
        self._failed = FailedWrites()

    def __enter__(self) -> MemorySnapshots:
        if self._history is not None:
            if self._memory is None:
                log.warning("observe.memory_history: there is no history of memory without CUDA, so none is kept")
            else:
                self._memory._record_memory_history(max_entries=self._history, stacks="python")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        while error is not None:  # the dry run turns the error into one for the user
            if isinstance(error, torch.OutOfMemoryError):
                self.write("out-of-memory")
                break
            error = error.__cause__ or error.__context__
        if self._history is not None and self._memory is not None:
            self._memory._record_memory_history(enabled=None)

    def write(self, name: str) -> None:
        """Writes RUN/memory/NAME-rank-R.pickle. Without CUDA it only says that there is nothing to write."""
        if self._memory is None:
            if self._ranks.main:
                log.warning("memory.request: a snapshot of the memory needs CUDA, so none is written")
            return
        path = self._folder / f"{name}-rank-{self._ranks.rank}.pickle"
        with self._failed.tolerated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # memory_viz reads no newer protocol
            path.write_bytes(pickle.dumps(self._memory._snapshot(), protocol=4))
            log.warning("a snapshot of the memory is in %s: open it at pytorch.org/memory_viz", path)
