"""Finds ranks that hang, by dumping the stacks of their threads, and ranks that keep the others waiting."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from mom_tokenizers.errors import user_path
from mom_train.distributed.flight_recorder import FlightRecorder


class Watch:
    """Watches the steps of one rank. A context manager.

    If no step begins for 0.8 times the seconds that `begin` was given, the stacks of the rank's threads are written to
    RUN/stacks/rank-N.txt, from a thread that does not need the interpreter, and its last collective operations to
    RUN/stacks/collectives/rank_N. The timeout of the collective operation then ends the rank a little later.
    """

    def __init__(self, run_dir: Path, rank: int):
        path = run_dir / "stacks" / f"rank-{rank}.txt"
        with user_path(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # appended to, because torchrun may restart the rank at once; kept open during the run for faulthandler
            self._file = open(path, "a")  # noqa: SIM115
        self._recorder = FlightRecorder(run_dir, rank)
        self._waited = 0.0

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._recorder.close()
        self._file.close()

    def begin(self, timeout: float) -> None:
        """Says that a step, or other work that may take `timeout` seconds, begins now."""
        faulthandler.dump_traceback_later(0.8 * timeout, file=self._file)
        self._recorder.begin(0.8 * timeout)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context for code that waits for the other ranks."""
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    def report(self, seconds: float) -> dict[str, float]:
        """The share of the last `seconds` that ranks lost waiting for the slowest one, and the number of that rank.

        Collective: all ranks must call it.
        """
        mine = torch.tensor([self._waited], dtype=torch.float64)
        all_R = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_R, mine)
        waited_R = torch.cat(all_R)
        self._waited = 0.0
        lost = (waited_R.max() - waited_R.min()).item()
        return {"perf/straggling": lost / max(seconds, 1e-9), "perf/slowest_rank": int(waited_R.argmin())}
