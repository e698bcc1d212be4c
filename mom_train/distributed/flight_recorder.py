"""Keeps the last collective operations of a rank for the case that it hangs (PyTorch's flight recorder)."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from pathlib import Path

import torch

from mom_tokenizers.errors import user_path

log = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0


def record_nccl(run_dir: Path) -> None:
    """Lets NCCL's own watchdog write its record to RUN/stacks/nccl/rank_N when a collective operation takes too long.

    Call it before the process group is made. Variables that the environment already has are left as they are.
    """
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(run_dir.absolute() / "stacks" / "nccl" / "rank_"))


class FlightRecorder:
    """Writes the last collective operations of this rank, of NCCL and gloo, if the rank is silent for too long.

    The file RUN/stacks/collectives/rank_N is what PyTorch's `torchfrtrace RUN/stacks/collectives` reads to find out
    which rank is missing from which operation. It is written by a thread, while the main thread waits in a collective.
    """

    def __init__(self, run_dir: Path, rank: int):
        self._path = run_dir / "stacks" / "collectives" / f"rank_{rank}"
        if torch.cuda.is_available():  # NCCL makes no folder
            with user_path(run_dir / "stacks" / "nccl"):
                (run_dir / "stacks" / "nccl").mkdir(parents=True, exist_ok=True)
        self._deadline = math.inf
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace", None)

    def begin(self, seconds: float) -> None:
        """Work that takes less than `seconds` begins now."""
        self._deadline = time.monotonic() + seconds
        if self._thread is None and self._dump is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="flight-recorder")
            self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(min(_LOOK_SECONDS, max(0.01, self._deadline - time.monotonic()))):
            if time.monotonic() >= self._deadline:
                self._deadline = math.inf
                self._write()

    def _write(self) -> None:
        assert self._dump is not None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(self._dump(True, True, False))  # collectives, stacks, and not only the active ones
        except (OSError, RuntimeError) as error:
            log.error("%s CANNOT BE WRITTEN: %s", self._path, error)

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
